"""Regions that a gateway shares with its Triton do not exist for callers, who keep all of their own RPCs."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to
from v2_gateways import transparent_to

from gateway.api.control import _undo_system_unregister
from gateway.triton import LocalTriton
from gateway.upstream.ask import NOBODY
from gateway.upstream.channel import wire_channel
from gateway.upstream.endpoint import Endpoint
from gateway.v2.shared_memory import RESERVED

pytestmark = pytest.mark.integration

OURS = f"{RESERVED}0123456789abcdef"
UNKNOWN = "nobody's"


@contextlib.contextmanager
def memory(*names: str) -> Iterator[None]:
    """Files that are locked as a living gateway's are: another one that starts beside this test leaves them."""
    with contextlib.ExitStack() as files:
        for name in names:
            file = files.enter_context(Path("/dev/shm", name).open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(bytes(64))
            file.flush()
            files.callback(Path("/dev/shm", name).unlink)
        yield


async def register(channel: grpc.aio.Channel, name: str, key: str) -> Outcome:
    request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{key}", byte_size=64)
    return await call(channel, request, "SystemSharedMemoryRegister")


async def regions(channel: grpc.aio.Channel) -> set[str]:
    found = await call(channel, pb.SystemSharedMemoryStatusRequest(), "SystemSharedMemoryStatus")
    return set(pb.SystemSharedMemoryStatusResponse.FromString(found.body).regions)


Channels = tuple[grpc.aio.Channel, grpc.aio.Channel]


@pytest.fixture
async def channels(triton: LocalTriton) -> AsyncIterator[Channels]:
    """To a gateway and to its Triton, which has a region of the gateway's and two of callers."""
    theirs = [f"theirs_{i}_{os.getpid()}" for i in range(2)]
    with memory(OURS, *theirs):
        async with (
            transparent_to(triton.grpc_address) as gateway,
            channel_to(gateway.listen) as through,
            channel_to(triton.grpc_address) as direct,
        ):
            assert (await register(direct, OURS, OURS)).code is grpc.StatusCode.OK
            for i, name in enumerate(theirs):
                assert (await register(through, f"theirs_{i}", name)).code is grpc.StatusCode.OK
            yield through, direct
            await call(direct, pb.SystemSharedMemoryUnregisterRequest(), "SystemSharedMemoryUnregister")


async def test_the_status_of_all_regions_leaves_out_the_gateways(channels: Channels) -> None:
    through, direct = channels
    assert await regions(direct) == {OURS, "theirs_0", "theirs_1"}
    assert await regions(through) == {"theirs_0", "theirs_1"}


async def test_unregistering_all_regions_leaves_the_gateways(channels: Channels) -> None:
    through, direct = channels
    for method in ("SystemSharedMemoryUnregister", "CudaSharedMemoryUnregister"):
        assert (await call(through, getattr(pb, f"{method}Request")(), method)).code is grpc.StatusCode.OK
    assert await regions(direct) == {OURS}


@pytest.mark.parametrize("kind", ["System", "Cuda"])
async def test_a_caller_who_knows_a_name_learns_and_changes_nothing(channels: Channels, kind: str) -> None:
    """He gets what he would get for a name that nobody uses."""
    through, direct = channels
    for what in ("Status", "Unregister"):
        method = f"{kind}SharedMemory{what}"
        asked: Any = getattr(pb, f"{method}Request")
        ours, unknown = [await call(through, asked(name=name), method) for name in (OURS, UNKNOWN)]
        assert (ours.code, ours.text, ours.body) == (
            unknown.code,
            unknown.text.replace(UNKNOWN, OURS),
            unknown.body,
        )
    assert OURS in await regions(direct)


@pytest.mark.parametrize(("name", "key"), [(OURS, "theirs"), (f"{RESERVED}mine", "theirs"), ("mine", OURS)])
async def test_nothing_is_registered_under_such_a_name_or_over_such_memory(
    channels: Channels, name: str, key: str
) -> None:
    through, direct = channels
    outcome = await register(through, name, key)
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert outcome.text == "names and keys of shared memory that begin with 'gateway-tensors.' are the gateway's own"
    cuda = pb.CudaSharedMemoryRegisterRequest(name=OURS, byte_size=64)
    assert (await call(through, cuda, "CudaSharedMemoryRegister")).code is grpc.StatusCode.INVALID_ARGUMENT
    assert await regions(direct) == {OURS, "theirs_0", "theirs_1"}


async def test_a_change_that_is_undone_brings_back_the_callers_regions_alone(
    channels: Channels, triton: LocalTriton
) -> None:
    connection = wire_channel(triton.grpc_address, 1 << 20, None)
    endpoint = Endpoint("up", triton.grpc_address, connection)
    undo = await _undo_system_unregister(endpoint, pb.SystemSharedMemoryUnregisterRequest(), NOBODY)
    await connection.aclose()
    assert {step.name for _, step in undo} == {"theirs_0", "theirs_1"}
