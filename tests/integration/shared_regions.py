"""What tests ask of the memory that a gateway shares with its Triton, and requests that are laid there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from patience import wait_until
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor
from v2_calls import call
from v2_gateways import endpoint_of

from gateway.app import Gateway
from gateway.triton import LocalTriton
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.layout import SIZES
from gateway.v2.shared_memory import RESERVED

PROBES = "probe_interval: 100ms, probe_timeout: 1m"
"""Of an upstream: a Triton that is `stopped` for a while is not taken for dead."""


def memory_of(gateway: Gateway) -> SharedMemory:
    memory = endpoint_of(gateway, "main").memory
    assert memory is not None
    return memory


async def in_use(gateway: Gateway) -> SharedMemory:
    """The memory, once Triton knows it."""
    memory = memory_of(gateway)
    await wait_until(lambda: memory.now().state == "in use")
    return memory


def placed(memory: SharedMemory) -> int:
    """How many requests have gone by it."""
    return memory.now().requests.get("placed", 0)


async def nothing_held(memory: SharedMemory) -> None:
    await wait_until(lambda: memory.now().slots == memory.now().taken == 0)


def regions_of(pid: int) -> list[Path]:
    """The files of memory that a gateway's process shares with servers."""
    files = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it is closed by now
            files.append(fd.readlink())
    return [file for file in files if file.name.startswith(RESERVED) and file.exists()]


def of_bytes(dtype: str, size: int) -> Any:
    """A request for `identity_<dtype>` whose tensor has about so many bytes."""
    random = np.random.default_rng(size)
    if dtype == "BYTES":
        parts = [random.bytes(part) for part in (0, 1, max(1, size // 2), max(0, size - size // 2 - 17))]
        raw, count = serialize_byte_tensor(np.array([parts], np.object_)).item(), len(parts)
    else:
        count = max(1, size // SIZES[dtype])
        raw = random.bytes(count * SIZES[dtype])
        raw = bytes(byte & 1 for byte in raw) if dtype == "BOOL" else raw
    request = pb.ModelInferRequest(model_name=f"identity_{dtype.lower()}", id="mine", raw_input_contents=[raw])
    request.inputs.add(name="IN", datatype=dtype, shape=[1, count])
    return request


@contextlib.contextmanager
def stopped(triton: LocalTriton) -> Iterator[None]:
    """So that it surely has not read what is sent to it."""
    assert triton.pid is not None
    os.kill(triton.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(triton.pid, signal.SIGCONT)


async def end_by_their_deadline(channel: grpc.aio.Channel, request: Any, is_so: Callable[[], bool]) -> None:
    """Make calls that get no answer in time, until one has come as far as this before its end."""
    seconds = 0.3
    while not is_so():
        assert (await call(channel, request, timeout=seconds)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert seconds < 60
        seconds *= 2
