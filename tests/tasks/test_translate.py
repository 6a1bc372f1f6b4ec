"""Translation on the real models: whole by a pipeline, piece by piece by a decoupled model, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from task_models import CHECKOUT, build_models, example, written
from triton_fixture import FAST_START
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton
from gateway.v1 import text_pb2, text_pb2_grpc

MODELS = ("cn2en", "cn2en_stream", "arabic_names", "arabic_names_stream")
SLOW = "cn2en_slow"
"""`cn2en_stream` with a pause after each word, to look at what is under way."""
PAUSE_MS = 200

ANSWERS = json.loads((CHECKOUT / "tests/data/golden_translate.json").read_text("utf-8"))
WAYS = {"cn2en": "chinese-to-english", "arabic-name-romanizer": "latin-names"}
CASES = [(WAYS[package], text, answer) for package, cases in ANSWERS.items() for text, answer in cases.items()]
LONG = "你会说英语吗？"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_models(tmp_path_factory.mktemp("translate"), MODELS)
    slow = folder / SLOW
    shutil.copytree(folder / "cn2en_stream", slow)
    config = (folder / "cn2en_stream/config.pbtxt").read_text("utf-8").replace('"cn2en_stream"', f'"{SLOW}"')
    (slow / "config.pbtxt").write_text(
        f'{config}parameters {{ key: "pause_ms" value {{ string_value: "{PAUSE_MS}" }} }}', "utf-8"
    )
    return folder


@pytest.fixture(scope="module")
async def served(repository: Path) -> AsyncIterator[LocalTriton]:
    server = LocalTriton(repository, models=(*MODELS, SLOW), extra=FAST_START)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


def write_config(folder: Path, repository: Path, endpoint: str) -> Path:
    """The example's config for this repository, and the slow model."""
    config = example("translate", repository, endpoint)
    config["models"]["slow"] = {"variants": {"only": {"upstream": "local", "model": SLOW}}}
    return written(folder, config)


@pytest.fixture(scope="module")
async def gateway(
    served: LocalTriton, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    file = write_config(tmp_path_factory.mktemp("config"), repository, served.grpc_address)
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.listen) as channel:
        yield text_pb2_grpc.TextServiceStub(channel)


def asked(model: str, text: str) -> Any:
    return text_pb2.TranslateRequest(model=model, text=text)


async def collect(stub: Any, model: str, text: str) -> tuple[list[str], Any]:
    """The pieces, and the end."""
    messages = [message async for message in stub.TranslateStream(asked(model, text), timeout=60)]
    assert [message.WhichOneof("part") for message in messages] == ["piece"] * (len(messages) - 1) + ["end"]
    return [message.piece for message in messages[:-1]], messages[-1].end


def words_decoded(triton: LocalTriton, model: str) -> int:
    with urllib.request.urlopen(f"http://{triton.metrics_address}/metrics") as page:
        found = re.search(rf'text_stream_words_total{{model="{model}".*}} (\d+)', page.read().decode())
    return int(found[1]) if found else 0


# Right answers


@pytest.mark.parametrize(("model", "text", "answer"), CASES)
async def test_both_ways_give_the_package_s_own_answer(stub: Any, model: str, text: str, answer: str) -> None:
    whole = await stub.Translate(asked(model, text), timeout=60)
    pieces, end = await collect(stub, f"{model}-live", text)
    assert (whole.text, whole.complete) == (answer, True)
    assert ("".join(pieces), end.complete) == (answer, True)
    assert (whole.served.model, whole.served.attempts) == (model, 1)
    assert (end.served.model, end.served.attempts, end.served.model_version) == (f"{model}-live", 1, "1")


async def test_a_text_comes_in_as_many_pieces_as_it_has_words(stub: Any) -> None:
    pieces, _ = await collect(stub, "chinese-to-english-live", "你会说英语吗？")
    assert pieces == ["do", " you", " speak", " english", " ?"]


