"""v2 (pure): heads of messages on one stream, most of which are like the message before.

On one stream, the requests for a model differ only in the id and the raw tensors, and so do the answers. So the last
head is remembered with the bytes before and after its id; a message with the same bytes needs no other check. Any
other message is read by the functions of `peek`, with the same result.
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
_LONGEST: Final = 1024  # bytes before the raw tensors, at most, of a message whose head is remembered


class _Last:
    """The last head that can be remembered, with the bytes before and after its id."""

    __slots__ = ("_after", "_before", "_head", "_raw_tag")

    def __init__(self, raw_tag: int) -> None:
        self._raw_tag = raw_tag
        self._head: Head | None = None
        self._before = self._after = b""

    def maybe_like(self, body: bytes, start: int) -> Head | None:
        """The head of a message that begins at `start`, if only its id differs; None, or IndexError raised, if not."""
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
            None, 0, parameters,
        )  # fmt: skip

    def learn(self, body: bytes, head: Head) -> None:
        """Remember the head of a message that ends with `body`, if that is possible."""
        before = scalars(head.model_name, head.model_version, "")
        is_usual = body[head.start : head.front] == before + scalars("", "", head.id) and not head.strays
        is_short = head.raw - head.start <= _LONGEST
        if head.id and is_usual and is_short and head.end is None and is_raw(body, head.raw, self._raw_tag):
            self._head, self._before, self._after = head, before, body[head.front : head.raw]


class StreamRequestHeads:
    """Heads of the ModelInferRequests on one stream."""

    def __init__(self) -> None:
        self._last = _Last(RAW_INPUT)

    def peek(self, body: bytes) -> Head:
        """The head of a request. raises: as `peek_request`."""
        try:
            head = self._last.maybe_like(body, 0)
        except (IndexError, UnicodeDecodeError):
            head = None
        if head is None:
            head = peek_request(body)
            self._last.learn(body, head)
        return head


class StreamResponseHeads:
    """Heads of the ModelStreamInferResponses on one stream."""

    def __init__(self) -> None:
        self._last = _Last(RAW_OUTPUT)

    def peek(self, body: bytes) -> StreamHead:
        """The head of a response. raises: as `peek_stream_response`."""
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
