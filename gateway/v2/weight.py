"""v2 (pure): counts the Python objects that parsing a message will make, before it is parsed.

A tensor's raw numbers become a view of the bytes that arrived. Every other piece of a message becomes an object: an
empty text takes two bytes of a message and hundreds of memory. So each piece has a weight, and a message that weighs
too much is refused unparsed, whatever else it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from gateway.errors import TooHeavy
from gateway.v2.peek import fields
from gateway.v2.shapes import ImpossibleShape, elements_of

NUMBER: Final = 1
"""Weight of a number in a list. Other pieces are weighed by their time and memory in comparison."""
TEXT: Final = 16
FIELD: Final = 256

MOST: Final = 1 << 22
"""Most weight of one message: 4,194,304 numbers in lists, or 262,144 texts, or 16,384 other fields, or a mix."""

BRIEF: Final = 1 << 15
"""Most weight of a message that is parsed on the event loop: it takes some milliseconds, too little for a thread."""

BYTES_EACH: Final = 20
"""Bytes of memory for a unit of weight. Measured: a text takes 300, from its message to the request made of it."""

# What each field of a message holds, by its number: parts of its own, texts, or numbers and how they are written.
Parts = Mapping[int, Any]  # Any: a Parts, or one of the four texts; recursive aliases would tell mypy no more
_TEXTS: Final = "texts"
_VARINTS: Final = "varints"
_FOURS: Final = "4 bytes each"
_EIGHTS: Final = "8 bytes each"

_CONTENTS: Final[Parts] = {
    1: _VARINTS, 2: _VARINTS, 3: _VARINTS, 4: _VARINTS, 5: _VARINTS, 6: _FOURS, 7: _EIGHTS, 8: _TEXTS,
}  # fmt: skip
_TENSOR: Final[Parts] = {3: _VARINTS, 4: {}, 5: _CONTENTS}

V2_REQUEST: Final[Parts] = {5: _TENSOR, 6: {2: {}}}
V2_RESPONSE: Final[Parts] = {5: _TENSOR}

_VALUES: Final[Parts] = {2: _VARINTS, 4: {1: _EIGHTS}, 5: {1: _VARINTS}, 6: {1: _TEXTS}}
PREDICT_REQUEST: Final[Parts] = {3: {2: _VALUES}}
STREAM_PREDICT_REQUEST: Final[Parts] = {2: PREDICT_REQUEST}

_NOT_LAST: Final = bytes(range(0x80, 0x100))  # bytes of a varint that is not complete with them
_LONGEST_VARINT: Final = 10
_LENGTH: Final = 2  # wire type of length-delimited fields


def too_heavy() -> TooHeavy:
    """What the sender of such a message is told."""
    return TooHeavy(
        f"A message holds more than {MOST // TEXT} texts, {MOST // NUMBER} numbers in lists or {MOST // FIELD} "
        "fields; send numbers as raw contents, and texts in several requests."
    )


def weigh(body: bytes, parts: Parts, most: int = MOST) -> int:
    """The weight of a message, without the elements of its raw tensors.

    :raises TooHeavy: when the weight exceeds `most`; the rest is not read then.
    :raises MalformedMessage: if what was read is not a protobuf message.
    """
    return _weigh(body, 0, len(body), parts, most)


def maybe_brief(body: bytes, parts: Parts) -> int | None:
    """The weight of a message that may be parsed on the event loop, where all calls wait for it.

    returns: None if it weighs more than BRIEF; no more of it is read than shows that.
    :raises MalformedMessage: as `weigh`.
    """
    try:
        return weigh(body, parts, BRIEF)
    except TooHeavy:
        return None


def weight_of_texts(named: Iterable[Any], raw: Iterable[bytes]) -> int:
    """The weight of the texts in raw BYTES tensors. named: the InferInputTensor or InferOutputTensor messages of
    `raw`."""
    return sum(_texts(tensor, len(contents)) for tensor, contents in zip(named, raw, strict=False)) * TEXT


def _texts(tensor: Any, size: int) -> int:
    if tensor.datatype != "BYTES":
        return 0
    try:
        return min(elements_of(tensor.shape), size // 4)  # four bytes before each text hold its length
    except ImpossibleShape:
        return 0  # whoever reads the shape refuses the message


def _weigh(body: bytes, at: int, end: int, parts: Parts, most: int) -> int:
    weight = 0
    for tag, _, begin, stop in fields(body, at, end, most + 1):
        inside = parts.get(tag >> 3)
        left = most - weight
        if isinstance(inside, str):
            is_list = tag & 7 == _LENGTH and inside != _TEXTS
            weight += NUMBER * _numbers(body, begin, stop, inside, left) if is_list else TEXT
        else:
            weight += FIELD
            if inside is not None and tag & 7 == _LENGTH and weight <= most:
                weight += _weigh(body, begin, stop, inside, most - weight)
        if weight > most:
            raise too_heavy()
    return weight


def _numbers(body: bytes, at: int, end: int, kind: str, most: int) -> int:
    """How many numbers a list has. If that is surely more than `most`, any number above `most`."""
    if kind != _VARINTS:
        return (end - at) // (4 if kind == _FOURS else 8)
    if end - at > most * _LONGEST_VARINT:
        return most + 1
    return len(body[at:end].translate(None, _NOT_LAST))
