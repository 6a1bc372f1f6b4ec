"""Sequences: all requests of one go where the first went, on whatever connection they come, or the caller is told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import wait_until
from triton_fixture import TritonFactory
from v2_calls import Outcome, call, channel_to, infer, numbers, read_all, stream
from v2_gateways import gateway_of

from gateway.access.api_keys import hash_of
from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

ids = itertools.count(1000)


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as made:
        yield made


def step(value: int, sequence: int | str, *, model: str = "sums", start: bool = False, end: bool = False) -> Any:
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    return infer(model, [[value]], "INT32", parameters=parameters)


def total(outcome: Outcome) -> float:
    assert outcome.code is grpc.StatusCode.OK, outcome.text
    return numbers(outcome.response)[0]


async def test_many_sequences_keep_their_sums_on_two_endpoints(channel: grpc.aio.Channel) -> None:
    sequences = [next(ids) for _ in range(16)]
    places: dict[int, set[str]] = {sequence: set() for sequence in sequences}
    for number in range(1, 5):
        requests = [step(sequence, sequence, start=number == 1, end=number == 4) for sequence in sequences]
        outcomes = await asyncio.gather(*(call(channel, request) for request in requests))
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            assert total(outcome) == sequence * number
            places[sequence].add(outcome.trailers["gateway-endpoint"])
    assert all(len(places[sequence]) == 1 for sequence in sequences)
    assert len(set.union(*places.values())) == 2


async def test_a_sequence_goes_on_over_streams_and_other_connections(
    gateway: Gateway, channel: grpc.aio.Channel
) -> None:
    for sequence in (next(ids) for _ in range(6)):
        assert total(await call(channel, step(1, sequence, start=True))) == 1
        streaming = stream(channel)
        await streaming.write(step(2, sequence))
        await streaming.write(step(3, sequence))
        await streaming.done_writing()
        assert [numbers(a.infer_response)[0] for a in await read_all(streaming)] == [3, 6]
        async with channel_to(gateway.listen) as other:
            assert total(await call(other, step(4, sequence))) == 10
        assert total(await call(channel, step(5, sequence, end=True))) == 15


async def test_a_whole_sequence_may_be_written_ahead(channel: grpc.aio.Channel) -> None:
    sequence = next(ids)
    streaming = stream(channel)
    for number in range(100):
        await streaming.write(step(1, sequence, start=number == 0, end=number == 99))
    await streaming.done_writing()
    assert [numbers(a.infer_response)[0] for a in await read_all(streaming)] == list(range(1, 101))


CALLERS = {name: f"igk_{name}" for name in ("ada", "eve", "operator")}
OF_CALLERS = f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
models:
  sums: {{variants: {{only: {{upstream: main, model: accumulate}}}}}}
  text-sums: {{variants: {{only: {{upstream: main, model: accumulate_text}}}}}}
access:
  api_keys: [{", ".join(f"{{caller: {name}, sha256: '{hash_of(key).hex()}'}}" for name, key in CALLERS.items())}]
  grants:
    - {{callers: [ada, eve], models: [sums, text-sums], allow: [sequences]}}
    - {{callers: [operator], models: [sums], allow: [all]}}
"""


def of_callers(folder: Path, triton: LocalTriton) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(f"{OF_CALLERS}upstreams: {{main: {{endpoints: ['{triton.grpc_address}']}}}}\n")
    return file


def key_of(caller: str) -> tuple[tuple[str, str], ...]:
    return (("x-api-key", CALLERS[caller]),)


@pytest.mark.parametrize(("id", "model"), [(7, "sums"), ("seven", "text-sums")])
async def test_no_caller_can_speak_in_a_sequence_of_another_and_each_has_all_ids(
    triton: LocalTriton, tmp_path: Path, id: int | str, model: str
) -> None:
    """By a second gateway, which knows nothing of what was begun at the first."""
    file = of_callers(tmp_path, triton)
    async with (
        gateway_of(load(file, {})) as first,
        gateway_of(load(file, {})) as second,
        channel_to(first.listen) as channel,
        channel_to(second.listen) as other,
    ):
        assert total(await call(channel, step(1, id, model=model, start=True), metadata=key_of("ada"))) == 1
        for where in (channel, other):
            strange = await call(where, step(100, id, model=model), metadata=key_of("eve"))
            assert strange.code is grpc.StatusCode.INVALID_ARGUMENT
            assert f"for sequence {id} to model" in strange.text
            streaming = stream(where, key_of("eve"))
            await streaming.write(step(100, id, model=model))
            await streaming.done_writing()
            [answer] = await read_all(streaming)
            assert f"for sequence {id} to model" in answer.error_message
        assert total(await call(other, step(2, id, model=model), metadata=key_of("ada"))) == 3
        assert total(await call(channel, step(50, id, model=model, start=True), metadata=key_of("eve"))) == 50
        streaming = stream(other, key_of("ada"))
        await streaming.write(step(3, id, model=model))
        await streaming.write(step(4, id, model=model, end=True))
        await streaming.done_writing()
        assert [numbers(a.infer_response)[0] for a in await read_all(streaming)] == [6, 10]
        assert total(await call(other, step(1, id, model=model, end=True), metadata=key_of("eve"))) == 51


async def test_ids_are_as_they_were_sent_for_whom_all_is_allowed(triton: LocalTriton, tmp_path: Path) -> None:
    file = of_callers(tmp_path, triton)
    sequence = next(ids)
    async with (
        gateway_of(load(file, {})) as running,
        channel_to(running.listen) as channel,
        channel_to(triton.grpc_address) as direct,
    ):
        assert total(await call(channel, step(1, sequence, start=True), metadata=key_of("operator"))) == 1
        assert total(await call(direct, step(2, sequence, model="accumulate", end=True))) == 3


