"""v2 (pure): a ModelInferRequest whose raw tensors lie in memory that the server shares, in place of in the message.

`read_front` says what is before the raw tensors, `Placing` lays these into memory as they arrive, and `Front.placed`
is the request that names where they lie. Values are not looked at: the server reads them as it reads raw tensors.
Field numbers: grpc_service.proto (triton-inference-server/common). The parameters are those of Triton's shared-memory
extension; raw tensors belong to the inputs in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.errors import MalformedMessage
from gateway.types import Buffer
from gateway.v2.peek import RAW_INPUT, encode_varint, fields, read_varint, scalars

ALIGNMENT: Final = 64  # bytes: what tensors begin on, for vector instructions
MOST_INPUTS: Final = 64  # of a request that is placed
_LONGEST: Final = 16_384  # bytes before the raw tensors
_MOST_BITS: Final = 35  # of a raw tensor's length
_RAW: Final = bytes((RAW_INPUT,))

_PARAMETER, _INPUT, _OUTPUT = 0x22, 0x2A, 0x32
_INPUT_TAG: Final = bytes((_INPUT,))
_BEFORE_RAW: Final = (0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x32)  # name, version, id, and these
_CONTENTS: Final = 0x2A  # of an InferInputTensor: typed contents
_KEY, _VALUE, _INT64, _STRING = b"\x0a", b"\x12", b"\x10", b"\x1a"
_OF_INPUT: Final = b"\x22"  # `parameters` of an InferInputTensor
_SHARED: Final = b"shared_memory"


def aligned(offset: int) -> int:
    """The next offset, in bytes, at which a tensor may begin."""
    return offset + -offset % ALIGNMENT


class Front:
    """What of a request is before its raw tensors, in pieces."""

    __slots__ = ("_before", "_inputs", "named", "raw")

    def __init__(self, raw: int, before: bytes, inputs: Sequence[bytes], named: bytes) -> None:
        """raw: where the raw tensors begin. before: the fields before the inputs, apart from the names.

        named: those after them, which name the outputs.
        """
        self.raw = raw
        self._before = before
        self._inputs = inputs
        self.named = named

    @property
    def layout(self) -> bytes:
        """All of the message that is before the raw tensors, but the names, in the order of the fields' numbers."""
        return b"".join((*self._pieces(), self.named))

    def size_of(self, message: int) -> int:
        """Bytes of memory that are enough for the raw tensors of a message of so many bytes."""
        return message - self.raw + ALIGNMENT * len(self._inputs)

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal for requests that differ in their names and values only."""
        return (self.named, self._before, *self._inputs)

    def asking(self, names: tuple[str, str, str], outputs: bytes, raw: bytes) -> bytes:
        """The request with other fields `outputs`. raw: its raw tensors."""
        model, version, id = names
        return b"".join((scalars(model, version, id), *self._pieces(), outputs, raw))

    def _pieces(self) -> list[bytes]:
        """The fields between the names and the outputs."""
        pieces = [self._before]
        for tensor in self._inputs:
            pieces += (_INPUT_TAG, encode_varint(len(tensor)), tensor)
        return pieces

    def placed(
        self,
        names: tuple[str, str, str],
        region: str,
        begin: int,
        places: Sequence[tuple[int, int]],
        outputs: bytes | None = None,
    ) -> bytes | None:
        """The request as one without raw tensors; None if there is not one place for each input, with bytes in it.

        names: of model and version, and the id. begin: of the memory in the region. places: as in `Placing`.
        outputs: its fields `outputs`, if they are to be others.
        """
        if len(places) != len(self._inputs) or not all(size for _, size in places):
            return None  # of a tensor without bytes Triton says that its place is none in the region (probed, 2.51)
        model, version, id = names
        pieces = [scalars(model, version, id), self._before]
        for tensor, (offset, size) in zip(self._inputs, places, strict=True):
            where = extent(_OF_INPUT, region, begin + offset, size)
            pieces += (_INPUT_TAG, encode_varint(len(tensor) + len(where)), tensor, where)
        pieces.append(self.named if outputs is None else outputs)
        return b"".join(pieces)


def read_front(front: bytes) -> Front | None:
    """What is before the raw tensors; None if these have not begun, or the request is one that can't be placed.

    That is one with typed contents, with memory of its caller's own, or with very many inputs.
    """
    before, named = b"", b""
    inputs: list[bytes] = []
    at = 0
    try:
        while at < _LONGEST:
            begin = at
            tag = front[at]
            if tag == RAW_INPUT:
                return Front(begin, before, inputs, named) if 0 < len(inputs) <= MOST_INPUTS else None
            if tag not in _BEFORE_RAW:
                return None
            size, value = read_varint(front, at + 1)
            at = value + size
            if at >= len(front):
                return None
            if tag == _INPUT:
                tensor = front[value:at]
                if _SHARED in tensor or any(inner == _CONTENTS for inner, _, _, _ in fields(tensor, 0, size)):
                    return None
                inputs.append(tensor)
            elif tag == _OUTPUT:
                if _SHARED in front[value:at]:
                    return None
                named += front[begin:at]
            elif tag == _PARAMETER:
                before += front[begin:at]
    except (IndexError, MalformedMessage):
        pass
    return None


class Placing:
    """Lays the raw tensors of a message into memory, as its bytes come in pieces of any size."""

    __slots__ = ("_at", "_header", "_left", "_odd", "_shift", "_size", "memory", "places")

    def __init__(self, memory: memoryview) -> None:
        """memory: writable bytes, at least as many as `Front.size_of` says."""
        self.places: list[tuple[int, int]] = []  # offset and size of each tensor
        self.memory = memory
        self._at = 0  # where the next byte of a tensor goes
        self._left = 0  # bytes yet to come of the tensor that has begun
        self._header = b""  # what has come of a tensor's tag and length, if they are not complete
        self._shift = 0  # bits that are known of the length
        self._size = 0
        self._odd: list[bytes] = []  # from the first field on that is no raw tensor, or finds no place

    @property
    def is_whole(self) -> bool:
        """Was what came nothing but tensors, the last one complete?"""
        return not self._left and not self._header and not self._odd

    def feed(self, data: bytes, at: int = 0) -> None:
        """The next bytes of the message are `data[at:]`; the first ones are the tag of the first raw tensor."""
        end = len(data)
        while at < end:
            if self._odd:
                self._odd.append(data[at:])
                return
            if self._left:
                size = min(self._left, end - at)
                begin = self._at
                self.memory[begin : begin + size] = data if size == end else memoryview(data)[at : at + size]
                self._at = begin + size
                self._left -= size
                at += size
                continue
            byte = data[at]
            if self._header:
                self._read_length(byte)
            elif byte == RAW_INPUT:
                self._header = _RAW
                self._shift = self._size = 0
            else:
                self._odd.append(data[at:])
                return
            at += 1

    def put(self, pieces: Sequence[Buffer]) -> bool:
        """The next tensor, whole, which no message has, in pieces. False: there is no room for it."""
        begin = at = aligned(self._at)
        for piece in pieces:
            size = len(piece)
            if at + size > len(self.memory):
                return False
            self.memory[at : at + size] = piece
            at += size
        self.places.append((begin, at - begin))
        self._at = at
        return True

    def feed_view(self, data: memoryview) -> None:
        """As `feed`, of bytes that may change once this has returned."""
        size, begin = len(data), self._at
        if size <= self._left:
            self.memory[begin : begin + size] = data
            self._at = begin + size
            self._left -= size
        else:
            self.feed(bytes(data))

    def maybe_room(self, most: int) -> memoryview | None:
        """Where the next bytes belong, at most so many; None if a tensor has to begin first. To be `filled`."""
        size = min(self._left, most)
        return self.memory[self._at : self._at + size] if size else None

    def filled(self, size: int) -> None:
        """The next bytes of the message are in the memory that `maybe_room` has answered."""
        self._at += size
        self._left -= size

    def _read_length(self, byte: int) -> None:
        """The next byte of a tensor's length. With the last one its place is known."""
        self._header += bytes((byte,))
        self._size |= (byte & 0x7F) << self._shift
        self._shift += 7
        if byte > 0x7F and self._shift < _MOST_BITS:
            return
        begin = aligned(self._at)
        if byte > 0x7F or begin + self._size > len(self.memory) or len(self.places) == MOST_INPUTS:
            self._odd.append(self._header)
        else:
            self.places.append((begin, self._size))
            self._at, self._left = begin, self._size
        self._header = b""

    def release(self) -> None:
        """The memory is not touched any more."""
        self.memory.release()

    def raw(self) -> bytes:
        """What came of the message, from its first raw tensor on."""
        pieces: list[bytes | memoryview] = []
        for offset, size in self.places:
            pieces += (_RAW, encode_varint(size), self.memory[offset : offset + size])
        if self._left:  # it ended within a tensor
            offset, _ = self.places[-1]
            pieces[-1] = self.memory[offset : self._at]
        pieces.append(self._header)
        pieces += self._odd
        return b"".join(pieces)


def extent(field: bytes, region: str, begin: int, size: int) -> bytes:
    """Where in a region a tensor is. field: the tag of `parameters` in its message."""
    parameters = (
        _entry(b"shared_memory_region", _STRING + encode_varint(len(region)) + region.encode()),
        _entry(b"shared_memory_byte_size", _INT64 + encode_varint(size)),
        _entry(b"shared_memory_offset", _INT64 + encode_varint(begin)),
    )
    return b"".join([field + encode_varint(len(entry)) + entry for entry in parameters])


def _entry(key: bytes, value: bytes) -> bytes:
    return b"".join((_KEY, encode_varint(len(key)), key, _VALUE, encode_varint(len(value)), value))
