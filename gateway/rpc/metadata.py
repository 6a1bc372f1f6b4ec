"""Header fields and what gRPC says in them: metadata, timeouts, status messages.

Source: grpc `doc/PROTOCOL-HTTP2.md`.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from gateway.http2.hpack import Field, NeverIndexed
from gateway.types import Metadata, MetadataValue

Fields = Sequence[Field]

_KEY_BYTES: Final = b"abcdefghijklmnopqrstuvwxyz0123456789_-."
_BASE64_BYTES: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=,"
_CONTROL_BYTES: Final = bytes([*range(0x09), *range(0x0A, 0x20), 0x7F])  # HTTP allows the tab (RFC 9110 section 5.5)
_MESSAGE_SAFE: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

_OUTER_SPACES: Final = re.compile(rb"^ +| +$")

_RESERVED: Final = frozenset(
    b"te content-type content-length host connection keep-alive proxy-connection transfer-encoding upgrade trailer "
    b"grpc-timeout grpc-encoding grpc-accept-encoding grpc-status grpc-message "
    b"grpc-previous-rpc-attempts grpc-retry-pushback-ms".split()
)
"""Fields of one hop or of the protocol; they are not metadata."""

MOST_MESSAGE: Final = 32_768
"""Largest `grpc-message` in bytes: half of the header list that most peers accept. Texts repeat what callers wrote."""

_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def is_metadata(name: bytes) -> bool:
    return name not in _RESERVED and not name.startswith(b":")


def is_legal(name: bytes, value: bytes) -> bool:
    """May this field be handed to other peers as metadata?

    Names and `-bin` values must be as C-core requires, which else fails the call. Other values must be as HTTP
    requires: gRPC's own API sends only ASCII, but every peer takes text of any encoding (Triton 2.51 does).
    """
    if not name or name.translate(None, _KEY_BYTES):
        return False
    if name.endswith(b"-bin"):
        return not value.translate(None, _BASE64_BYTES) and _decodes(value)
    return value.translate(None, _CONTROL_BYTES) == value


def _decodes(value: bytes) -> bool:
    try:
        _decode_binary(value)
    except ValueError:
        return False
    return True


def _decode_binary(value: bytes) -> list[bytes]:
    """The values of a `-bin` field, which may be joined by commas, and padded or not."""
    return [
        b64decode(part.rstrip(b"=") + b"=" * (-len(part.rstrip(b"=")) % 4), validate=True) for part in value.split(b",")
    ]


def text_of(value: bytes) -> str:
    """A value as text for people: UTF-8, else Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def metadata_from(fields: Iterable[Field]) -> list[tuple[str, MetadataValue]]:
    """The metadata among `fields`, in order. A value that is not UTF-8 stays bytes, as `fields_from` needs it.

    raises: ValueError if a field is not legal.
    """
    found: list[tuple[str, MetadataValue]] = []
    for name, value in fields:
        if is_metadata(name):
            key = name.decode("ascii")
            if name.endswith(b"-bin"):
                found.extend((key, part) for part in _decode_binary(value))
            else:
                try:
                    found.append((key, value.decode()))
                except UnicodeDecodeError:
                    found.append((key, value))
    return found


def fields_from(metadata: Metadata | None) -> list[Field]:
    """Metadata as never-indexed fields.

    raises: ValueError if a key or value is not legal or the key is reserved.
    """
    fields: list[Field] = []
    for key, value in metadata or ():
        name = key.encode("utf-8")
        if name.endswith(b"-bin"):
            raw = b64encode(value if isinstance(value, bytes) else value.encode("utf-8")).rstrip(b"=")
        else:
            raw = value if isinstance(value, bytes) else value.encode("utf-8")
        if not is_metadata(name) or not is_legal(name, raw):
            raise ValueError(
                f"metadata {key!r} is reserved, or its key or value has characters that gRPC does not allow"
            )
        fields.append(NeverIndexed(name, raw))
    return fields


def legal_fields(metadata: Metadata) -> list[Field]:
    """As `fields_from`, but illegal pairs are left out: a transport may accept what a peer does not."""
    fields: list[Field] = []
    for pair in metadata:
        with suppress(ValueError):
            fields += fields_from([pair])
    return fields


def encode_message(text: str) -> bytes:
    """A status message, percent-encoded for `grpc-message`, and cut at MOST_MESSAGE bytes.

    Spaces at its ends are encoded too, since HTTP has none around a field's value (RFC 9110 section 5.5).
    """
    encoded = quote_from_bytes(text[:MOST_MESSAGE].encode("utf-8", "surrogatepass"), safe=_MESSAGE_SAFE).encode("ascii")
    if encoded[:1] == b" " or encoded[-1:] == b" ":
        encoded = _OUTER_SPACES.sub(lambda spaces: b"%20" * len(spaces[0]), encoded)
    if len(encoded) <= MOST_MESSAGE:
        return encoded
    cut = encoded[: MOST_MESSAGE - 3]
    escape = cut.find(b"%", -2)
    return (cut if escape < 0 else cut[:escape]) + b"..."


def decode_message(value: bytes) -> str:
    """The text of a `grpc-message`. Broken escapes stay as they are: no status may be lost over its text."""
    return unquote_to_bytes(value).decode("utf-8", "replace")


def parse_timeout(value: bytes) -> float:
    """The seconds of a `grpc-timeout`.

    raises: ValueError unless it is one to eight digits and a unit.
    """
    digits, unit = value[:-1], _UNITS.get(value[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        raise ValueError("bad grpc-timeout")
    return int(digits) * unit


def format_timeout(seconds: float) -> bytes:
    """A `grpc-timeout`, rounded up, in the finest unit that fits eight digits."""
    if seconds <= 0:
        return b"0n"
    if seconds < 99:
        return b"%du" % -int(-seconds * 1e6 // 1)
    if seconds < 99_999:
        return b"%dm" % -int(-seconds * 1e3 // 1)
    return b"%dS" % min(99_999_999, -int(-seconds // 1))
