"""Peers that do not speak HTTP/2: what their first bytes are, and what they can be told in their own protocol.

Most often somebody has confused two ports, or TLS with none. A GOAWAY frame would tell them nothing.
"""

from __future__ import annotations

from typing import Final

from gateway.http2.frames import PREFACE, EngineError, ErrorCode, goaway_frame

HTTP1: Final = "http1"
HTTP2: Final = "http2"
TLS: Final = "tls"
OTHER: Final = "other"
ALPN: Final = "alpn"  # a client whose TLS does not choose HTTP/2

_TLS_HANDSHAKE: Final = b"\x16"  # the type of the record that a ClientHello is in (RFC 8446 section 5.1)
_TLS_ALERT: Final = b"\x15"
_HANDSHAKE_FAILURE: Final = _TLS_ALERT + b"\x03\x01\x00\x02\x02\x28"  # fatal (RFC 8446 section 6)
_LONGEST_METHOD: Final = 20  # letters before the first space of an HTTP/1 request


class NotHttp2(EngineError):
    """The peer speaks something else."""

    def __init__(self, speaks: str, text: str) -> None:
        super().__init__(ErrorCode.PROTOCOL_ERROR, text)
        self.speaks = speaks


def speaks(first: bytes) -> str:
    """What a client that has begun with these bytes speaks. first: one byte may be all."""
    if first.startswith(_TLS_HANDSHAKE):
        return TLS
    if first and (first.startswith(PREFACE) or PREFACE.startswith(first)):
        return HTTP2
    method = first[:_LONGEST_METHOD].partition(b" ")[0]
    return HTTP1 if method.isalpha() and method.isupper() else OTHER


def not_http2(first: bytes) -> NotHttp2:
    """Of a client that has begun with these bytes."""
    what = {HTTP1: "it speaks HTTP/1", TLS: "it speaks TLS"}
    found = speaks(first)
    return NotHttp2(found, f"the connection does not begin with the HTTP/2 preface: {what.get(found, 'unknown bytes')}")


def maybe_not_http2(first: bytes) -> NotHttp2 | None:
    """Of a server that has answered the preface with these bytes, if what it speaks can be told."""
    if first.startswith(b"HTTP/1."):
        text = "it answers in HTTP/1, so this is no gRPC port (Triton's is 8001, its HTTP port 8000)"
        return NotHttp2(HTTP1, text)
    if first.startswith((_TLS_ALERT + b"\x03", _TLS_HANDSHAKE + b"\x03")):
        return NotHttp2(TLS, "it speaks TLS, and the upstream has no 'tls'")
    return None


def answer_to(found: str, text: str) -> bytes:
    """What a client can read that speaks this, before the connection closes. text: ASCII, says what is wrong.

    Empty if there is nothing that it would understand.
    """
    said = text.encode("ascii", "replace")
    if found == HTTP1:
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(said) + 1}\r\n\r\n".encode() + said + b"\n"
    if found == HTTP2:  # and no SETTINGS before: gRPC's clients would take it for a success, and come again at once
        return goaway_frame(0, ErrorCode.INADEQUATE_SECURITY, said)
    return _HANDSHAKE_FAILURE if found == TLS else b""
