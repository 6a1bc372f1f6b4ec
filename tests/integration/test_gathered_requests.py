"""Large requests of several callers travel together in shared memory; each gets its own answer, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from shared_regions import in_use, nothing_held, of_bytes, placed
from triton_fixture import DTYPES, TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, batch_of, call, channel_to, channels_to, infer
from v2_gateways import endpoint_of, gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CALLERS = 6
FLOATS = 150_000


@contextlib.asynccontextmanager
async def merging(
    folder: Path, triton: str, *models: str, size: str = "32MiB", more: str = ""
) -> AsyncIterator[Gateway]:
    """Requests wait for company a little, so that they surely have some."""
    file = folder / "gateway.yaml"
    public = "".join(
        f"  m-{name}: {{variants: {{only: {{upstream: main, model: {name}}}}}, merge: {{delay: 50ms{more}}}}}\n"
        for name in models
    )
    file.write_text(
        f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{triton}"], shared_memory: {{bytes: {size}}}, probe_interval: 100ms}}}}
models:
{public}
"""
    )
    async with gateway_of(load(file, {})) as running:
        yield running


async def known(channels: list[grpc.aio.Channel], request: Any) -> None:
    """Have the gateway find out that the model can be merged."""
    for _ in range(50):
        outcomes = await asyncio.gather(*(call(channel, request) for channel in channels[:2]))
        assert {outcome.code for outcome in outcomes} == {grpc.StatusCode.OK}
        if members(list(outcomes)) == [2, 2]:
            return
    raise AssertionError("its requests are not merged")


def of_numbers(number: int, count: int = FLOATS, model: str = "m-identity_fp32") -> Any:
    return infer(model, np.full((1, count), number, np.float32))


async def together(channels: list[grpc.aio.Channel], count: int = FLOATS, **options: Any) -> list[Outcome]:
    asked = (call(channel, of_numbers(number, count), **options) for number, channel in enumerate(channels))
    return list(await asyncio.gather(*asked))


def members(outcomes: list[Outcome]) -> list[int]:
    return [batch_of(outcome) for outcome in outcomes]


def assert_own(outcomes: list[Outcome], count: int = FLOATS) -> None:
    for number, outcome in enumerate(outcomes):
        assert outcome.code is grpc.StatusCode.OK, outcome.text
        values = np.frombuffer(outcome.response.raw_output_contents[0], np.float32)
        assert len(values) == count
        assert (values == number).all()


async def test_each_gets_the_rows_that_are_its_own(triton: LocalTriton, tmp_path: Path) -> None:
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        await known(channels, of_numbers(1))
        rounds = 0
        while rounds < 3:  # in which all of them met, which a busy machine may keep them from
            before = placed(memory)
            outcomes = await together(channels)
            assert_own(outcomes)
            await nothing_held(memory)
            if members(outcomes) == [CALLERS] * CALLERS:
                assert placed(memory) == before + 1
                rounds += 1


@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_datatype_is_answered_as_by_triton(triton: LocalTriton, tmp_path: Path, dtype: str) -> None:
    """Small ones too, from their messages, and those that are not large enough to be laid while they arrive."""
    model = f"identity_{dtype.lower()}"
    async with (
        merging(tmp_path, triton.grpc_address, model) as gateway,
        channels_to(gateway.listen, 4) as channels,
        channel_to(triton.grpc_address) as direct,
    ):
        memory = await in_use(gateway)
        memory.least = 1
        await known(channels, asked(dtype, 300))
        for size in (300, 40_000, 70_000, 300_000):
            theirs = [await call(direct, of_bytes_alike(dtype, size, number)) for number in range(4)]
            outcomes = await asyncio.gather(
                *(call(channel, asked(dtype, size, number)) for number, channel in enumerate(channels))
            )
            assert max(members(list(outcomes))) > 1, size
            for ours, other in zip(outcomes, theirs, strict=True):
                assert ours.response.raw_output_contents == other.response.raw_output_contents
                assert ours.response.outputs == other.response.outputs
        await nothing_held(memory)


def of_bytes_alike(dtype: str, size: int, number: int = 0) -> Any:
    """As `of_bytes`, of one shape for all numbers but of other values, and without an id."""
    request = of_bytes(dtype, size)
    request.id = ""
    raw = bytearray(request.raw_input_contents[0])
    raw[-1 if dtype == "BYTES" else 0] = number & 1
    request.raw_input_contents[0] = bytes(raw)
    return request


def asked(dtype: str, size: int, number: int = 0) -> Any:
    request = of_bytes_alike(dtype, size, number)
    request.model_name = f"m-{request.model_name}"
    return request


