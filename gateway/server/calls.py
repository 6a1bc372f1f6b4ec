"""Between a gRPC servicer context and the core: what arrived, and how an error leaves.

The one place where `GatewayError` becomes a gRPC status. Contexts are grpc.aio's, or any that behave as they do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc

from gateway.deadline import Deadline
from gateway.errors import Bug, GatewayError, UpstreamFailed
from gateway.infer.exchange import Request

_log = logging.getLogger(__name__)

Context = Any
"""grpc.aio.ServicerContext; Any because its generic parameters say nothing about bytes."""

Answer = TypeVar("Answer")
Handler = Callable[[Any, Context], Awaitable[Answer]]
"""Takes a request, or an iterator of them; returns the answer, or None if it writes its answers itself."""

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Time that calls get. Seconds."""

    default_deadline: float | None = None  # for callers that give none
    longest_deadline: float | None = None  # for those that give too much


def request_from(context: Context, body: bytes, method: str, limits: CallLimits) -> Request:
    """What the core needs to know of a call."""
    seconds = context.time_remaining()
    if seconds is None:
        seconds = limits.default_deadline
    if limits.longest_deadline is not None:
        seconds = limits.longest_deadline if seconds is None else min(seconds, limits.longest_deadline)
    deadline = None if seconds is None else Deadline.after(seconds, time.monotonic())
    return Request(body, tuple(context.invocation_metadata() or ()), deadline, context.peer(), method)


def is_loopback(peer: str) -> bool:
    """peer: as gRPC writes it, such as `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`."""
    address = unquote(peer)
    return address.startswith(("ipv4:127.", "ipv6:[::1]", "unix:"))


async def abort(context: Context, error: GatewayError) -> None:
    """End the call with the error's status. Does not return."""
    trailing = error.trailers if isinstance(error, UpstreamFailed) else ()
    await context.abort(_STATUS[error.code], error.text, trailing_metadata=tuple(trailing))


def with_errors(handler: Handler[Answer]) -> Handler[Answer]:
    """A handler whose errors end the call with their status; unforeseen ones tell the caller nothing."""

    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await handler(request, context)
        except GatewayError as error:
            await abort(context, error)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            _log.exception("unforeseen failure in %s", getattr(handler, "__name__", "a handler"))
            await abort(context, Bug("The gateway failed unexpectedly; its log has the details."))

    return guarded
