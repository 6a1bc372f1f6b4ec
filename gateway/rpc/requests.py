"""Heads of requests: a header list is checked and read once, and looked up after that.

A client sends the same few header lists again and again, and looking one up costs far less than reading it.

Source: grpc `doc/PROTOCOL-HTTP2.md`; RFC 9113 section 8.3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from gateway.bounded import make_room
from gateway.http2.header_lists import is_authority
from gateway.http2.hpack import Field
from gateway.http2.limits import Limits
from gateway.rpc.codes import CallFailed
from gateway.rpc.metadata import Fields, is_legal, parse_timeout
from gateway.status import Code

# Callers choose header lists, so at most KEPT are remembered, each of at most KEPT_BYTES as HTTP/2 counts: 6 MB in all.
KEPT: Final = 1024
KEPT_BYTES: Final = 1024

_PROTOCOL_FIELDS: Final = frozenset(
    b":method :scheme :path :authority content-type te host grpc-timeout grpc-encoding grpc-accept-encoding "
    b"content-length grpc-previous-rpc-attempts".split()
)


@dataclass(slots=True, eq=False)
class RequestHead:
    """The header list of a request. Equal lists share one, so only `derived` and `admitted` may change."""

    path: bytes
    fields: Fields  # the client's metadata: legal fields, as `NeverIndexed` or plain pairs
    encoding: bytes  # grpc-encoding
    accepts: bytes  # grpc-accept-encoding
    timeout: float | None  # seconds
    size: int = 0  # bytes, as HTTP/2 counts, if no other request shares the head; else 0
    http_status: bytes = b""  # the HTTP status that refuses a request which is not gRPC; else b""
    derived: Any = None  # what a handler computed from the fields, for later requests with this head
    access: Any = None  # who sent it and what he may, if that is checked; then `fields` has no credentials
    admitted: Any = None  # what was found out when it was checked, for later requests with this head


NO_HEAD: Final = RequestHead(b"", (), b"", b"", None)


class RequestHeads:
    """The heads that one server remembers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[tuple[Field, ...], RequestHead] = {}

    def __len__(self) -> int:
        return len(self._known)

    def read(self, headers: tuple[Field, ...]) -> RequestHead:
        """The head of a request. raises: CallFailed if the request can't be served."""
        head = self._known.get(headers)
        return head if head is not None else self._read(headers)

    def _read(self, headers: tuple[Field, ...]) -> RequestHead:
        known: dict[bytes, bytes] = {}
        fields: list[Field] = []
        hosts = 0
        size = 0
        illegal = False
        for field in headers:
            name, value = field
            size += len(name) + len(value) + 32
            if name in _PROTOCOL_FIELDS:
                known[name] = value
                hosts += name == b"host"
            else:
                fields.append(field)
                illegal = illegal or not is_legal(name, value)
        if size > self._limits.header_list_bytes or len(headers) > self._limits.header_count:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                f"Request headers of {size} bytes in {len(headers)} fields are over the limit of "
                f"{self._limits.header_list_bytes} bytes, {self._limits.header_count} fields",
            )
        head = _understand(known, hosts, tuple(fields), illegal)
        if size <= KEPT_BYTES:
            make_room(self._known, KEPT)
            self._known[headers] = head
        else:
            head.size = size
        return head


def _understand(known: dict[bytes, bytes], hosts: int, fields: Fields, illegal: bool) -> RequestHead:
    refusal = b""
    if known.get(b":method") != b"POST":
        refusal = b"405"
    elif not _is_grpc(known.get(b"content-type", b"")):
        refusal = b"415"
    elif hosts and (hosts > 1 or not _may_be_host(known[b"host"], known.get(b":authority", b""))):
        refusal = b"400"
    elif illegal:
        raise CallFailed(Code.INTERNAL, "Request metadata has a key or value with characters that gRPC does not allow")
    return RequestHead(
        known.get(b":path", b""),
        fields,
        known.get(b"grpc-encoding", b""),
        known.get(b"grpc-accept-encoding", b""),
        None if refusal else _timeout(known.get(b"grpc-timeout")),
        http_status=refusal,
    )


def _may_be_host(host: bytes, authority: bytes) -> bool:
    """Either names the host (RFC 9113 section 8.3.1, gRFC A41): nginx can send `host` alone. Both must agree.

    More than one `host` is refused before, as gRFC A41 and RFC 9112 section 3.2 have it.
    """
    return is_authority(host) and (not host or not authority or host.lower() == authority.lower())


def _timeout(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = parse_timeout(value)
    except ValueError:
        raise CallFailed(Code.INTERNAL, "Bad grpc-timeout") from None
    if seconds <= 0:
        raise CallFailed(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
    return seconds


def _is_grpc(content_type: bytes) -> bool:
    return content_type == b"application/grpc" or content_type.startswith((b"application/grpc+", b"application/grpc;"))
