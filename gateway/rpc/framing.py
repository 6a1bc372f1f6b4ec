"""gRPC messages: the 5-byte prefix, and compression in slices.

Source: grpc `doc/PROTOCOL-HTTP2.md` (Length-Prefixed-Message), `doc/compression.md`.
"""

from __future__ import annotations

import zlib
from typing import Final

from gateway.http2.limits import Limits
from gateway.rpc.codes import CallFailed
from gateway.status import Code

PREFIX: Final = 5  # bytes: a compressed flag and a length of four bytes
SMALL: Final = 4096  # bytes; a larger body is not copied to join it with its prefix
SMALL_PREFIXES: Final = tuple(length.to_bytes(PREFIX, "big") for length in range(SMALL + 1))
"""Prefixes of messages that are not compressed, by their length."""

ACCEPT_ENCODING: Final = b"identity,deflate,gzip"
_INPUT: Final = 65_536  # bytes given to zlib at once, since it copies what it leaves
_SLICE: Final = 1 << 20
_WINDOW_BITS: Final = {b"deflate": zlib.MAX_WBITS, b"gzip": zlib.MAX_WBITS | 16}


def prefix(length: int, compressed: bool = False) -> bytes:
    return (b"\x01" if compressed else b"\x00") + length.to_bytes(4, "big")


def read_prefix(data: bytes | bytearray, at: int, limit: int) -> tuple[int, bool]:
    """The length and the compressed flag of the message whose prefix is at `at`.

    raises: CallFailed INTERNAL if the flag is neither 0 nor 1, RESOURCE_EXHAUSTED if the length is over `limit`.
    """
    flag = data[at]
    if flag > 1:
        raise CallFailed(Code.INTERNAL, f"Message flag {flag} is neither 0 nor 1")
    length = int.from_bytes(data[at + 1 : at + PREFIX], "big")
    if length > limit:
        raise CallFailed(
            Code.RESOURCE_EXHAUSTED,
            f"Message of {length} bytes is larger than the limit of {limit} bytes (max_message_bytes)",
        )
    return length, flag == 1


class Inflater:
    """Inflates one message in slices, so that other work can run between them."""

    def __init__(self, body: bytes, encoding: bytes, limit: int) -> None:
        """limit: largest plain size in bytes. raises: CallFailed UNIMPLEMENTED if the encoding is not known."""
        if encoding in (b"", b"identity"):
            raise CallFailed(Code.INTERNAL, "Message is flagged as compressed, but no grpc-encoding was given")
        bits = _WINDOW_BITS.get(encoding)
        if bits is None:
            raise CallFailed(Code.UNIMPLEMENTED, f"grpc-encoding {encoding.decode('latin-1')[:40]!r} is not supported")
        self.body = b""  # the plain message, once it is complete
        self.size = 0  # plain bytes made so far
        self._encoding = encoding.decode()
        self._limit = limit
        self._inflater = zlib.decompressobj(bits)
        self._compressed = memoryview(body)
        self._at = 0
        self._parts: list[bytes] = []

    def step(self, most: int) -> bool:
        """Make up to `most` plain bytes more. Returns True when `body` is complete.

        raises: CallFailed if the message is broken, or larger than the limit.
        """
        until = self.size + most
        while not self._inflater.eof and self.size < until:
            self._inflate(min(until, self._limit + 1) - self.size)
        if not self._inflater.eof:
            return False
        if self._inflater.unused_data or self._at < len(self._compressed):
            raise self._not_one_stream()
        self.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        return True

    def _inflate(self, most: int) -> None:
        inflater = self._inflater
        given: bytes | memoryview = inflater.unconsumed_tail
        if not given:
            given = self._compressed[self._at : self._at + _INPUT]
            self._at += len(given)
        try:
            made = inflater.decompress(given, most)
        except zlib.error as error:
            raise CallFailed(Code.INTERNAL, f"Message is not valid {self._encoding}") from error
        if made:
            self.size += len(made)
            self._parts.append(made)
            if self.size > self._limit:
                self._parts.clear()  # frees them, even if the error is kept
                raise CallFailed(Code.RESOURCE_EXHAUSTED, f"Message grows beyond {self._limit} bytes when decompressed")
        elif not given and not inflater.eof:
            raise self._not_one_stream()

    def _not_one_stream(self) -> CallFailed:
        return CallFailed(Code.INTERNAL, f"Message is not exactly one {self._encoding} stream")


def decompress(body: bytes, encoding: bytes, limits: Limits) -> bytes:
    """The plain message, made without pause.

    raises: CallFailed if the encoding is unknown, the body broken, or the message larger than `limits` allow.
    """
    inflater = Inflater(body, encoding, limits.message_bytes)
    while not inflater.step(_SLICE):
        pass
    return inflater.body


def compress(body: bytes, encoding: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=_WINDOW_BITS[encoding])
    return deflater.compress(body) + deflater.flush()
