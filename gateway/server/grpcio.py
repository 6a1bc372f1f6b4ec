"""I/O: the listening side on grpcio's asyncio server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from gateway.server.listener import CannotServe, Register, ServerSettings, ServerTls


class GrpcioServer:
    """A server that starts on entering; `stop` ends it."""

    def __init__(self, settings: ServerSettings, services: Sequence[Register]) -> None:
        self._settings = settings
        self._services = services
        self._server: grpc.aio.Server | None = None
        self._certificates: grpc.ServerCertificateConfiguration | None = None  # for the next connection
        self.port = 0

    async def start(self) -> None:
        """:raises CannotServe: if the address is taken or not ours."""
        settings = self._settings
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),  # answers are limited where they come in, from upstream
                ("grpc.so_reuseport", int(settings.share_port)),
                ("grpc.max_concurrent_streams", settings.max_streams),
                *_age(settings.max_connection_age),
                # Clients that ping keep their connection through a load balancer; more than one in 10 s is abuse.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        for register in self._services:
            register(server)
        try:
            if settings.tls is None:
                self.port = server.add_insecure_port(settings.listen)
            else:
                self._certificates = _certificates(settings.tls)
                credentials = grpc.dynamic_ssl_server_credentials(
                    self._certificates, lambda: self._certificates, settings.tls.client_ca is not None
                )
                self.port = server.add_secure_port(settings.listen, credentials)
        except RuntimeError as error:
            raise CannotServe(
                f"cannot listen on {settings.listen}: the port is taken, or the address is not this host's; "
                "stop what uses it or choose another with --listen"
            ) from error
        await server.start()
        self._server = server

    def renew_certificate(self) -> None:
        """:raises OSError: if the files can't be read; then those before stay in use."""
        if self._settings.tls is not None:
            self._certificates = _certificates(self._settings.tls)

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cancel them."""
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None


def _age(seconds: float | None) -> list[tuple[str, int]]:
    return [] if seconds is None else [("grpc.max_connection_age_ms", int(seconds * 1000))]


def _certificates(tls: ServerTls) -> grpc.ServerCertificateConfiguration:
    """raises: OSError if a file can't be read."""
    pair = (Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes())
    authority = Path(tls.client_ca).read_bytes() if tls.client_ca else None
    return grpc.ssl_server_certificate_configuration([pair], authority)
