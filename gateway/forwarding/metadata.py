"""Pure: which metadata passes through the gateway, in either direction.

Sources: RFC 9113 section 8.2.2 (hop-by-hop fields), gRPC PROTOCOL-HTTP2.md (reserved names).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

from gateway.errors import GatewayError
from gateway.forwarding.retry_info import retry_trailers
from gateway.rpc.metadata import text_of
from gateway.types import Metadata, MetadataValue, Served

_DROPPED: Final = frozenset(
    {
        "connection", "content-length", "content-type", "host", "keep-alive", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "user-agent",
        # A traced call has the trace context of the gateway's own span upstream. If the gateway traces nothing, the
        # caller's trace context is added to each attempt, see `trace_context`.
        "traceparent", "tracestate",
    }
)  # fmt: skip
_RESERVED: Final = ("grpc-", "gateway-", ":")
REQUEST_ID: Final = "x-request-id"
"""Metadata key of a caller's own id for a request. Where one id is needed, that of the V2 message is preferred."""
_DROPPED_RAW: Final = frozenset(key.encode() for key in _DROPPED) | {
    b":status",
    b"grpc-status",
    b"grpc-accept-encoding",
}
_RESERVED_RAW: Final = tuple(prefix.encode() for prefix in _RESERVED)
_ID_LIMIT: Final = 256  # characters
REPLAYED: Final = "gateway-replayed"
"""Metadata key of a request that was captured and is replayed: it does not count as its model's traffic."""
UPSTREAM_KEY: Final = "gateway-upstream"
"""Metadata key with which the caller of a control RPC chooses one upstream."""


def is_passed_on(key: str) -> bool:
    """May metadata with this key pass? `grpc-status-details-bin` is the only reserved key with application data."""
    return key == "grpc-status-details-bin" or not (key in _DROPPED or key.startswith(_RESERVED))


def is_field_passed_on(name: bytes) -> bool:
    """As `is_passed_on`, for the name of a header field. It looks up the names that every answer has first."""
    return name not in _DROPPED_RAW and (not name.startswith(_RESERVED_RAW) or name == b"grpc-status-details-bin")


def passed_on(metadata: Iterable[tuple[str, MetadataValue]]) -> list[tuple[str, MetadataValue]]:
    """The part of a caller's or an upstream's metadata that the other side gets, in the same order."""
    return [(key, value) for key, value in metadata if is_passed_on(key)]


def first_values(metadata: Iterable[tuple[str, MetadataValue]]) -> dict[str, str]:
    """The first text value of each key. Values are stripped of white space: perf_analyzer sends leading spaces."""
    facts: dict[str, str] = {}
    for key, value in metadata:
        if key not in facts and not key.endswith("-bin"):
            facts[key] = (value if isinstance(value, str) else text_of(value)).strip()
    return facts


def echoed(metadata: Mapping[str, str]) -> Metadata:
    """The trailing metadata that repeats the caller's own request id, if it is printable ASCII of bounded length."""
    id = metadata.get(REQUEST_ID, "")
    return ((REQUEST_ID, id),) if id and len(id) <= _ID_LIMIT and id.isascii() and id.isprintable() else ()


def trace_context(metadata: Mapping[str, str]) -> Metadata:
    """A caller's own trace context, which goes upstream if the gateway traces nothing."""
    return tuple(
        (key, value)
        for key in ("traceparent", "tracestate")
        if (value := metadata.get(key, "")) and value.isascii() and value.isprintable()
    )


def failed_trailers(error: GatewayError) -> Metadata:
    """The trailing metadata of an error: who was asked last, if anybody was; and at overload, when to try again."""
    served = served_trailers(error.served) if error.served is not None else ()
    return (*served, *retry_trailers(error))


def served_trailers(served: Served) -> Metadata:
    """The trailing metadata that names who answered. Names that are not legal metadata are percent-encoded UTF-8."""
    who: Metadata = (
        ("gateway-variant", _as_value(served.variant)),
        ("gateway-model-version", _as_value(served.model_version)),
        ("gateway-endpoint", _as_value(served.endpoint)),
        ("gateway-attempts", str(served.attempts)),
    )
    if served.fallback_from:
        who = (
            *who,
            ("gateway-fallback-from", _as_value(served.fallback_from)),
            ("gateway-fallback-reason", served.fallback_reason),
        )
    return (*who, ("gateway-cache", served.reused)) if served.reused else who


def _as_value(name: str) -> str:
    """A name as a legal metadata value. A variant may have the name of its Triton model, which may be in any script."""
    return (
        name if name.isascii() and name.isprintable() and not _NEEDS_CODING.intersection(name) else quote(name, _PLAIN)
    )


_NEEDS_CODING: Final = frozenset(" %")  # a value may not begin or end with a space, and % begins an escape
_PLAIN: Final = (
    "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # characters that are not encoded, beside those that `quote` never encodes
)
