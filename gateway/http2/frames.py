"""HTTP/2 frames, settings, error codes, and the events that frames cause. Source: RFC 9113 sections 4, 6, 7."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from mypy_extensions import i64, mypyc_attr

from gateway.http2.hpack import Field

HEADER: Final = 9  # bytes of a frame header
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x01
END_STREAM: Final = 0x01
END_HEADERS: Final = 0x04
PADDED: Final = 0x08
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6
NO_RFC7540_PRIORITIES: Final = 9
TRUE_BINARY_METADATA: Final = 0xFE03
"""Only gRPC's C core sends it, of which Triton is made. source: grpc, chttp2 `http2_settings.h`"""

DEFAULT_WINDOW: Final = 65_535  # bytes, of the connection and of each stream, until the peer changes them
MOST_WINDOW: Final = (1 << 31) - 1
MOST_ID: Final = (1 << 31) - 1
LEAST_FRAME: Final = 16_384  # bytes of payload that every peer takes in a frame
MOST_FRAME: Final = (1 << 24) - 1


GOAWAY_TEXT: Final = 100  # bytes of what a GOAWAY says in words


class ErrorCode(IntEnum):
    """Error codes (RFC 9113 section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class EngineError(Exception):
    """The peer made a connection error, or the engine's owner asked for what is no longer possible."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class EndedBy(Enum):
    """Which end closed a stream, and how."""

    BOTH = "both"  # by END_STREAM of both ends
    PEER = "peer"  # by the peer's RST_STREAM or GOAWAY
    US = "us"  # by our RST_STREAM, which the engine's owner asked for
    FAULT = "fault"  # by our RST_STREAM, for an error of the peer's
    CONNECTION = "connection"  # by the end of the connection


BOTH: Final = EndedBy.BOTH  # a global is faster than an enum's attribute, and nearly every stream ends so

# None of these is part of a cycle, so the collector of cycles need not know them, which makes them cheaper.


@mypyc_attr(acyclic=True)
class Event:
    """Something that happened on a connection."""


@mypyc_attr(acyclic=True)
class HeadersEvent(Event):
    """A header list arrived."""

    def __init__(self, stream_id: int, headers: tuple[Field, ...], end_stream: bool) -> None:
        self.stream_id = stream_id
        self.headers = headers
        self.end_stream = end_stream


@mypyc_attr(acyclic=True)
class RequestReceived(HeadersEvent):
    """A request's header list."""


@mypyc_attr(acyclic=True)
class ResponseReceived(HeadersEvent):
    """A response's header list. Informational ones (1xx) cause no event."""


@mypyc_attr(acyclic=True)
class TrailersReceived(HeadersEvent):
    """A stream's trailers."""


@mypyc_attr(acyclic=True)
class HeadersDropped(Event):
    """A header list is larger than `limit` bytes. Its stream will end or be reset when all of the list has arrived.

    The event repeats as more of the block arrives. size: bytes of the block so far.
    """

    def __init__(self, stream_id: int, are_trailers: bool, limit: int, size: int) -> None:
        self.stream_id = stream_id
        self.are_trailers = are_trailers
        self.limit = limit
        self.size = size


@mypyc_attr(acyclic=True)
class DataReceived(Event):
    """A part of a body. The owner returns its bytes with `Engine.acknowledge`, or the peer runs out of window."""

    def __init__(self, stream_id: int, data: bytes, end_stream: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.end_stream = end_stream


@mypyc_attr(acyclic=True)
class TinyReceived(DataReceived):
    """A part of a body from a frame below `prices.TINY` bytes, which has a price unless it completes a message."""


@mypyc_attr(acyclic=True)
class StreamReset(Event):
    """The peer reset a stream. `StreamClosed` follows."""

    def __init__(self, stream_id: int, error_code: int) -> None:
        self.stream_id = stream_id
        self.error_code = error_code


@mypyc_attr(acyclic=True)
class StreamClosed(Event):
    """A stream is closed.

    error_code:  of RST_STREAM or GOAWAY; 0 if both ends sent END_STREAM.
    fault:       what the peer sent that is wrong, "" unless `by` is FAULT.
    """

    def __init__(self, stream_id: int, error_code: int, by: EndedBy = BOTH, fault: str = "") -> None:
        self.stream_id = stream_id
        self.error_code = error_code
        self.by = by
        self.fault = fault


@mypyc_attr(acyclic=True)
class WindowUpdated(Event):
    """The peer sent a WINDOW_UPDATE."""


@mypyc_attr(acyclic=True)
class PingReceived(Event):
    """The peer sent a PING. The engine has answered it."""


@mypyc_attr(acyclic=True)
class PingAcknowledged(Event):
    """The peer answered our PING."""


@mypyc_attr(acyclic=True)
class SettingsReceived(Event):
    """The peer sent SETTINGS. The engine has acknowledged them."""

    def __init__(self, settings: dict[int, int]) -> None:
        self.settings = settings


@mypyc_attr(acyclic=True)
class GoAwayReceived(Event):
    """The peer sent a GOAWAY: it ignores streams beyond `last_stream_id`."""

    def __init__(self, last_stream_id: int, error_code: int, debug_data: bytes) -> None:
        self.last_stream_id = last_stream_id
        self.error_code = error_code
        self.debug_data = debug_data


@mypyc_attr(acyclic=True)
class ConnectionClosed(Event):
    """A GOAWAY was sent or received, and the last stream has closed."""


WINDOW_UPDATED: Final = WindowUpdated()  # the event has no attributes, so one object serves


def frame_start(length: int, kind: int, flags: int) -> bytes:
    """A frame header (RFC 9113 section 4.1) up to the number of its stream."""
    return (length << 16 | kind << 8 | flags).to_bytes(5, "big")


def frame_starts(most: int, kind: int, flags: int) -> list[bytes]:
    """All of up to `most` bytes, by length: it costs ten times as much to make one as to look it up."""
    return [frame_start(length, kind, flags) for length in range(most + 1)]


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """A frame header (RFC 9113 section 4.1)."""
    return frame_start(length, kind, flags) + stream_id.to_bytes(4, "big")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame with its payload (RFC 9113 section 4.1)."""
    return frame_header(len(payload), kind, flags, stream_id) + payload


def goaway_frame(last_stream_id: int, code: int, text: bytes = b"") -> bytes:
    """A GOAWAY frame (RFC 9113 section 6.8)."""
    return frame(GOAWAY, 0, 0, last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + text)


def printable(text: bytes) -> str:
    """What a peer says in words, for the log: the first printable characters of it."""
    said = text[:GOAWAY_TEXT].decode("ascii", "replace")
    return "".join([character for character in said if character.isprintable()])


def settings_frame(settings: dict[int, int]) -> bytes:
    """A SETTINGS frame (RFC 9113 section 6.5)."""
    items = settings.items()
    return frame(SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in items))


def number(data: bytes, at: i64) -> int:
    """The 32-bit number, in network byte order, at `at`."""
    return data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]
