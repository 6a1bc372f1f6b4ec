"""Pure: how a caller is told when to try again, in the two ways that gRPC clients know.

sources: google/rpc/error_details.proto, `RetryInfo` and `QuotaFailure`, inside google/rpc/status.proto, `Status`, as
the value of `grpc-status-details-bin`; gRFC A6, `grpc-retry-pushback-ms`, which clients with a retry policy wait for.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import GatewayError, Overloaded, QuotaExceeded
from gateway.http2.hpack import NeverIndexed
from gateway.rpc.metadata import Fields
from gateway.types import Metadata

_TYPE: Final = b"type.googleapis.com/google.rpc.RetryInfo"
_QUOTA_TYPE: Final = b"type.googleapis.com/google.rpc.QuotaFailure"
_NANOS: Final = 1_000_000_000


def retry_trailers(error: GatewayError) -> Metadata:
    """Nothing, if it is neither overload nor a quota that ended the call."""
    if not isinstance(error, Overloaded):
        return ()
    nanos = int(error.retry_after * _NANOS)
    duration = _number(1, nanos // _NANOS) + _number(2, nanos % _NANOS)
    details = _bytes(3, _bytes(1, _TYPE) + _bytes(2, _bytes(1, duration)))
    if isinstance(error, QuotaExceeded):
        details += _bytes(3, _bytes(1, _QUOTA_TYPE) + _bytes(2, _bytes(1, _violation(error))))
    text = error.text.encode("utf-8", "replace")[:_MOST_TEXT]
    return (("grpc-status-details-bin", _number(1, int(error.code)) + _bytes(2, text) + details),)


def pushback_fields(error: GatewayError) -> Fields:
    """As `retry_trailers`, on the wire: this one is the protocol's own and no metadata."""
    if not isinstance(error, Overloaded):
        return ()
    return (NeverIndexed(b"grpc-retry-pushback-ms", b"%d" % max(1, round(error.retry_after * 1000))),)


def _violation(error: QuotaExceeded) -> bytes:
    """`QuotaFailure.Violation`: subject 1, description 2, quota_metric 4."""
    return (
        _bytes(1, error.subject.encode("utf-8", "replace"))
        + _bytes(2, error.limit.encode())
        + _bytes(4, error.reason.encode())
    )


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
