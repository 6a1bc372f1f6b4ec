"""gRPC messages: the 5-byte prefix, and compression with a bound.

Source: grpc `doc/PROTOCOL-HTTP2.md` (Length-Prefixed-Message), `doc/compression.md`.
"""

from __future__ import annotations

import zlib
from typing import Final

from gateway.status import Code
from gateway.wire.codes import CallFailed
from gateway.wire.limits import Limits

PREFIX: Final = 5  # one byte says whether the message is compressed, four its length
SMALL: Final = 4096  # bytes; a body up to this is joined with its prefix, a larger one is not copied for it
SMALL_PREFIXES: Final = tuple(length.to_bytes(PREFIX, "big") for length in range(SMALL + 1))
"""Of messages that are not compressed, by their length."""

ACCEPT_ENCODING: Final = b"identity,deflate,gzip"
_WINDOW_BITS: Final = {b"deflate": zlib.MAX_WBITS, b"gzip": zlib.MAX_WBITS | 16}


def prefix(length: int, compressed: bool = False) -> bytes:
    return (b"\x01" if compressed else b"\x00") + length.to_bytes(4, "big")


def read_prefix(data: bytes | bytearray, at: int, limit: int) -> tuple[int, bool]:
    """Length and compressed flag of the message whose prefix is at `at`.

    raises: CallFailed INTERNAL if the flag is neither 0 nor 1, RESOURCE_EXHAUSTED if the length is over `limit`.
    """
    flag = data[at]
    if flag > 1:
        raise CallFailed(Code.INTERNAL, f"Message flag {flag} is neither 0 nor 1")
    length = int.from_bytes(data[at + 1 : at + PREFIX], "big")
    if length > limit:
        raise CallFailed(
            Code.RESOURCE_EXHAUSTED, f"Message of {length} bytes is larger than the limit of {limit} bytes"
        )
    return length, flag == 1


def decompress(body: bytes, encoding: bytes, limits: Limits) -> bytes:
    """raises: CallFailed if the encoding is unknown, the body broken, or what it grows to beyond the limits."""
    if encoding in (b"", b"identity"):
        raise CallFailed(Code.INTERNAL, "Message is flagged as compressed, but no grpc-encoding was given")
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        raise CallFailed(Code.UNIMPLEMENTED, f"grpc-encoding {encoding.decode('latin-1')[:40]!r} is not supported")
    bound = min(limits.message_bytes, max(limits.inflate_floor, limits.inflate_ratio * len(body)))
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(body, bound + 1)
    except zlib.error as error:
        raise CallFailed(Code.INTERNAL, f"Message is not valid {encoding.decode()}") from error
    if len(plain) > bound:
        raise CallFailed(Code.RESOURCE_EXHAUSTED, f"Message grows beyond {bound} bytes when decompressed")
    if not inflater.eof or inflater.unused_data:
        raise CallFailed(Code.INTERNAL, f"Message is not exactly one {encoding.decode()} stream")
    return plain


def compress(body: bytes, encoding: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=_WINDOW_BITS[encoding])
    return deflater.compress(body) + deflater.flush()
