"""`grpc.health.v1.Health`: the server as a whole, and each public model by its name.

Source: grpc `doc/health-checking.md`: Check answers NOT_FOUND for an unknown name; Watch answers at once, then at every
change, and keeps an unknown name open as SERVICE_UNKNOWN.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.api.calls import Context, access_of
from gateway.api.catalogue import Catalogue
from gateway.errors import GatewayError
from gateway.process.notifier import Changes
from gateway.v2.peek import MAX_NAME

_Status = health_pb2.HealthCheckResponse

_MOST_BYTES: Final = MAX_NAME + 3  # of a request, with the tag and the length before the name
_TOO_LONG: Final = f"A name has at most {MAX_NAME} bytes, and a request nothing else"


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without types
    """Answers Check and Watch."""

    def __init__(
        self, catalogue: Catalogue, changes: Changes, is_ready: Callable[[], bool], services: Sequence[str]
    ) -> None:
        """services: full names of the gRPC services; each is as healthy as the whole server."""
        self._catalogue = catalogue
        self._changes = changes
        self._is_ready = is_ready
        self._whole = frozenset(("", *services))
        self._closed = False

    def close(self) -> None:
        """End every Watch: it is a call in flight, for which a stopping server would wait in vain."""
        self._closed = True
        self._changes.notify()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802  (the RPC's name)
        await _refuse_long(request, context)
        status = self._status(request.service, context)
        if status is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"'{request.service[:200]}' is no service and no public model; '' asks for the whole server",
            )
        return _Status(status=status)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        service, told = request.service, None
        await _refuse_long(request, context)
        while True:
            status = self._status(service, context)
            if status is None:
                status = _Status.SERVICE_UNKNOWN
            if status != told:
                told = status
                yield _Status(status=status)
            elif self._closed:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The server is shutting down.")
            else:
                await self._changes.wait()

    def _status(self, service: str, context: Context) -> int | None:
        if service in self._whole:
            return int(_Status.SERVING if self._is_ready() else _Status.NOT_SERVING)
        access = access_of(context)
        try:
            catalogue = self._catalogue.seen_by(None if access is None else access.renewed())  # a Watch may last
        except GatewayError:
            return None
        if not catalogue.is_configured(service):
            return None
        serving = self._is_ready() and catalogue.is_ready(service)
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)


async def _refuse_long(request: Any, context: Context) -> None:
    """Refuse a large request, since a Watch keeps its request, with unknown fields, for as long as it is open."""
    if request.ByteSize() > _MOST_BYTES:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _TOO_LONG)