async def test_without_room_for_all_of_them_each_goes_as_it_can(triton: LocalTriton, tmp_path: Path) -> None:
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32", size="4MiB") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        await known(channels, of_numbers(1))
        for count in (FLOATS, 2 * FLOATS, 1_500_000):
            for _ in range(2):
                assert_own(await together(channels, count), count)
        assert memory.now().requests["no_slot"] > 0
        await nothing_held(memory)


async def test_one_that_triton_refuses_fails_nobody_else(triton: LocalTriton, tmp_path: Path) -> None:
    async with (
        merging(tmp_path, triton.grpc_address, "picky") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        memory.least = 1
        await known(channels, infer("m-picky", np.ones((1, 2), np.float32)))
        numbers = [1.0, 2.0, -3.0, 4.0]
        outcomes = await asyncio.gather(
            *(
                call(channel, infer("m-picky", np.full((1, 2), number, np.float32)))
                for number, channel in zip(numbers, channels, strict=False)
            )
        )
        for number, outcome in zip(numbers, outcomes, strict=True):
            if number < 0:
                assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
            else:
                assert (np.frombuffer(outcome.response.raw_output_contents[0], np.float32) == number).all()
        await nothing_held(memory)


async def test_memory_that_somebody_has_unregistered_costs_no_call(triton: LocalTriton, tmp_path: Path) -> None:
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
        channel_to(triton.grpc_address) as direct,
    ):
        memory = await in_use(gateway)
        await known(channels, of_numbers(1))
        await call(direct, pb.SystemSharedMemoryUnregisterRequest(), "SystemSharedMemoryUnregister")
        outcomes = await together(channels)
        assert_own(outcomes)
        assert {outcome.trailers["gateway-attempts"] for outcome in outcomes} == {"1"}
        assert memory.now().registrations == {"registered": 1, "lost": 1}
        await nothing_held(memory)


@pytest.mark.parametrize("who", ["one of them", "all of them"])
async def test_callers_who_go_away_free_nothing_that_triton_reads(
    triton: LocalTriton, tmp_path: Path, who: str
) -> None:
    """Triton is stopped, so that it surely has not read what was sent to it."""
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32", more=", recheck: 1s") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        await known(channels, of_numbers(1))
        assert_own(await together(channels))  # so that the model was just checked
        sent = placed(memory)
        os.kill(triton.pid, signal.SIGSTOP)
        try:
            calls = [
                asyncio.ensure_future(call(channel, of_numbers(number), timeout=60))
                for number, channel in enumerate(channels)
            ]
            await wait_until(lambda: placed(memory) == sent + 1)
            gone = calls[:1] if who == "one of them" else calls
            for each in gone:
                each.cancel()
            await wait_until(lambda: memory.now().slots == CALLERS + 1 - len(gone))  # the gathered ones, and their own
            await asyncio.sleep(0.2)
            assert memory.now().slots == CALLERS + 1 - len(gone)
            if who == "all of them":  # what Triton computes for nobody is counted, and keeps a place there
                assert memory.now().given_up == endpoint_of(gateway, "main").in_flight == 1
        finally:
            os.kill(triton.pid, signal.SIGCONT)
        if who == "one of them":
            for number, each in enumerate(calls[1:], 1):
                values = np.frombuffer((await each).response.raw_output_contents[0], np.float32)
                assert (values == number).all()
        await nothing_held(memory)
        assert memory.now().registrations == {"registered": 1}
        assert memory.now().given_up == endpoint_of(gateway, "main").in_flight == 0


async def test_who_names_his_outputs_is_merged_too_after_calls_of_his_own(triton: LocalTriton, tmp_path: Path) -> None:
    """Their answers are like ones seen before, which may come by shared memory."""
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        request = of_numbers(1)
        request.outputs.add(name="OUT")
        for _ in range(5):
            outcome = await call(channels[0], request)
            assert outcome.code is grpc.StatusCode.OK
            assert outcome.response.raw_output_contents == request.raw_input_contents
        await known(channels, request)
        await nothing_held(memory)


async def test_a_killed_triton_ends_them_all_and_gets_memory_again(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    triton = await triton_factory(["identity_fp32"])
    async with (
        merging(tmp_path, triton.grpc_address, "identity_fp32") as gateway,
        channels_to(gateway.listen, CALLERS) as channels,
    ):
        memory = await in_use(gateway)
        await known(channels, of_numbers(1))
        sent = placed(memory)
        os.kill(triton.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(together(channels, timeout=60))
        await wait_until(lambda: placed(memory) > sent)
        await triton.kill()
        assert {outcome.code for outcome in await asked} == {grpc.StatusCode.UNAVAILABLE}
        await triton.start()
        await wait_until(lambda: memory.now().state == "in use")
        await known(channels, of_numbers(1))
        assert_own(await together(channels))
        await nothing_held(memory)
