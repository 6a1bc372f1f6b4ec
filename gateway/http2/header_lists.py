"""Checks of header lists: what HTTP/2 calls malformed. Whether a valid one is gRPC, `rpc` decides. Pure.

Source: RFC 9113 sections 8.1 to 8.3, RFC 9110 section 5.5.
"""

from __future__ import annotations

from typing import Final

from gateway.http2.hpack import Field, NeverIndexed

_NAME_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_BAD_VALUE_BYTES: Final = bytes([*range(0x09), *range(0x0A, 0x20), 0x7F])
_BAD_PSEUDO_BYTES: Final = bytes([*range(0x21), 0x7F])
_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AUTHORITY_BYTES: Final = _LETTERS + b"0123456789-._~!$&'()*+,;=:[]%"  # none of a user's, which HTTP/2 forbids there
_SCHEME_BYTES: Final = _LETTERS + b"0123456789+-."  # RFC 3986 section 3.1
_OF_ONE_HOP: Final = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_REQUEST: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_RESPONSE: Final = frozenset((b":status",))
_NONE: Final[frozenset[bytes]] = frozenset()
_LONGEST_LENGTH: Final = 18  # digits of a content-length


class Malformed(Exception):
    """The list makes its message malformed, so its stream has to be reset (RFC 9113 section 8.1.1)."""


class HeaderList:
    """A valid header list."""

    def __init__(self, fields: tuple[Field, ...], length: int, is_informational: bool = False) -> None:
        self.fields = fields  # without white space around values but texts, which HTTP/2 forbids and some clients send
        self.length = length  # content-length; -1 if none
        self.is_informational = is_informational


TOO_LARGE: Final = HeaderList((), -1)  # stands for a list that was dropped


_MAY_END_IN_SPACES: Final = b"grpc-message"  # gRPC escapes no spaces, and a text may end in one (Triton's do)


def is_authority(value: bytes) -> bool:
    """Has it only characters that an authority may have? (RFC 3986 section 3.2)"""
    return not value.translate(None, _AUTHORITY_BYTES)


def checked_request(fields: tuple[Field, ...]) -> HeaderList:
    """Check a request's fields (RFC 9113 section 8.3.1). raises: Malformed."""
    pseudo, fields, length = _read(fields, _REQUEST)
    method, path, authority = pseudo.get(b":method", b""), pseudo.get(b":path", b""), pseudo.get(b":authority", b"")
    if not is_authority(authority):
        raise Malformed("a bad :authority")
    if method == b"CONNECT":
        if b":scheme" in pseudo or b":path" in pseudo or not authority:
            raise Malformed("CONNECT has an :authority, no :scheme and no :path")
    elif not method or not pseudo.get(b":scheme") or not path:
        raise Malformed("a request has a :method, a :scheme and a :path")
    elif not pseudo[b":scheme"][:1].isalpha() or pseudo[b":scheme"].translate(None, _SCHEME_BYTES):
        raise Malformed("a bad :scheme")
    elif not path.startswith(b"/") and (path, method) != (b"*", b"OPTIONS"):
        raise Malformed("a :path begins with a slash")
    return HeaderList(fields, length)


def checked_response(fields: tuple[Field, ...]) -> HeaderList:
    """Check a response's fields (RFC 9113 section 8.3.2). raises: Malformed."""
    pseudo, fields, length = _read(fields, _RESPONSE)
    status = pseudo.get(b":status", b"")
    if len(status) != 3 or not status.isdigit() or status == b"101":
        raise Malformed("a response has a :status of three digits")
    return HeaderList(fields, length, is_informational=status[0] == 0x31)


def checked_trailers(fields: tuple[Field, ...]) -> HeaderList:
    """Check trailers (RFC 9113 section 8.1). raises: Malformed."""
    _, fields, _ = _read(fields, _NONE)
    return HeaderList(fields, -1)


def _read(fields: tuple[Field, ...], known: frozenset[bytes]) -> tuple[dict[bytes, bytes], tuple[Field, ...], int]:
    """The pseudo-header fields, all fields, and the content-length."""
    pseudo: dict[bytes, bytes] = {}
    length, are_regular, is_padded = -1, False, False
    for name, value in fields:
        if name.startswith(b":"):
            if are_regular or name in pseudo or name not in known or value.translate(None, _BAD_PSEUDO_BYTES) != value:
                raise Malformed("a pseudo-header field that is wrong here")
            pseudo[name] = value
            continue
        are_regular = True
        if not name or name.translate(None, _NAME_BYTES) or value.translate(None, _BAD_VALUE_BYTES) != value:
            raise Malformed("a header field with characters that are not allowed")
        if name in _OF_ONE_HOP or (name == b"te" and value.strip() != b"trailers"):
            raise Malformed("a header field of HTTP/1")
        if name == b"content-length":
            length = _length(value, length)
        is_padded = is_padded or (value.strip(b" \t") != value and name != _MAY_END_IN_SPACES)
    return pseudo, (_stripped(fields) if is_padded else fields), length


def _length(value: bytes, before: int) -> int:
    if not value.isdigit() or len(value) > _LONGEST_LENGTH or before not in (-1, int(value)):
        raise Malformed("a content-length that is not a number, or differs from another")
    return int(value)


def _stripped(fields: tuple[Field, ...]) -> tuple[Field, ...]:
    stripped: list[Field] = []
    for field in fields:
        name, value = field
        if name != _MAY_END_IN_SPACES:
            value = value.strip(b" \t")
        if isinstance(field, NeverIndexed):
            stripped.append(NeverIndexed(name, value))
        else:
            stripped.append((name, value))
    return tuple(stripped)
