"""Arrays in memory that an endpoint shares, so that what a step makes lies where the model will read it.

A step runs on a thread, and runs on when its caller has gone. So the memory is held by the arrays themselves: it is let
go of once nobody has an array of it, or a view of one, any more. Uses NumPy; knows no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gateway.forwarding.raw_tensors import RawTensors
from gateway.steps import Array
from gateway.types import Buffer
from gateway.upstream.placed import Held
from gateway.v2.placing import MOST_INPUTS, aligned

Wanted = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and dtype of each array, by name."""

_IS_LITTLE: Final = sys.byteorder == "little"  # as tensors are


class _Ground:
    """What NumPy keeps alive as long as it has an array of the memory."""

    __slots__ = ("__array_interface__", "_bytes", "_loop", "at", "held")

    def __init__(self, held: Held) -> None:
        self.held = held
        self._loop = asyncio.get_running_loop()
        self._bytes = np.frombuffer(held.view, np.uint8)  # which keeps the memory mapped
        self.at: int = self._bytes.__array_interface__["data"][0]
        self.__array_interface__ = self._bytes.__array_interface__

    def __del__(self) -> None:
        # Never at once: this may be a step's thread, or any moment at which Python looks for cycles.
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self.held.drop)


def size_of(wanted: Wanted) -> int:
    """Bytes of memory for all of them; 0 if one can't be in shared memory, or there are too many."""
    if not _IS_LITTLE or not 0 < len(wanted) <= MOST_INPUTS or any(dtype.kind == "O" for _, dtype in wanted.values()):
        return 0
    return sum(aligned(_bytes_of(shape, dtype)) for shape, dtype in wanted.values())


def arrays_in(held: Held, wanted: Wanted) -> dict[str, Array]:
    """Uninitialised arrays in a part of at least `size_of` bytes, which is theirs from now on."""
    flat = np.asarray(_Ground(held))
    made, at = {}, 0
    for name, (shape, dtype) in wanted.items():
        size = _bytes_of(shape, dtype)
        made[name] = flat[at : at + size].view(dtype).reshape(shape)
        at += aligned(size)
    return made


def raw_tensors(raw: Sequence[Buffer]) -> RawTensors:
    """The raw tensors of a request, with where they lie if all of them are in one part of shared memory."""
    grounds = [_maybe_ground(each) for each in raw]
    first = grounds[0] if grounds else None
    if first is None or any(ground is not first for ground in grounds):
        return RawTensors(raw)
    return RawTensors(raw, first.held, [(_address(each) - first.at, len(each)) for each in raw])


def _maybe_ground(raw: Buffer) -> _Ground | None:
    """raw: as `raw_view` makes it: if that is a view, its memory is an array's."""
    base: object = raw.obj if isinstance(raw, memoryview) else None
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Ground) else None


def _address(raw: Buffer) -> int:
    address: int = np.frombuffer(raw, np.uint8).__array_interface__["data"][0]
    return address


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size = dtype.itemsize
    for each in shape:
        size *= each
    return size
