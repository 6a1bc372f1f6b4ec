"""v2 (pure): the heads of messages on one stream, of which most are like the one before.

What a caller sends on a stream, and what one model answers, differs from message to message in the id and the raw
tensors only. So the last head is kept with the bytes around its id; a message with the same bytes there needs no other
look. Anything else is read by the functions of `peek`, which say the same of every message.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import MalformedMessage
from gateway.v2.peek import (
    RAW_INPUT,
    RAW_OUTPUT,
    Head,
    StreamHead,
    is_raw,
    peek_request,
    peek_stream_response,
    read_varint,
    scalars,
)

_ID = 0x1A
_STREAM_RESPONSE: Final = 0x12
_LONGEST: Final = 1024  # bytes up to the raw tensors that are kept; models have a few tensors with short names


class _Last:
    """The head of the last message that can have likes, and what surrounds its id."""

    __slots__ = ("_after", "_before", "_head", "_raw_tag")

    def __init__(self, raw_tag: int) -> None:
        self._raw_tag = raw_tag
        self._head: Head | None = None
        self._before = self._after = b""

    def maybe_like(self, body: bytes, start: int) -> Head | None:
        """The head of a message that begins at `start`, if it is like the last one. raises: IndexError if it is not."""
        last, before = self._head, self._before
        if last is None or not body.startswith(before, start):
            return None
        at = start + len(before)
        size = body[at + 1]
        if body[at] != _ID or not 0 < size < 0x80:
            return None
        front = at + 2 + size
        raw = front + len(self._after)
        if not body.startswith(self._after, front) or not is_raw(body, raw, self._raw_tag):
            return None
        id = str(body[at + 2 : front], "utf-8")
        parameters = last._parameters
        return Head(
            last.model_name, last.model_version, id, last.has_tensors, last.entries, start, front, None, [], raw, None,
            None, parameters,
        )  # fmt: skip

    def learn(self, body: bytes, head: Head) -> None:
        """head: of a message that ends where the bytes do."""
        before = scalars(head.model_name, head.model_version, "")
        is_usual = body[head.start : head.front] == before + scalars("", "", head.id) and not head.strays
        is_short = head.raw - head.start <= _LONGEST
        if head.id and is_usual and is_short and head.end is None and is_raw(body, head.raw, self._raw_tag):
            self._head, self._before, self._after = head, before, body[head.front : head.raw]


class StreamRequestHeads:
    """Of ModelInferRequests."""

    def __init__(self) -> None:
        self._last = _Last(RAW_INPUT)

    def peek(self, body: bytes) -> Head:
        """As `peek_request`."""
        try:
            head = self._last.maybe_like(body, 0)
        except (IndexError, UnicodeDecodeError):
            head = None
        if head is None:
            head = peek_request(body)
            self._last.learn(body, head)
        return head


class StreamResponseHeads:
    """Of ModelStreamInferResponses."""

    def __init__(self) -> None:
        self._last = _Last(RAW_OUTPUT)

    def peek(self, body: bytes) -> StreamHead:
        """As `peek_stream_response`."""
        try:
            head = self._maybe_like(body)
        except (IndexError, UnicodeDecodeError, MalformedMessage):
            head = None
        if head is not None:
            return StreamHead("", head, b"")
        found = peek_stream_response(body)
        if found.response is not None and not found.error and not found.rest:
            self._last.learn(body, found.response)
        return found

    def _maybe_like(self, body: bytes) -> Head | None:
        if body[0] != _STREAM_RESPONSE:
            return None
        size, start = body[1], 2
        if size > 0x7F:
            size, start = read_varint(body, 1)
        return self._last.maybe_like(body, start) if start + size == len(body) else None
