"""Admin: tells clients that begin with HTTP/2 that this port speaks HTTP/1.1. May depend on asyncio alone.

Most often it is a gRPC client, or a gRPC probe, that was given the admin port in place of the gateway's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias, cast

from gateway.admin.connections import Connection, Connections

_PREFACE = b"PRI * HTTP/2.0\r\n"  # how HTTP/2 clients begin (RFC 9113 section 3.4)
_TEXT = b"this port is the admin plane and speaks HTTP/1.1; gRPC has a port of its own"
_HTTP_1_1_REQUIRED = 0x0D
# Without the SETTINGS that a server has to send first: C-core would take them for a success, and come again at once.
_GOAWAY = (
    (8 + len(_TEXT)).to_bytes(3, "big")
    + b"\x07\x00"
    + bytes(4)
    + bytes(4)
    + _HTTP_1_1_REQUIRED.to_bytes(4, "big")
    + _TEXT
)


Asked: TypeAlias = dict[asyncio.Protocol, Connection]


class FirstBytes(asyncio.Protocol):
    """Waits for enough bytes of a connection to tell its protocol, and passes HTTP/1.1 on to the server of that."""

    def __init__(self, http: Callable[[], asyncio.Protocol], connections: Connections, asked: Asked) -> None:
        """asked: gets the connection of each HTTP/1.1 protocol while it is open."""
        self._make_http = http
        self._connections = connections
        self._asked = asked
        self._transport: asyncio.Transport
        self._connection: Connection | None = None
        self._http: asyncio.Protocol | None = None
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connection = self._connections.maybe_add(self._transport)

    def data_received(self, data: bytes) -> None:
        if self._connection is None:
            return
        self._connection.head_begins()
        if self._http is not None:
            self._http.data_received(data)
            return
        self._seen += data
        if self._seen.startswith(_PREFACE):
            self._transport.write(_GOAWAY)
            self._transport.close()
        elif not _PREFACE.startswith(self._seen):
            seen, self._seen = self._seen, b""
            self._http = self._make_http()
            self._asked[self._http] = self._connection
            self._http.connection_made(self._transport)
            self._http.data_received(seen)

    def eof_received(self) -> bool | None:
        return self._http.eof_received() if self._http is not None else None

    def pause_writing(self) -> None:
        if self._http is not None:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._http is not None:
            self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._connection.gone()
        if self._http is not None:
            self._asked.pop(self._http, None)
            self._http.connection_lost(exc)
