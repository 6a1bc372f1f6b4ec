"""Servers die, hang, fill up and come back while calls go on, on real Tritons."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from traffic import (
    OK,
    UNAVAILABLE,
    Ended,
    Traffic,
    config,
    gateway,
    http,
    traffic,
    until,
    until_readyz,
    write,
)
from triton_fixture import TritonFactory
from v2_calls import Outcome, call, channel_to, infer

from gateway.triton import LocalTriton

NOBODY = "127.0.0.1:1"  # tcpmux; nothing listens there
TWO_VARIANTS = {
    "gpu": {"upstream": "gpu", "model": "add_one_a"},
    "cpu": {"upstream": "cpu", "model": "add_one_a"},
}
ADDER = {"adder": {"variants": TWO_VARIANTS}}
ALONE = {"adder": {"variants": {"only": {"upstream": "all", "model": "add_one_a"}}}}
WAITER = {"waiter": {"variants": {"only": {"upstream": "all", "model": "slow"}}}}


@pytest.fixture
async def gpu(triton_factory: TritonFactory) -> LocalTriton:
    """The server that a test breaks; it plays the GPU."""
    return await triton_factory(["add_one_a", "slow"])


def assert_hardly_any_failed(calls: Traffic) -> None:
    assert {ended.code for ended in calls.failed} <= {UNAVAILABLE}, calls.why()
    assert len(calls.failed) <= len(calls.calls) / 1000, calls.why()


async def test_an_upstream_that_is_absent_from_the_start_is_stepped_in_for(triton: LocalTriton, tmp_path: Path) -> None:
    file = write(tmp_path / "g.yaml", config({"gpu": NOBODY, "cpu": triton.grpc_address}, ADDER))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        outcome = await call(channel, infer("adder"))
        assert outcome.code is OK
        assert outcome.trailers["gateway-variant"] == "cpu"
        assert outcome.trailers["gateway-attempts"] == "1"  # a server known to be down is not asked
        assert (await http(running.admin_address, "/readyz"))[0] == 200


async def test_a_gpu_server_that_dies_under_load_is_stepped_in_for_and_gets_its_calls_back(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    upstreams = {"gpu": gpu.grpc_address, "cpu": triton.grpc_address}
    file = write(tmp_path / "g.yaml", config(upstreams, ADDER))
    async with gateway(file) as running, traffic(running.listen, callers=8) as calls:
        assert {ended.variant for ended in await calls.more(200)} == {"gpu"}
        await gpu.kill()
        killed = time.monotonic()
        await calls.until(lambda: len(calls.since(killed + 1)) > 200, 5, "calls after the death")
        assert calls.variants(killed + 1).keys() == {"cpu"}
        assert all(ended.outcome.trailers["gateway-attempts"] == "1" for ended in calls.since(killed + 1))
        await gpu.start()
        started = time.monotonic()
        await calls.until(lambda: calls.variants(started)["gpu"] > 0, 5, "back to the GPU")
        back = time.monotonic()
        first = Counter(ended.variant for ended in await calls.more(30))
        assert first["gpu"] < 15  # by and by: a tenth, then more
        variants = running.shown.state()["models"]["adder"]["variants"]  # type: ignore[index]
        assert variants["gpu"]["breaker"] == "probing"
        await calls.until(lambda: calls.latest()["gpu"] > 30, 15, "half of the calls")
        assert calls.variants(back).keys() == {"gpu", "cpu"}  # and no more until it has been well for long
        metrics = (await http(running.admin_address, "/metrics"))[1]
        assert 'gateway_variant_breaker{model="adder",variant="gpu"} 1.0' in metrics
    assert_hardly_any_failed(calls)


async def test_forbidden_fallback_ends_in_an_error_that_names_the_model(triton: LocalTriton, tmp_path: Path) -> None:
    models = {"adder": {"variants": TWO_VARIANTS, "fallback": "forbid"}}
    file = write(tmp_path / "g.yaml", config({"gpu": NOBODY, "cpu": triton.grpc_address}, models))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        outcome = await call(channel, infer("adder"))
        assert outcome.code is UNAVAILABLE
        assert "'adder'" in outcome.text
        assert NOBODY not in outcome.text  # addresses are not the caller's business


async def test_a_model_that_is_unloaded_is_stepped_in_for_and_found_when_it_is_loaded(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    upstreams = {"gpu": gpu.grpc_address, "cpu": triton.grpc_address}
    file = write(tmp_path / "g.yaml", config(upstreams, ADDER))
    async with gateway(file) as running, channel_to(gpu.grpc_address) as control:
        async with traffic(running.listen) as calls:
            assert {ended.variant for ended in await calls.more(20)} == {"gpu"}
            await repository(control, "Unload")
            await calls.until(lambda: calls.calls[-1].variant == "cpu", 3, "the other variant")
            assert running.shown.readiness()[0]
            await repository(control, "Load")
            await calls.until(lambda: calls.calls[-1].variant == "gpu", 3, "the loaded model")
        assert not calls.failed, calls.why()


async def repository(control: grpc.aio.Channel, action: str) -> None:
    from tritonclient.grpc import service_pb2 as pb  # noqa: PLC0415

    request = getattr(pb, f"RepositoryModel{action}Request")(model_name="add_one_a")
    outcome = await call(control, request, f"RepositoryModel{action}")
    assert outcome.code is OK, outcome.text


async def test_when_every_server_is_dead_calls_fail_at_once_and_the_process_stays_alive(
    gpu: LocalTriton, tmp_path: Path
) -> None:
    file = write(tmp_path / "g.yaml", config({"all": gpu.grpc_address}, ALONE))
    async with gateway(file) as running:
        assert (await http(running.admin_address, "/readyz"))[0] == 200
        async with traffic(running.listen) as calls:
            await calls.more(20)
            await gpu.kill()
            await until_readyz(running.admin_address, False, within=2)
            down = await calls.more(100)
            assert {ended.code for ended in down} == {UNAVAILABLE}  # and not that their time has passed
            assert all("'adder'" in ended.outcome.text for ended in down)
            assert (await http(running.admin_address, "/healthz"))[0] == 200
            await gpu.start()
            await until_readyz(running.admin_address, True, within=3)
            assert {ended.code for ended in await calls.more(20)} == {OK}


async def test_a_server_that_hangs_is_left_alone_and_used_again_when_it_answers(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    file = write(tmp_path / "g.yaml", config({"gpu": gpu.grpc_address, "cpu": triton.grpc_address}, ADDER))
    assert gpu.pid is not None
    async with gateway(file) as running, traffic(running.listen, timeout=0.5) as calls:
        await calls.more(20)
        os.kill(gpu.pid, signal.SIGSTOP)
        try:
            await calls.until(lambda: states(running.shown.state())[0] == "down", 5, "ejection")
            await calls.until(lambda: calls.calls[-1].variant == "cpu", 1, "the other variant")
            late = [ended for ended in calls.calls if ended.code is not OK]
            assert {ended.code for ended in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert {ended.variant for ended in await calls.more(50)} == {"cpu"}
        finally:
            os.kill(gpu.pid, signal.SIGCONT)
        await calls.until(lambda: calls.calls[-1].variant == "gpu", 5, "back after SIGCONT")


class TestFullQueue:
    """`slow` runs one request at a time and lets four wait."""

    async def test_the_next_endpoint_takes_what_the_first_has_no_room_for(
        self, gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
    ) -> None:
        both = {"all": [gpu.grpc_address, triton.grpc_address]}
        async with gateway(write(tmp_path / "g.yaml", config(both, WAITER))) as running, full(gpu):
            outcomes = await at_once(running.listen, "waiter", 4)  # the second server lets four wait
        assert {outcome.code for outcome in outcomes} == {OK}
        assert triton.grpc_address in {outcome.trailers["gateway-endpoint"] for outcome in outcomes}

    async def test_the_next_variant_takes_what_the_first_has_no_room_for(
        self, gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
    ) -> None:
        upstreams = {"gpu": gpu.grpc_address, "cpu": triton.grpc_address}
        variants = {name: {"upstream": name, "model": "slow"} for name in ("gpu", "cpu")}
        file = write(tmp_path / "g.yaml", config(upstreams, {"waiter": {"variants": variants}}))
        async with gateway(file) as running, full(gpu):
            (outcome,) = await at_once(running.listen, "waiter", 1)
        assert outcome.code is OK
        assert outcome.trailers["gateway-variant"] == "cpu"
        assert outcome.trailers["gateway-attempts"] == "2"

    async def test_a_public_model_without_room_anywhere_is_exhausted(self, gpu: LocalTriton, tmp_path: Path) -> None:
        file = write(tmp_path / "g.yaml", config({"all": gpu.grpc_address}, WAITER))
        async with gateway(file) as running, full(gpu):
            (outcome,) = await at_once(running.listen, "waiter", 1)
        assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "'waiter'" in outcome.text
        assert "Exceeds maximum queue size" in outcome.text

    async def test_tritons_own_model_without_room_says_what_triton_says(self, gpu: LocalTriton, tmp_path: Path) -> None:
        file = write(tmp_path / "g.yaml", config({"all": gpu.grpc_address}, WAITER))
        async with gateway(file) as running, full(gpu):
            (outcome,) = await at_once(running.listen, "slow", 1)
            (said,) = await at_once(gpu.grpc_address, "slow", 1)
        assert (outcome.code, outcome.text) == (said.code, said.text)
        assert said.code is UNAVAILABLE


@contextlib.asynccontextmanager
async def full(server: LocalTriton) -> AsyncIterator[None]:
    """Keeps `slow` busy and its queue full."""
    refusals = [0] * 8

    async def press_in(number: int) -> None:
        while (await call(channel, infer("slow", [[2000]], "INT32"))).code is UNAVAILABLE:
            refusals[number] += 1
            await asyncio.sleep(0.01)

    async with channel_to(server.grpc_address) as channel:
        calls = [asyncio.ensure_future(press_in(number)) for number in range(len(refusals))]
        # Once is not enough: what leaves the queue to be prepared makes room for one more.
        await until(lambda: max(refusals) >= 10, 5, "a full queue")
        yield
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def at_once(address: str, model: str, count: int) -> list[Outcome]:
    async with channel_to(address) as channel:
        return await asyncio.gather(*(call(channel, infer(model, [[1]], "INT32")) for _ in range(count)))


async def test_of_two_endpoints_both_are_used_and_one_may_die(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    both = {"all": [gpu.grpc_address, triton.grpc_address]}
    file = write(tmp_path / "g.yaml", config(both, ALONE))
    async with gateway(file) as running, traffic(running.listen, callers=8) as calls:
        used = calls.endpoints
        # One whose first call was slow gets few, until what is known of it has faded.
        await calls.until(lambda: _is_even(calls.calls[-200:], both["all"]), 30, "calls at both")
        await gpu.kill()
        killed = time.monotonic()
        await calls.until(lambda: len(calls.since(killed + 1)) > 100, 5, "calls after the death")
        assert used(killed + 1).keys() == {triton.grpc_address}
    assert not calls.failed, calls.why()


def _is_even(calls: Sequence[Ended], addresses: Sequence[str]) -> bool:
    """Has each of them at least a quarter of 200 calls?"""
    used = Counter(ended.endpoint for ended in calls)
    return len(calls) == 200 and min(used[address] for address in addresses) > 50


async def test_the_endpoint_with_fewer_calls_in_flight_gets_the_next(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    both = {"all": [gpu.grpc_address, triton.grpc_address]}
    file = write(tmp_path / "g.yaml", config(both, {**WAITER, **ALONE}))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        slow = asyncio.ensure_future(call(channel, infer("waiter", [[2000]], "INT32")))
        await until(lambda: in_flight(running.shown.state()) == 1, 2, "a call in flight")
        served = {(await call(channel, infer("adder"))).trailers["gateway-endpoint"] for _ in range(10)}
        busy = (await slow).trailers["gateway-endpoint"]
    assert len(served) == 1
    assert busy not in served


def in_flight(state: Any) -> int:
    return sum(endpoint["in_flight"] for endpoints in state["upstreams"].values() for endpoint in endpoints)


def states(state: Any) -> list[str]:
    return [endpoint["state"] for endpoints in state["upstreams"].values() for endpoint in endpoints]


async def test_a_server_that_shuts_down_under_load_costs_no_call(
    gpu: LocalTriton, triton: LocalTriton, tmp_path: Path
) -> None:
    """SIGTERM: Triton finishes what it has, refuses what comes, and then closes."""
    both = {"all": [gpu.grpc_address, triton.grpc_address]}
    file = write(tmp_path / "g.yaml", config(both, {**WAITER, **ALONE}))
    async with gateway(file) as running:
        slow = infer("waiter", [[150]], "INT32")
        async with traffic(running.listen) as calls, traffic(running.listen, slow, callers=2) as slow_calls:
            await slow_calls.more(4)
            await gpu.aclose()
            assert not gpu.is_running
            await slow_calls.more(4)
        assert not calls.failed, calls.why()
        assert not slow_calls.failed, slow_calls.why()
        assert calls.endpoints()[gpu.grpc_address] > 0
