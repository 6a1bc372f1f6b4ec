"""Admin: who comes with HTTP/2 is told that this port speaks HTTP/1.1. May depend on asyncio alone.

Most often it is a gRPC client, or a gRPC probe, that was given the admin port in place of the gateway's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n"  # how such a client begins; source: RFC 9113, section 3.4
_TEXT = b"this port is the admin plane and speaks HTTP/1.1; gRPC has a port of its own"
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # an empty frame, which a server sends first
_PATIENCE_SECONDS = 30.0
_HTTP_1_1_REQUIRED = 0x0D
_GOAWAY = (
    (8 + len(_TEXT)).to_bytes(3, "big")
    + b"\x07\x00"
    + bytes(4)
    + bytes(4)
    + _HTTP_1_1_REQUIRED.to_bytes(4, "big")
    + _TEXT
)


class FirstBytes(asyncio.Protocol):
    """Waits for enough of a connection to know what it is, then leaves it to the HTTP/1.1 server."""

    def __init__(self, http: Callable[[], asyncio.Protocol]) -> None:
        self._http = http
        self._transport: asyncio.Transport
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # What is never said costs a descriptor; the HTTP server has patience of its own for what comes after.
        self._late = asyncio.get_running_loop().call_later(_PATIENCE_SECONDS, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._seen.startswith(_PREFACE):
            self._transport.write(_SETTINGS + _GOAWAY)
            self._transport.close()
        elif not _PREFACE.startswith(self._seen):
            self._late.cancel()
            protocol = self._http()
            self._transport.set_protocol(protocol)
            protocol.connection_made(self._transport)
            protocol.data_received(self._seen)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