async def test_a_pipeline_streams_its_answer_as_one_piece(stub: Any) -> None:
    pieces, end = await collect(stub, "chinese-to-english", "你会说英语吗？")
    assert (pieces, end.complete) == (["do you speak english ?"], True)


async def test_words_that_the_model_does_not_know_are_named(stub: Any) -> None:
    text = "你会说英语龘吗？"
    whole = await stub.Translate(asked("chinese-to-english", text), timeout=60)
    pieces, end = await collect(stub, "chinese-to-english-live", text)
    assert whole.unknown == end.unknown == ["龘"]
    assert whole.text == "".join(pieces) == "do you speak english ?"


async def test_a_long_text_keeps_no_other_caller_waiting(stub: Any) -> None:
    """Texts under way take turns, so that one begins before the other has ended."""
    order = []

    async def follow(name: str) -> None:
        async for message in stub.TranslateStream(asked("slow", LONG), timeout=60):
            order.append(name if message.piece else "")

    await asyncio.gather(follow("a"), follow("b"))
    second = "b" if order[0] == "a" else "a"
    assert order.index(second) < order.index("")


# Callers that go away


async def test_a_caller_that_goes_away_stops_the_decoding_within_one_word(stub: Any, served: LocalTriton) -> None:
    before = words_decoded(served, SLOW)
    call = stub.TranslateStream(asked("slow", LONG))
    await call.read()
    call.cancel()
    await asyncio.sleep(3 * PAUSE_MS / 1000)  # all five words and their end would take six pauses
    assert words_decoded(served, SLOW) - before <= 2
    await asyncio.sleep(4 * PAUSE_MS / 1000)
    assert words_decoded(served, SLOW) - before <= 2


async def test_a_deadline_ends_the_text_and_says_so(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.TranslateStream(asked("slow", LONG), timeout=2.5 * PAUSE_MS / 1000):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# Wrong requests

BAD = {
    "empty": ("", "is empty"),
    "blank": (" \n\t", "is empty"),
    "too many words": ("我" * 65, "65 words or characters; at most 64"),
    "too many bytes": ("我" * 100_000, "300000 bytes; at most 4096"),
    "no known word": ("龘龘", "no word that the model knows"),
}


@pytest.mark.parametrize("model", ["chinese-to-english", "chinese-to-english-live"])
@pytest.mark.parametrize(("text", "wrong"), BAD.values(), ids=BAD)
async def test_a_text_that_cannot_be_translated_is_refused_and_says_why(
    stub: Any, model: str, text: str, wrong: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub, model, text)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert wrong in caught.value.details()


@pytest.mark.parametrize(
    ("model", "code", "wrong"),
    [
        ("", grpc.StatusCode.INVALID_ARGUMENT, "model is empty"),
        ("nothing", grpc.StatusCode.NOT_FOUND, "nothing"),
        ("slow", grpc.StatusCode.INVALID_ARGUMENT, "TranslateStream"),
    ],
)
async def test_translate_refuses_a_model_that_it_cannot_ask(
    stub: Any, model: str, code: grpc.StatusCode, wrong: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Translate(asked(model, LONG), timeout=60)
    assert caught.value.code() is code
    assert wrong in caught.value.details()


# Faults


async def test_an_endpoint_that_dies_in_mid_stream_ends_it_with_an_error(repository: Path, tmp_path: Path) -> None:
    """The pieces so far are not the text, and the caller is told."""
    server = LocalTriton(repository, models=(SLOW,), extra=FAST_START)
    await server.start()
    try:
        async with (
            gateway_of(load(write_config(tmp_path, repository, server.grpc_address), {})) as running,
            grpc.aio.insecure_channel(running.listen) as channel,
        ):
            call = text_pb2_grpc.TextServiceStub(channel).TranslateStream(asked("slow", LONG), timeout=60)
            messages = aiter(call)
            assert (await anext(messages)).piece == "do"
            await server.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [message async for message in messages]
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # there is no endpoint left
                await collect(text_pb2_grpc.TextServiceStub(channel), "slow", LONG)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.kill()
        await server.aclose()
