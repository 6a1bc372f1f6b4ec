"""The raw tensors of a request of the gateway's own, while they are in no message.

A pipeline makes arrays. Where they can be laid into memory that the endpoint shares, they need not be put into a
message first; and where they were made in such memory, nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.types import Buffer
from gateway.upstream.placed import Held, Placed
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.peek import RAW_INPUT, encode_varint, with_raw


class RawTensors:
    """Those of one request, in the order of its inputs. They do not change while anybody has this."""

    __slots__ = ("_held", "_places", "_raw", "size")

    def __init__(self, raw: Sequence[Buffer], held: Held | None = None, places: Sequence[tuple[int, int]] = ()) -> None:
        """held: the shared memory that they lie in, if all of them do. places: where in it, as of `Placing`."""
        self._raw = raw
        self._held = held
        self._places = places
        self.size = 0  # bytes that they take in a message
        for each in raw:
            self.size += 1 + len(encode_varint(len(each))) + len(each)

    def after(self, front: bytes) -> bytes:
        """The whole message. front: all of it that is before its raw tensors."""
        return with_raw(front, RAW_INPUT, self._raw)

    def maybe_place(self, memory: SharedMemory, front: bytes) -> Placed | None:
        """Have them in an endpoint's memory; None if that can't be. front: as of `after`."""
        if self._held is not None and self._held.is_of(memory):
            return memory.maybe_place_held(front, self._held, self._places)
        return memory.maybe_place_raw(front, [[each] for each in self._raw], self.size)
