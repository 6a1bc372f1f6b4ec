"""The HTTP/2 engine, and the only place that knows which library it is.

`Engine` is everything that `wire` asks of it; a replacement must offer these methods and produce these events. Today it
is `ngh2`, a sans-IO binding of nghttp2: framing, HPACK, flow control, validation (RFC 9113 section 8) and its limits
against abuse come from there, and its connection is used as it is, so the hot path pays for no wrapper.

Learnt from its source and relied on (see `tests/wire/test_engine.py`):
- events also arise in `data_to_send` (a stream closes when its last frame is written);
- `acknowledge_received_data` must be called for every byte, also after the stream has closed: it returns the
  connection's window and frees the engine's own account;
- output is taken in pieces of `WRITE_SIZE`, so that one connection's does not grow without bound; what is little is
  taken without a limit, since the engine then copies each body once less;
- after an exception from `receive_data` the session is gone and can't write its own GOAWAY (`goaway_frame` can).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import ngh2
from ngh2 import (
    ConnectionClosed,
    DataReceived,
    ErrorCode,
    Event,
    GoAwayReceived,
    PingAcknowledged,
    Priority,
    RequestReceived,
    ResponseReceived,
    Setting,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from ngh2 import NeverIndexedHeader as NeverIndexed
from ngh2 import NGH2Error as EngineError

from gateway.wire.limits import Limits

__all__ = [
    "ConnectionClosed",
    "DataReceived",
    "Engine",
    "EngineError",
    "ErrorCode",
    "Event",
    "Field",
    "GoAwayReceived",
    "NeverIndexed",
    "PingAcknowledged",
    "RequestReceived",
    "ResponseReceived",
    "SettingsReceived",
    "StreamClosed",
    "StreamReset",
    "TrailersReceived",
    "WindowUpdated",
    "client_engine",
    "goaway_frame",
    "server_engine",
]

Field = tuple[bytes, bytes]
"""A header field. One of class `NeverIndexed` is sent so that no HPACK table ever holds its value."""

WRITE_SIZE = 131_072  # bytes per `data_to_send`; see above
TAKES_TURNS = Priority(incremental=True)
"""Without it a large answer goes out whole before a small one of a later stream. Servers only; a client can but send
large requests in small pieces."""
MAX_CONCURRENT_STREAMS = int(Setting.MAX_CONCURRENT_STREAMS)


class Engine(Protocol):
    """One endpoint's HTTP/2 connection."""

    def receive_data(self, data: bytes) -> None:
        """:raises EngineError: if the peer broke the protocol or a limit in a way that ends the connection."""

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""

    def data_to_send(self, amount: int | None = None) -> bytes: ...

    @property
    def want_write(self) -> bool:
        """Might `data_to_send` give anything? raises: EngineError if the connection has ended."""

    def send_request(self, headers: Iterable[Field], *, end_stream: bool = False) -> int:
        """Answers the new stream's id."""

    def send_response(self, stream_id: int, headers: Iterable[Field], *, end_stream: bool = False) -> None: ...

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool = False) -> None: ...

    def send_trailers(self, stream_id: int, headers: Iterable[Field]) -> None: ...

    def reset_stream(self, stream_id: int, error_code: int = 0x08) -> None: ...

    def set_stream_priority(self, stream_id: int, priority: Priority) -> bool: ...

    def acknowledge_received_data(self, amount: int, stream_id: int) -> None:
        """Give `amount` bytes of window back to the peer, on the stream and on the connection."""

    def queued_body_size(self, stream_id: int | None = None) -> int:
        """Bytes given to `send_data` that are not framed yet, of a stream or of all."""

    def set_local_window_size(self, window_size: int, *, stream_id: int = 0) -> None: ...

    def ping(self, opaque_data: bytes = ...) -> None: ...

    def send_shutdown_notice(self) -> None: ...

    def send_goaway(
        self, error_code: int = 0, *, last_stream_id: int | None = None, debug_data: bytes = b""
    ) -> None: ...

    def terminate_connection(self, error_code: int = 0, *, last_stream_id: int | None = None) -> None: ...


def server_engine(limits: Limits) -> Engine:
    """A connection that a client has opened; its first bytes to send are ready."""
    settings = {
        Setting.MAX_CONCURRENT_STREAMS: limits.max_streams,
        Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
        Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        Setting.NO_RFC7540_PRIORITIES: 1,  # and with it, TAKES_TURNS works
    }
    return _engine(ngh2.Role.SERVER, limits, settings)


def client_engine(limits: Limits) -> Engine:
    """A connection that we have opened; its first bytes to send are ready."""
    settings = {
        Setting.ENABLE_PUSH: 0,
        Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
        Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
    }
    return _engine(ngh2.Role.CLIENT, limits, settings)


def _engine(role: ngh2.Role, limits: Limits, settings: Mapping[Setting, int]) -> Engine:
    connection = ngh2.Connection(
        role,
        ngh2.Configuration(
            auto_window_update=False,
            max_inbound_header_list_size=limits.header_list_bytes_hard,
            max_inbound_header_count=limits.header_list_bytes_hard // 32,
            max_continuations=limits.max_continuations,
            max_outbound_ack=limits.max_queued_replies,
            stream_reset_rate_limit=(2 * limits.resets[0], 2 * limits.resets[1]),  # within one read; we count exactly
            glitch_rate_limit=limits.glitches,
        ),
    )
    connection.initiate_connection(settings)
    connection.set_local_window_size(limits.connection_window)
    return connection


def goaway_frame(last_stream_id: int, code: int, text: bytes = b"") -> bytes:
    """A GOAWAY for a connection whose engine has given up (RFC 9113 section 6.8)."""
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + text
    return len(payload).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + payload
