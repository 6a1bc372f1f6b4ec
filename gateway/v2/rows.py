"""v2 (pure): how many rows a request has, without parsing its tensors.

Source: grpc_service.proto: ModelInferRequest `inputs` 5; ModelInferRequest.InferInputTensor `shape` 3, repeated int64,
packed or not, which serializers write before the contents.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import MalformedMessage
from gateway.v2.peek import MAX_FIELDS, Head, fields, read_varint

_INPUT: Final = 0x2A
_SHAPE_PACKED, _SHAPE = 0x1A, 0x18
_LEN: Final = 2  # the wire type of what has a length
_NO_END: Final = 1 << 40  # more bytes than any message has: the end of one that has not arrived whole
_MOST: Final = 1 << 31
_MOST_ELSEWHERE: Final = 1 << 16  # rows that are believed of tensors in shared memory, of which a message has no bytes
_SHARED_MEMORY: Final = b"shared_memory"


def rows_of(body: bytes, head: Head) -> int:
    """The first dimension of a request's first input: the rows, where the model has a batch axis. 1 if there is none.

    body: whole, or what has arrived of it. The head remembers it.
    """
    if head.rows:
        return head.rows
    try:
        rows = _first_dimension(body)
    except (IndexError, MalformedMessage):
        rows = 1
    head.rows = rows  # of a head that requests share too: they are equal up to their raw contents
    return rows


def clamped(rows: int, body: bytes, size: int, *, may_share_memory: bool) -> int:
    """No more of these rows than a request of `size` bytes can have: a row takes a byte at least.

    A caller who only says that he has more would use up what others share, by a request that no server takes.
    may_share_memory: may its tensors be elsewhere, in memory that Triton shares?
    """
    if rows <= size:
        return rows
    return min(rows, _MOST_ELSEWHERE) if may_share_memory and _SHARED_MEMORY in body else max(1, size)


def _first_dimension(body: bytes) -> int:
    tensor = _maybe_first(body, 0, _NO_END, _INPUT, _INPUT)
    shape = None if tensor is None else _maybe_first(body, tensor[0], tensor[1], _SHAPE_PACKED, _SHAPE)
    if shape is None:
        return 1
    value, _ = read_varint(body, shape[0])
    return value if 0 < value < _MOST else 1


def _maybe_first(body: bytes, at: int, end: int, tag: int, other: int) -> tuple[int, int] | None:
    """Where the first field with one of two tags begins and ends, whatever is before it: nobody is to hide his rows.

    A shape without dimensions does not count, since another part of the shape may follow.
    """
    for _ in range(MAX_FIELDS):
        if at >= end:
            return None
        found, begin = read_varint(body, at)
        if found & 7 == _LEN:
            size, begin = read_varint(body, begin)
            at = begin + size
        else:
            _, _, begin, at = next(fields(body, at, end))
        if found in (tag, other) and (begin < at or found == _INPUT):
            return begin, at
    return None
