"""Pure: how a caller is told when to try again, in the two ways that gRPC clients know.

sources: google/rpc/error_details.proto, `RetryInfo` and `QuotaFailure`, inside google/rpc/status.proto, `Status`, as
the value of `grpc-status-details-bin`; gRFC A6, `grpc-retry-pushback-ms`, which clients with a retry policy wait for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from gateway.errors import GatewayError, Overloaded, QuotaExceeded
from gateway.http2.hpack import Field, NeverIndexed
from gateway.rpc.metadata import Fields, legal_fields
from gateway.rpc.server import refusal
from gateway.types import Metadata

_TYPE: Final = b"type.googleapis.com/google.rpc.RetryInfo"
_QUOTA_TYPE: Final = b"type.googleapis.com/google.rpc.QuotaFailure"
_NANOS: Final = 1_000_000_000
_KEY: Final = "grpc-status-details-bin"
_KEPT: Final = 1024  # details of refusals; each has a caller's name and a text


def retry_trailers(error: GatewayError) -> Metadata:
    """Nothing, if it is neither overload nor a quota that ended the call."""
    if isinstance(error, QuotaExceeded):
        return ((_KEY, _quota_status(error.text, error.retry_after, error.subject, error.limit, error.reason)),)
    if not isinstance(error, Overloaded):
        return ()
    return ((_KEY, _status(error.text, _retry_info(error.retry_after))),)


def pushback_fields(error: GatewayError) -> Fields:
    """As `retry_trailers`, on the wire: this one is the protocol's own and no metadata."""
    if not isinstance(error, Overloaded):
        return ()
    return (NeverIndexed(b"grpc-retry-pushback-ms", b"%d" % max(1, round(error.retry_after * 1000))),)


def quota_fields(error: QuotaExceeded) -> Fields:
    """Both of them on the wire. Those of refusals that are alike are made once, since a refusal must cost little."""
    return _quota_fields(error.text, error.retry_after, error.subject, error.limit, error.reason)


@lru_cache(_KEPT)
def _quota_fields(text: str, retry_after: float, subject: str, limit: str, reason: str) -> Fields:
    error = QuotaExceeded(text, retry_after, subject, reason, limit)
    return (*legal_fields(retry_trailers(error)), *pushback_fields(error))


def quota_answer(error: QuotaExceeded) -> tuple[Field, ...]:
    """The whole answer to a call that one ends."""
    return _quota_answer(error.text, error.retry_after, error.subject, error.limit, error.reason)


@lru_cache(_KEPT)
def _quota_answer(text: str, retry_after: float, subject: str, limit: str, reason: str) -> tuple[Field, ...]:
    return refusal(QuotaExceeded.code, text, _quota_fields(text, retry_after, subject, limit, reason))


@lru_cache(_KEPT)
def _quota_status(text: str, retry_after: float, subject: str, limit: str, reason: str) -> bytes:
    """`QuotaFailure.Violation`: subject 1, description 2, quota_metric 4."""
    named = _bytes(1, subject.encode("utf-8", "replace"))
    violation = named + _bytes(2, limit.encode()) + _bytes(4, reason.encode())
    return _status(text, _retry_info(retry_after) + _detail(_QUOTA_TYPE, _bytes(1, violation)))


def _retry_info(seconds: float) -> bytes:
    nanos = int(seconds * _NANOS)
    return _detail(_TYPE, _bytes(1, _number(1, nanos // _NANOS) + _number(2, nanos % _NANOS)))


def _detail(type: bytes, value: bytes) -> bytes:
    return _bytes(3, _bytes(1, type) + _bytes(2, value))


def _status(text: str, details: bytes) -> bytes:
    shown = text.encode("utf-8", "replace")[:_MOST_TEXT]
    return _number(1, int(Overloaded.code)) + _bytes(2, shown) + details


_MOST_TEXT: Final = 1024  # bytes: a status travels in a header, whose size is limited


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
