"""Translates between a gRPC servicer context and the core: the request that arrived, and the error that leaves.

The one place where `GatewayError` becomes a gRPC status. Contexts are grpc.aio's, or any that behave as they do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import grpc

from gateway.access.door import Access
from gateway.deadline import Deadline
from gateway.errors import BUG_TEXT, Bug, GatewayError, UpstreamFailed
from gateway.forwarding.caller import metadata_from_pairs, renewed
from gateway.forwarding.exchange import Request
from gateway.forwarding.metadata import echoed, failed_trailers, first_values, passed_on
from gateway.types import Metadata

_log = logging.getLogger(__name__)

Context = Any
"""grpc.aio.ServicerContext; Any because its generic parameters say nothing about bytes."""

Answer = TypeVar("Answer")
Handler = Callable[[Any, Context], Awaitable[Answer]]
"""Takes a request or an iterator of requests; returns the answer, or None if it writes its answers itself."""

_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Time that unary calls get, in seconds. None: no limit."""

    default_deadline: float | None = None  # for callers without a deadline
    longest_deadline: float | None = None  # most that a caller may ask for

    def apply(self, seconds: float | None) -> float | None:
        """The seconds that a call gets whose caller gave it `seconds`. None: no limit."""
        if seconds is None:
            seconds = self.default_deadline
        if self.longest_deadline is None:
            return seconds
        return self.longest_deadline if seconds is None else min(seconds, self.longest_deadline)


def request_from(context: Context, body: bytes, method: str, limits: CallLimits) -> Request:
    """The request as the core takes it."""
    seconds = limits.apply(context.time_remaining())
    deadline = None if seconds is None else Deadline.after(seconds, time.monotonic())
    metadata = metadata_from_pairs(context.invocation_metadata() or (), access_of(context))
    return Request(body, metadata, deadline, context.peer(), method)


def within(opening: Request, limits: CallLimits) -> Request:
    """One item of a stream gets the time of a unary call, from now on, but no more than its stream has.

    :raises GatewayError: if its caller would not be let in any more.
    """
    now = time.monotonic()
    seconds = limits.apply(opening.deadline.remaining(now) if opening.deadline else None)
    deadline = None if seconds is None else Deadline.after(seconds, now)
    return replace(opening, metadata=renewed(opening.metadata), deadline=deadline)


def access_of(context: Context) -> Access | None:
    """Who has made the call and what he may; None if that is not checked, as with grpc.aio's own contexts."""
    access: Access | None = getattr(context, "access", None)
    return access


def is_loopback(peer: str) -> bool:
    """Is the peer on this host? peer: as gRPC writes it, such as `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        address = ip_address(rest.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    # A socket that listens on IPv6 and IPv4 at once shows IPv4 callers as ::ffff:127.0.0.1.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


async def abort(context: Context, error: GatewayError) -> None:
    """End the call with the error's status. Does not return."""
    trailing = error_trailing(error, first_values(context.invocation_metadata() or ()))
    await context.abort(_STATUS[error.code], error.text, trailing_metadata=tuple(trailing))


def error_trailing(error: GatewayError, metadata: Mapping[str, str]) -> Metadata:
    """The trailing metadata of an error: the upstream's, who was asked, the caller's id.

    metadata: the first values of the caller's metadata.
    """
    upstream = passed_on(error.trailers) if isinstance(error, UpstreamFailed) else ()
    return (*upstream, *failed_trailers(error), *echoed(metadata))


def with_errors(handler: Handler[Answer]) -> Handler[Answer]:
    """Wrap a handler so that its errors end the call with their status. Callers get no details of unforeseen errors."""

    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await handler(request, context)
        except GatewayError as error:
            await abort(context, error)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            _log.exception("unforeseen failure in %s", getattr(handler, "__name__", "a handler"))
            await abort(context, Bug(BUG_TEXT))

    return guarded


def add_handlers(server: Any, service: str, handlers: Mapping[str, Any]) -> None:
    """Add methods whose requests stay bytes, as grpcio's generated functions add those whose requests are parsed.

    server: a gateway.transport server. service: its full name. handlers: grpc.RpcMethodHandler by method.
    """
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_registered_method_handlers(service, handlers)