async def test_ids_may_be_texts(channel: grpc.aio.Channel) -> None:
    sums = []
    for number in range(3):
        for id in ("left", "rechts-ö"):
            request = step(1 + len(id), id, model="text-sums", start=number == 0, end=number == 2)
            sums.append(total(await call(channel, request)))
    assert sums == [5, 9, 10, 18, 15, 27]


async def test_an_id_starts_anew_after_its_end(channel: grpc.aio.Channel) -> None:
    sequence = next(ids)
    for _ in range(3):
        assert total(await call(channel, step(1, sequence, start=True))) == 1
        assert total(await call(channel, step(1, sequence, end=True))) == 2


async def test_an_id_of_zero_is_no_sequence(channel: grpc.aio.Channel) -> None:
    outcome = await call(channel, step(1, 0, start=True))
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_sequence_that_never_began_is_refused_by_triton(channel: grpc.aio.Channel) -> None:
    outcome = await call(channel, step(1, next(ids)))
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "START" in outcome.text


@pytest.fixture
async def pair(triton_factory: TritonFactory, tmp_path: Path) -> AsyncIterator[tuple[Gateway, dict[str, LocalTriton]]]:
    """Two Tritons with `accumulate` behind one upstream."""
    servers = await asyncio.gather(triton_factory(["accumulate"]), triton_factory(["accumulate"]))
    by_address = {server.grpc_address: server for server in servers}
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f"""
        listen: 127.0.0.1:0
        admin: {{listen: "127.0.0.1:0"}}
        telemetry: {{access_log: {{destination: none}}}}
        upstreams: {{pool: {{endpoints: [{", ".join(by_address)}]}}}}
        models: {{sums: {{variants: {{only: {{upstream: pool, model: accumulate}}}}}}}}
        """
    )
    async with gateway_of(load(file, {})) as gateway:
        yield gateway, by_address


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_sequence_whose_endpoint_dies_is_lost_and_never_goes_on_elsewhere(
    pair: tuple[Gateway, dict[str, LocalTriton]], streaming: bool
) -> None:
    gateway, servers = pair
    sequence = next(ids)
    async with channel_to(gateway.listen) as channel:
        begun = await call(channel, step(7, sequence, start=True))
        victim = servers[begun.trailers["gateway-endpoint"]]
        await victim.kill()
        for _ in range(3):
            code, text = await attempt(channel, step(1, sequence), streaming)
            assert "is lost" in text, text
            assert "start the sequence again" in text
            assert code in (grpc.StatusCode.UNAVAILABLE, None)
        again = await call(channel, step(5, sequence, start=True))
        assert total(again) == 5
        assert again.trailers["gateway-endpoint"] != victim.grpc_address
        assert total(await call(channel, step(5, sequence))) == 10


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_sequence_whose_endpoint_was_started_again_is_lost_every_time_it_is_asked_for(
    pair: tuple[Gateway, dict[str, LocalTriton]], streaming: bool
) -> None:
    gateway, servers = pair
    sequence = next(ids)
    async with channel_to(gateway.listen) as channel:
        begun = await call(channel, step(7, sequence, start=True))
        victim = servers[begun.trailers["gateway-endpoint"]]
        await victim.kill()
        await victim.start()
        endpoint = gateway._topology.now.pools["pool"].maybe_find(victim.grpc_address)
        await wait_until(lambda: endpoint is not None and endpoint.state.value == "ready")
        for _ in range(3):
            code, text = await attempt(channel, step(1, sequence), streaming)
            assert "start the sequence again" in text, text
            assert code in (grpc.StatusCode.UNAVAILABLE, None)
        assert total(await call(channel, step(5, sequence, start=True))) == 5
        assert total(await call(channel, step(5, sequence))) == 10


async def test_a_start_goes_elsewhere_while_nobody_knows_that_its_server_is_gone(
    pair: tuple[Gateway, dict[str, LocalTriton]],
) -> None:
    gateway, servers = pair
    async with channel_to(gateway.listen) as channel:
        victim = next(iter(servers.values()))
        await victim.kill()
        for sequence in (next(ids) for _ in range(40)):
            for number in (1, 2):
                assert total(await call(channel, step(1, sequence, start=number == 1))) == number


async def attempt(channel: grpc.aio.Channel, request: Any, streaming: bool) -> tuple[grpc.StatusCode | None, str]:
    if not streaming:
        outcome = await call(channel, request)
        return outcome.code, outcome.text
    made = stream(channel)
    await made.write(request)
    answer = await made.read()
    made.cancel()
    return None, str(answer.error_message)


async def test_a_sequence_does_not_go_on_when_its_endpoint_has_started_again(
    pair: tuple[Gateway, dict[str, LocalTriton]],
) -> None:
    gateway, servers = pair
    sequence = next(ids)
    async with channel_to(gateway.listen) as channel:
        begun = await call(channel, step(7, sequence, start=True))
        address = begun.trailers["gateway-endpoint"]
        await servers[address].kill()
        await servers[address].start()
        pool = gateway._topology.now.pools["pool"].endpoints
        await wait_until(lambda: all(e.can_serve("accumulate", "") for e in pool))
        outcome = await call(channel, step(1, sequence))
    assert outcome.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE)
    assert "START" in outcome.text or "is lost" in outcome.text
