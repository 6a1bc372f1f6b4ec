"""v2 (pure): how many rows a request has, without parsing its tensors.

Source: grpc_service.proto: ModelInferRequest `inputs` 5; ModelInferRequest.InferInputTensor `shape` 3, repeated int64,
packed or not, which serializers write before the contents.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import MalformedMessage
from gateway.v2.peek import Head, read_varint

_INPUT: Final = 0x2A
_SHAPE_PACKED, _SHAPE = 0x1A, 0x18
_MOST_FIELDS: Final = 64  # that are looked through for the first tensor, and in it: serializers write few before it
_MOST: Final = 1 << 31


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


def _first_dimension(body: bytes) -> int:
    at = 0
    for _ in range(_MOST_FIELDS):
        tag, at = read_varint(body, at)
        if tag & 7 != 2:  # the scalars, parameters and tensors all have a length
            return 1
        size, at = read_varint(body, at)
        if tag == _INPUT:
            return _first_of_shape(body, at, min(at + size, len(body)))
        at += size
    return 1


def _first_of_shape(body: bytes, at: int, end: int) -> int:
    for _ in range(_MOST_FIELDS):
        if at >= end:
            return 1
        tag, at = read_varint(body, at)
        value, at = read_varint(body, at)
        if tag == _SHAPE_PACKED:
            if not value:
                return 1  # a shape without dimensions: one element
            value, at = read_varint(body, at)
        elif tag != _SHAPE:
            if tag & 7 == 2:
                at += value
            elif tag & 7 != 0:
                return 1
            continue
        return value if 0 < value < _MOST else 1
    return 1
