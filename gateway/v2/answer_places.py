"""v2 (pure): a ModelInferResponse whose tensors a server writes to memory that it shares, in place of into the message.

`wanted` says which outputs a request names, `sizes_of` how large they were in an answer to one like it, `requested` is
what the request has to say for its next one, and `pieces` are the answer as the server would have sent it.

Only requests that name their outputs are answered so: of others nobody can tell which outputs the model has by then.
An answer has an empty raw tensor for each output that is elsewhere (probed, Triton 2.51), so it is whole once these are
filled in. Field numbers: grpc_service.proto (triton-inference-server/common).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.errors import MalformedMessage
from gateway.v2.layout import SIZES
from gateway.v2.peek import RAW_OUTPUT, encode_varint, fields, read_varint
from gateway.v2.placing import aligned, extent
from gateway.v2.shapes import ImpossibleShape, elements_of

MOST_OUTPUTS: Final = 64
_SMALL: Final = 16_384  # bytes of a tensor up to which a copy costs less than to send it by itself, and holds no memory

_OUTPUT: Final = 0x2A  # field 5 of ModelInferResponse
_WANTED: Final = b"\x32"  # field 6 of ModelInferRequest
_NAME, _DATATYPE, _SHAPE, _ONE_OF_SHAPE = 0x0A, 0x12, 0x1A, 0x18  # of InferOutputTensor
_OWN: Final = b"\x12"  # `parameters` of InferRequestedOutputTensor
_EMPTY: Final = bytes((RAW_OUTPUT, 0))
_SIGN: Final = 1 << 63


def wanted(named: bytes) -> Sequence[bytes]:
    """The names of the outputs that a request names; none if one has parameters, or if there are very many.

    named: its fields `outputs`. raises: MalformedMessage.
    """
    names: list[bytes] = []
    for _, _, begin, end in fields(named, 0, len(named)):
        parts = [(tag, named[at:stop]) for tag, _, at, stop in fields(named, begin, end)]
        if len(parts) != 1 or parts[0][0] != _NAME:
            return ()
        names.append(parts[0][1])
    return names if len(set(names)) == len(names) <= MOST_OUTPUTS else ()


def sizes_of(front: bytes, names: Sequence[bytes]) -> Sequence[int] | None:
    """Bytes of the outputs of these names; None if the answer has not just these, or one of them has no fixed size.

    front: an answer's beginning, at least to its first raw tensor. raises: MalformedMessage.
    """
    sizes: dict[bytes, int] = {}
    at, end = 0, len(front)
    while at < end and front[at] < RAW_OUTPUT:
        tag = front[at]
        length, value = read_varint(front, at + 1)
        at = value + length
        if at >= end:
            return None
        if tag == _OUTPUT:
            name, size = _named(front, value, at)
            if size <= 0 or name in sizes:
                return None
            sizes[name] = size
    if at >= end or sizes.keys() != set(names):
        return None
    return [sizes[name] for name in names]


def _named(answer: bytes, at: int, end: int) -> tuple[bytes, int]:
    """An output's name, and the bytes of its raw tensor; -1 if it says no fixed size."""
    name, element = b"", 0
    shape: list[int] = []
    for tag, _, begin, stop in fields(answer, at, end):
        if tag == _NAME:
            name = answer[begin:stop]
        elif tag == _DATATYPE:
            element = SIZES.get(answer[begin:stop].decode("utf-8", "replace"), 0)
        elif tag == _ONE_OF_SHAPE:
            shape.append(read_varint(answer, begin)[0])
        elif tag == _SHAPE:
            next_at = begin
            while next_at < stop:
                number, next_at = read_varint(answer, next_at)
                shape.append(number)
        else:
            return name, -1  # parameters, or typed contents
    if not element or any(number >= _SIGN for number in shape):
        return name, -1
    try:
        return name, element * elements_of(shape)
    except ImpossibleShape:
        return name, -1


def room_for(sizes: Sequence[int]) -> int:
    """Bytes of memory for outputs of these sizes."""
    return sum([aligned(size) for size in sizes])


def requested(names: Sequence[bytes], sizes: Sequence[int], region: str, begin: int) -> bytes:
    """The fields `outputs` of a request that wants them one after the other in a region, from `begin` on."""
    pieces: list[bytes] = []
    for name, size in zip(names, sizes, strict=True):
        tensor = bytes((_NAME,)) + encode_varint(len(name)) + name + extent(_OWN, region, begin, size)
        pieces += (_WANTED, encode_varint(len(tensor)), tensor)
        begin += aligned(size)
    return b"".join(pieces)


def maybe_places(answer: bytes, names: Sequence[bytes], sizes: Sequence[int]) -> Sequence[tuple[int, int]] | None:
    """Where an answer's tensors begin in the memory, and their sizes, in its order; None if they are not there.

    That is where it has other outputs than were asked for, or one of no fixed size, or one that has no room there.

    :raises MalformedMessage: if it is no message.
    """
    places: dict[bytes, tuple[int, int]] = {}
    begin = 0
    for name, size in zip(names, sizes, strict=True):
        places[name] = (begin, size)
        begin += aligned(size)
    found: list[tuple[int, int]] = []
    empty = 0
    for tag, at, value, end in fields(answer, 0, len(answer)):
        if tag == _OUTPUT:
            name, size = _named(answer, value, end)
            offset, most = places.pop(name, (0, -1))
            if not 0 <= size <= most:
                return None
            found.append((offset, size))
        elif tag == RAW_OUTPUT:
            empty += answer[at:end] == _EMPTY
    return found if not places and empty == len(found) and answer.endswith(_EMPTY * empty) else None


def places(answer: bytes, names: Sequence[bytes], sizes: Sequence[int]) -> Sequence[tuple[int, int]]:
    """As `maybe_places`, where they must be there. raises: MalformedMessage if they are not."""
    found = maybe_places(answer, names, sizes)
    if found is None:
        raise MalformedMessage("The answer has other outputs than were to be written to shared memory.")
    return found


def pieces(answer: bytes, found: Sequence[tuple[int, int]], memory: memoryview) -> list[bytes | memoryview]:
    """An answer with its raw tensors, of which large ones are parts of `memory`. found: as of `places`."""
    made: list[bytes | memoryview] = []
    small = [answer[: len(answer) - len(_EMPTY) * len(found)]]
    for begin, size in found:
        small += (_EMPTY[:1], encode_varint(size))
        tensor = memory[begin : begin + size]
        if size <= _SMALL:
            small.append(bytes(tensor))
        else:
            made += (b"".join(small), tensor)
            small = []
    if small:
        made.append(b"".join(small))
    return made


def is_larger(text: str) -> bool:
    """Does an error say that an output was larger than its place? (Triton 2.51, once the model has run.)"""
    return text.startswith("shared memory size specified with the request for output ")
