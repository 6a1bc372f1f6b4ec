"""I/O: the listening side on grpcio's asyncio server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

Register = Callable[[Any], None]
"""Adds a service's handlers to a server, as generated `add_…_to_server` functions do."""

_MAX_STREAMS = 1000
"""Concurrent calls of one connection. C core's default has no bound, so one peer could hold any amount of memory."""


class CannotServe(Exception):
    """The gRPC address can't be listened on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where and how to listen."""

    listen: str  # HOST:PORT, port 0 for a free one
    max_message_bytes: int
    share_port: bool = False  # with other workers, by SO_REUSEPORT


class GrpcioServer:
    """A server that starts on entering; `stop` ends it."""

    def __init__(self, settings: ServerSettings, services: Sequence[Register]) -> None:
        self._settings = settings
        self._services = services
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """:raises CannotServe: if the address is taken or not ours."""
        settings = self._settings
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", int(settings.share_port)),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                # Clients that ping keep their connection through a load balancer; more than one in 10 s is abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        for register in self._services:
            register(server)
        try:
            self.port = server.add_insecure_port(settings.listen)
        except RuntimeError as error:
            raise CannotServe(
                f"cannot listen on {settings.listen}: the port is taken, or the address is not this host's; "
                "stop what uses it or choose another with --listen"
            ) from error
        await server.start()
        self._server = server

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cancel them."""
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None
