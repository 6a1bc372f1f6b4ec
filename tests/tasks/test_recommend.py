"""Ranking on the real model: against wordllama's own vectors in plain numpy, and what cannot be ranked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from task_models import CHECKOUT, build_models, example, written
from triton_fixture import FAST_START
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.artifacts import fetch
from gateway.config import load
from gateway.models import catalogue, movielens, ranking, sources, wordllama
from gateway.triton import LocalTriton
from gateway.v1 import ranking_pb2, ranking_pb2_grpc

ITEMS = 32_000
WAYS = ("recommendations", "recommendations-all")  # the model chooses the best; the gateway does
GOLDEN = json.loads((CHECKOUT / "tests/data/golden_wordllama.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def source() -> wordllama.Source:
    return wordllama.read(fetch(sources.WORDLLAMA))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_models(tmp_path_factory.mktemp("recommend"), ["recommend"])


@pytest.fixture(scope="module")
async def served(repository: Path) -> AsyncIterator[LocalTriton]:
    server = LocalTriton(repository, models=("recommend",), extra=FAST_START)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@pytest.fixture(scope="module")
async def gateway(
    served: LocalTriton, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    file = written(tmp_path_factory.mktemp("config"), example("recommend", repository, served.grpc_address))
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.listen) as channel:
        yield ranking_pb2_grpc.RankingServiceStub(channel)


def asked(model: str, history: Any, candidates: Any, top: int = 0) -> Any:
    return ranking_pb2.RankRequest(model=model, history=history, candidates=candidates, top=top)


def scores_of(source: wordllama.Source, history: list[int], candidates: list[int]) -> Any:
    unit = source.vectors / np.maximum(np.linalg.norm(source.vectors, axis=1, keepdims=True), 1e-12)
    user = unit[history].sum(0)
    return unit[candidates] @ (user / np.linalg.norm(user))


@pytest.mark.parametrize("count", [1, 10, 1_000, 10_000])
@pytest.mark.parametrize("model", WAYS)
async def test_candidates_come_in_the_order_of_their_likeness(
    stub: Any, source: wordllama.Source, model: str, count: int
) -> None:
    random = np.random.default_rng(count)
    history, candidates = random.integers(3, ITEMS, 17).tolist(), random.permutation(ITEMS)[:count].tolist()
    answer = await stub.Rank(asked(model, history, candidates), timeout=60)
    told = dict(zip(candidates, scores_of(source, history, candidates), strict=True))
    scores = [item.score for item in answer.items]
    assert len(answer.items) == (count if model == "recommendations-all" else min(count, ranking.BEST))
    assert scores == sorted(scores, reverse=True)
    assert np.allclose(scores, [told[item.item] for item in answer.items], atol=2e-3)  # its vectors have 16 bits
    assert np.allclose(scores, sorted(told.values(), reverse=True)[: len(scores)], atol=2e-3)
    assert answer.served.model == model


async def test_both_ways_choose_the_same_and_a_caller_may_want_fewer(stub: Any) -> None:
    history, candidates = [5, 900, 17_000], list(range(3, 5_000))
    best = [(await stub.Rank(asked(model, history, candidates, 10), timeout=60)).items for model in WAYS]
    assert list(best[0]) == list(best[1])
    assert len(best[0]) == 10


async def test_of_equal_candidates_the_one_named_first_comes_first(stub: Any) -> None:
    for model in WAYS:
        answer = await stub.Rank(asked(model, [5], [700, 7, 700, 7]), timeout=60)
        places = [item.item for item in answer.items]
        assert places in ([7, 7, 700, 700], [700, 700, 7, 7])


BAD = {
    "no candidates": ([5], [], "'candidates': is empty; send at least one item"),
    "no history": ([], [5], "'history': is empty; send at least one item"),
    "a candidate that does not exist": ([5], [1, ITEMS], f"item {ITEMS} (number 1 of them) does not exist"),
    "a liked item that does not exist": ([40_000], [1], "items are 0 … 31999"),
    "a number beyond any": ([5], [2**32 - 1], "item 4294967295 does not exist"),
    "too many": ([5], range(10_001), "10001 items; at most 10000 are allowed"),
    "a million": ([5], [1] * 1_000_000, "1000000 items; at most 10000 are allowed"),
    "ten million": ([5], [300] * 10_000_000, "more candidates than can be ranked at once"),
}


@pytest.mark.parametrize(("history", "candidates", "wrong"), BAD.values(), ids=BAD)
async def test_what_cannot_be_ranked_is_refused_and_says_why(
    stub: Any, history: Any, candidates: Any, wrong: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Rank(asked("recommendations", history, candidates), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert wrong in caught.value.details()


@pytest.mark.parametrize(
    ("model", "code", "wrong"),
    [
        ("", grpc.StatusCode.INVALID_ARGUMENT, "model is empty"),
        ("nothing", grpc.StatusCode.NOT_FOUND, "nothing"),
        ("scores", grpc.StatusCode.INVALID_ARGUMENT, "is no pipeline"),
    ],
)
async def test_a_model_that_ranks_nothing_is_refused(stub: Any, model: str, code: grpc.StatusCode, wrong: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Rank(asked(model, [1], [2]), timeout=60)
    assert caught.value.code() is code
    assert wrong in caught.value.details()


# Faults


async def test_callers_of_an_endpoint_that_dies_get_their_own_order_from_the_other_one(
    served: LocalTriton, repository: Path, source: wordllama.Source, tmp_path: Path
) -> None:
    """Each asks for candidates of its own, so that an answer that went to another would show."""
    fragile = LocalTriton(repository, models=("recommend",), extra=FAST_START)
    await fragile.start()
    answered_by: list[str] = []
    config = example("recommend", repository, served.grpc_address, fragile.grpc_address)
    try:
        async with (
            gateway_of(load(written(tmp_path, config), {})) as both,
            grpc.aio.insecure_channel(both.listen) as channel,
        ):
            stub = ranking_pb2_grpc.RankingServiceStub(channel)

            async def rank(number: int) -> str:
                candidates = list(range(100 * number + 3, 100 * number + 53))
                answer = await stub.Rank(asked(WAYS[number % 2], [5 + number], candidates), timeout=60)
                told = sorted(scores_of(source, [5 + number], candidates).tolist(), reverse=True)
                assert {item.item for item in answer.items} <= set(candidates)
                assert np.allclose([item.score for item in answer.items], told[: len(answer.items)], atol=2e-3)
                answered_by.append(answer.served.endpoint)
                return str(answer.served.endpoint)

            async def ask_until(death: asyncio.Future[None], caller: int) -> str:
                number = caller
                while not death.done():
                    await rank(number := (number + 8) % 300)
                return await rank(caller)

            async def kill_in_the_midst() -> None:
                await wait_until(lambda: fragile.grpc_address in answered_by and len(answered_by) >= 40)
                await fragile.kill()

            death = asyncio.ensure_future(kill_in_the_midst())
            _, *last = await asyncio.gather(death, *(ask_until(death, caller) for caller in range(8)))
            assert answered_by.count(served.grpc_address) > 8
            assert set(last) == {served.grpc_address}, "what was asked after its death"
    finally:
        await fragile.kill()
        await fragile.aclose()


# What the model is built of


def test_texts_are_split_as_the_package_splits_them(source: wordllama.Source) -> None:
    for text, numbers in GOLDEN.items():
        assert wordllama.tokenize(source, text) == numbers, text


def test_own_items_are_ranked_by_their_texts(source: wordllama.Source) -> None:
    made = wordllama.embed(source, ["a cat", "a kitten", "a tax form"])
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    assert made[0] @ made[1] > made[0] @ made[2]


def test_own_items_take_the_place_of_the_words_once_they_are_there(tmp_path: Path) -> None:
    folder = build_models(tmp_path, ["recommend"])
    assert (folder / "recommend/1/items.txt").read_bytes().count(b"\n") == ITEMS
    (folder / "recommend/items.txt").write_text("a cat\na kitten\n", "utf-8")
    assert catalogue.build(["recommend"], folder) == ["recommend"]
    assert (folder / "recommend/1/items.txt").read_text("utf-8") == "a cat\na kitten\n"
    assert catalogue.build(["recommend"], folder) == []


def test_films_are_built_only_by_name_and_their_licence_is_told(tmp_path: Path) -> None:
    assert "recommend_ml100k" not in {recipe.name for recipe in catalogue.BY_DEFAULT}
    assert "research only" in movielens.NOTICE
    assert catalogue.find("recommend_ml100k").notice == movielens.NOTICE


def test_factors_tell_groups_that_like_different_things_apart() -> None:
    users, items = np.divmod(np.arange(40 * 10), 10)
    liked = items + 10 * (users % 2)  # users of even numbers like the first ten items, the others the last ten
    keep = (users * 7 + items * 3) % 10 < 6
    vectors = ranking.factorise(users[keep], liked[keep], (40, 20), size=4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[:10, :10].min() > likeness[:10, 10:].max()
