"""I/O: the listening side on the gateway's own transport, `forward`."""

from __future__ import annotations

import logging
import math
import resource
import ssl
import time
from collections.abc import Mapping, Sequence

from gateway.forward.server import DESCRIPTORS, ForwardMethod, WireServer, server_tls
from gateway.server.listener import CannotServe, Register, ServerSettings
from gateway.wire.limits import Limits

_log = logging.getLogger(__name__)

_RESERVED = 64  # descriptors that no caller gets: for health, upstreams, the config and what it names
_QUIET_SECONDS = 60.0


class WireListener:
    """A server as `GrpcioServer` is one, with some methods forwarded as bytes."""

    def __init__(
        self, settings: ServerSettings, services: Sequence[Register], forward: Mapping[str, ForwardMethod]
    ) -> None:
        """forward: by full method path; these win over services."""
        self._settings = settings
        limits = Limits(
            message_bytes=settings.max_message_bytes,
            max_streams=settings.max_streams,
            age_seconds=settings.max_connection_age or 0.0,
        )
        self._server = WireServer(
            forward,
            limits,
            max_connections=settings.max_connections,
            descriptors=_descriptors_for_connections(),
            refused=self._refused,
        )
        for register in services:
            register(self._server)
        self.port = 0
        self._context: ssl.SSLContext | None = None
        self._quiet_until = -math.inf
        self._refusals = 0  # since the last line about them

    async def start(self) -> None:
        """:raises CannotServe: if the address is taken or not ours."""
        listen, tls = self._settings.listen, self._settings.tls
        try:
            self._context = server_tls(tls.certificate, tls.key, tls.client_ca) if tls else None
            self.port = self._server.listen(listen, self._context, reuse_port=self._settings.share_port)
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {listen}: {error.strerror}; stop what uses it or choose another with --listen"
            ) from error
        await self._server.start()

    def renew_certificate(self) -> None:
        """:raises OSError: if the files can't be used; then those before stay in use."""
        tls = self._settings.tls
        if self._context is None or tls is None:
            return
        server_tls(tls.certificate, tls.key, tls.client_ca)  # what fails must leave the context in use as it was
        self._context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca is not None:
            self._context.load_verify_locations(tls.client_ca)

    def _refused(self, why: str) -> None:
        self._settings.refused(why)
        self._refusals += 1
        now = time.monotonic()
        if now < self._quiet_until:
            return
        limit = f"max_connections is {self._settings.max_connections}"
        if why == DESCRIPTORS:
            limit = "the process has no more descriptors to give (LimitNOFILE, ulimit -n)"
        _log.warning("%d connections were refused: %s; told at most once a minute", self._refusals, limit)
        self._quiet_until, self._refusals = now + _QUIET_SECONDS, 0

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cut them."""
        await self._server.stop(grace)


def _descriptors_for_connections() -> int | None:
    """Where they end, of all that this process may open; None is nowhere."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit - min(_RESERVED, limit // 4)
