"""HTTP/2 frames and what can be said of them: kinds, settings, errors, events. Source: RFC 9113 sections 4, 6, 7."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from gateway.http2.hpack import Field

HEADER: Final = 9  # bytes of a frame's header
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

FIRST_WINDOW: Final = 65_535  # bytes, of a connection and of a stream, until the peer says otherwise
MOST_WINDOW: Final = (1 << 31) - 1
MOST_ID: Final = (1 << 31) - 1
LEAST_FRAME: Final = 16_384  # bytes that every peer takes in a frame
MOST_FRAME: Final = (1 << 24) - 1


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

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
    """The peer broke the protocol so that the connection has to end, or what was asked for can't be done any more."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class EndedBy(Enum):
    """Who ended a stream."""

    BOTH = "both"  # had said all
    PEER = "peer"  # by RST_STREAM, or GOAWAY
    US = "us"  # by RST_STREAM, as our owner wished
    FAULT = "fault"  # by our RST_STREAM, for what the peer did wrong
    CONNECTION = "connection"  # it ended, and the stream with it


BOTH: Final = EndedBy.BOTH  # of nearly all; see `gateway.status.OK`


class Event:
    """Something that happened on a connection."""


class HeadersEvent(Event):
    """A header list came."""

    def __init__(self, stream_id: int, headers: tuple[Field, ...], end_stream: bool) -> None:
        self.stream_id = stream_id
        self.headers = headers
        self.end_stream = end_stream


class RequestReceived(HeadersEvent):
    """The head of a request."""


class ResponseReceived(HeadersEvent):
    """The head of an answer, after any that are only informational."""


class TrailersReceived(HeadersEvent):
    """The last header list of a stream."""


class HeadersDropped(Event):
    """A header list is larger than `limit` bytes, and its stream will end or be reset for it once all of it has come.

    Told again as more of its block comes; `size`: bytes of the block so far.
    """

    def __init__(self, stream_id: int, are_trailers: bool, limit: int, size: int) -> None:
        self.stream_id = stream_id
        self.are_trailers = are_trailers
        self.limit = limit
        self.size = size


class DataReceived(Event):
    """Bytes of a body, as they arrive. Each must be acknowledged, else the peer runs out of window."""

    def __init__(self, stream_id: int, data: bytes, end_stream: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.end_stream = end_stream


class TinyReceived(DataReceived):
    """The same, out of a frame so small that it has a price unless it brings a message's end; see `prices.TINY`."""


class StreamReset(Event):
    """The peer reset a stream. Its `StreamClosed` follows."""

    def __init__(self, stream_id: int, error_code: int) -> None:
        self.stream_id = stream_id
        self.error_code = error_code


class StreamClosed(Event):
    """Nothing more comes or goes on a stream. error_code: HTTP/2's; 0 if both ends had said all."""

    def __init__(self, stream_id: int, error_code: int, by: EndedBy = BOTH) -> None:
        self.stream_id = stream_id
        self.error_code = error_code
        self.by = by


class WindowUpdated(Event):
    """The peer takes more."""


class PingReceived(Event):
    """It is answered already."""


class PingAcknowledged(Event):
    """The answer to ours."""


class SettingsReceived(Event):
    """They are acknowledged already."""

    def __init__(self, settings: dict[int, int]) -> None:
        self.settings = settings


class GoAwayReceived(Event):
    """The peer looks at no stream beyond `last_stream_id`."""

    def __init__(self, last_stream_id: int, error_code: int, debug_data: bytes) -> None:
        self.last_stream_id = last_stream_id
        self.error_code = error_code
        self.debug_data = debug_data


class ConnectionClosed(Event):
    """A GOAWAY went or came, and the last stream has ended."""


WINDOW_UPDATED: Final = WindowUpdated()  # it says no more than that


def frame_head(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """RFC 9113 section 4.1."""
    return (length << 16 | kind << 8 | flags).to_bytes(5, "big") + stream_id.to_bytes(4, "big")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame whole."""
    return frame_head(len(payload), kind, flags, stream_id) + payload


def goaway_frame(last_stream_id: int, code: int, text: bytes = b"") -> bytes:
    """RFC 9113 section 6.8."""
    return frame(GOAWAY, 0, 0, last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + text)


def settings_frame(settings: dict[int, int]) -> bytes:
    """RFC 9113 section 6.5."""
    items = settings.items()
    return frame(SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in items))


def number(data: bytes, at: int) -> int:
    """The 32-bit number there."""
    return data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]
