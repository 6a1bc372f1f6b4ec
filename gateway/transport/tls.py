"""I/O: TLS contexts of both sides. Whoever fails a handshake is told by an alert, and the owner by a word.

asyncio and uvloop close a connection whose handshake fails without sending the alert that OpenSSL has made. The object
for a server's side made here asks for more bytes instead, so that the alert is sent, and has the connection closed.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from gateway.http2 import strangers
from gateway.http2.strangers import ALPN

REASONS: Final = (
    *("no_certificate", "certificate", "version", "cipher", "peer", "plaintext", "timeout", "handshake"),
    *(ALPN, strangers.HTTP1, strangers.TLS, strangers.OTHER),
)
"""Why a connection is turned away before a call. Of TLS: `peer` is a client that refuses our certificate."""

WANTS_TLS: Final = "this port speaks gRPC over TLS, and the client does not use TLS"

PLAIN_TEXTS: Final = {
    strangers.HTTP1: "a client speaks HTTP/1 on the gRPC port",
    strangers.TLS: "a client speaks TLS on the gRPC port, which has no server.tls",
    strangers.OTHER: "what a client sends on the gRPC port is no HTTP/2",
    ALPN: "a client's TLS does not choose HTTP/2 (ALPN h2)",
}
"""By what a client speaks that begins no HTTP/2."""

_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_VERIFY_FAILED": "certificate",
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "WRONG_SSL_VERSION": "version",
    "NO_SHARED_CIPHER": "cipher",
    "NO_APPLICATION_PROTOCOL": ALPN,
}
"""Ours by OpenSSL's."""

_AS_CLIENT: Final = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS, or not on this port",
    "HTTP_REQUEST": "it does not speak TLS on this port",
    "CERTIFICATE_REQUIRED": "it wants a client certificate ('tls.cert' and 'tls.key' of the upstream)",
    "UNKNOWN_CA": "it does not know the authority of the client certificate",
    "BAD_CERTIFICATE": "it refuses the client certificate",
    "CERTIFICATE_EXPIRED": "it finds the client certificate expired",
    "PROTOCOL_VERSION": "it wants another version of TLS",
    "HANDSHAKE_FAILURE": "it refuses the handshake: it may want a client certificate, or speak no TLS on this port",
}
"""What it means for a client, by the end of OpenSSL's reason."""

Failed = Callable[[str, str], None]
"""Hears of a failed handshake: why, of `REASONS`, and a text for people."""

failed_handshake: ContextVar[Failed | None] = ContextVar("failed_handshake", default=None)
"""Of the connection whose handshake begins in this context."""


class _ServerSide(ssl.SSLObject):
    """Made by `ServerContext`."""

    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _failed: Failed | None
    _first = b""
    _has_failed = False

    def do_handshake(self) -> None:
        if self._has_failed:
            self._incoming.read()  # and do not keep what still comes
            raise ssl.SSLWantReadError
        if not self._first:
            arrived = self._incoming.read()
            self._incoming.write(arrived)
            self._first = arrived[:32]
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if self._failed is None:
                raise
            self._has_failed = True
            speaks = strangers.speaks(self._first)
            if speaks != strangers.TLS:
                self._outgoing.read()
                self._outgoing.write(strangers.answer_to(speaks, WANTS_TLS))
                self._failed("plaintext", WANTS_TLS)
            else:
                self._failed(reason_of(error), text_of(error))
            raise ssl.SSLWantReadError from error


class ServerContext(ssl.SSLContext):
    """Of a server: its handshakes tell what went wrong."""

    sslobject_class = _ServerSide

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **more: Any) -> ssl.SSLObject:
        """Any: the arguments are ssl's own."""
        made: Any = super().wrap_bio(incoming, outgoing, *args, **more)
        made._incoming, made._outgoing, made._failed = incoming, outgoing, failed_handshake.get()
        return made  # type: ignore[no-any-return]


def reason_of(error: ssl.SSLError) -> str:
    """Why a server's side has failed, as a metric's label."""
    reason = error.reason or ""
    return "peer" if "_ALERT_" in reason else _REASONS.get(reason, "handshake")


def text_of(error: ssl.SSLError) -> str:
    """OpenSSL's words, without its file and line."""
    return (error.reason or str(error)).replace("_", " ").lower()


def hint(error: ssl.SSLError) -> str:
    """What a failure means for a client, as far as it is known; with OpenSSL's words."""
    reason = error.reason or ""
    found = next((text for end, text in _AS_CLIENT.items() if reason.endswith(end)), "")
    return f"{found} ({text_of(error)})" if found else ""
