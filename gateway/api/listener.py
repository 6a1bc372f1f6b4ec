"""I/O: the listening side: the services of one worker on `transport`'s server, at the address that the config says."""

from __future__ import annotations

import logging
import math
import resource
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tritonclient.grpc import service_pb2 as v2

from gateway.errors import CommandFailed
from gateway.http2.limits import Limits
from gateway.rpc.budget import Budget
from gateway.rpc.server import ServerCall
from gateway.transport.listener import COLLECTED, DESCRIPTORS, MEMORY, ForwardMethod, WireServer, server_tls

_log = logging.getLogger(__name__)

_RESERVED: Final = 64  # descriptors that no caller gets: for health, upstreams, the config and what it names
_QUIET_SECONDS: Final = 60.0

Register = Callable[[Any], None]
"""Adds a service's handlers to a server, as generated `add_…_to_server` functions do."""


class CannotServe(CommandFailed):
    """The gRPC address can't be listened on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files. With `client_ca` clients show a certificate of that authority."""

    certificate: str
    key: str
    client_ca: str | None = None
    is_optional: bool = False  # may clients come without one?


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where and how to listen."""

    listen: str  # HOST:PORT, port 0 for a free one
    max_message_bytes: int
    channel: socket.socket | None = None  # socket to the supervisor, which listens then; None if this process listens
    tls: ServerTls | None = None
    max_collected_bytes: int = 512 << 20  # bytes of messages that are being collected, on all connections
    max_streams: int = 1000  # most calls at once on one connection
    max_connections: int = 10_000
    max_connection_age: float | None = None  # seconds, ± 10 %
    refused: Callable[[str], None] = lambda why: None  # hears of each connection that could not stay, and why
    turned_away: Callable[[str], None] = lambda why: None  # and of each whose client spoke something else, or badly


_LARGE: Final = ("ModelInfer", "ModelStreamInfer", "RepositoryModelLoad")  # tensors, and the files of a model
_V2: Final = v2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SMALL_REQUESTS: Final = (
    *(f"/{_V2.full_name}/{method.name}" for method in _V2.methods if method.name not in _LARGE),
    *(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch")),
    *(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")),
)
"""Methods whose requests are names and settings."""


VITAL: Final = (
    *(f"/{_V2.full_name}/{method}" for method in ("ServerLive", "ServerReady", "ModelReady")),
    *(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch")),
)
"""Methods by which others see whether this gateway may have calls: whoever can't ask takes it for dead."""


class Listener:
    """A gRPC server with these services, some of whose methods are forwarded as bytes."""

    def __init__(
        self,
        settings: ServerSettings,
        services: Sequence[Register],
        forward: Mapping[str, ForwardMethod],
        *,
        budget: Budget | None = None,
        on_full: Callable[[str], None] = lambda peer: None,
    ) -> None:
        """
        forward:  handlers by full method path; they win over services.
        budget:   for collected messages, if it is shared with others; None makes one of `max_collected_bytes`.
        on_full:  called with the peer of a connection that has `max_streams` calls.
        """
        self._settings = settings
        limits = Limits(
            message_bytes=settings.max_message_bytes,
            max_streams=settings.max_streams,
            collected_bytes=settings.max_collected_bytes // 2,
            age_seconds=settings.max_connection_age or 0.0,
        )
        self._server = WireServer(
            forward,
            limits,
            max_connections=settings.max_connections,
            budget=budget or Budget(settings.max_collected_bytes, COLLECTED),
            small=SMALL_REQUESTS,
            vital=VITAL,
            on_full=on_full,
            descriptors=_descriptors_for_connections(),
            refused=self._refused,
            turned_away=self._turned_away,
        )
        for register in services:
            register(self._server)
        self._quiet_until = -math.inf
        self._turned: dict[str, tuple[float, int]] = {}  # by reason: until when to be quiet, and how many since
        self._refusals = 0  # connections refused since the last log line
        self.port = 0  # the port that it listens on, after `start`
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Listen and serve. raises: CannotServe if the address can't be listened on or TLS files can't be used."""
        listen, tls = self._settings.listen, self._settings.tls
        try:
            self._context = _context(tls) if tls else None
            if self._settings.channel is None:
                self.port = self._server.listen(listen, self._context)
            else:
                self.port = int(listen.rpartition(":")[2])
                self._server.take_from(self._settings.channel, self._context)
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {listen}: {error.strerror}; stop what uses it or choose another with --listen"
            ) from error
        await self._server.start()

    def renew_certificate(self) -> None:
        """Read the TLS files again, if there are any, for new connections.

        :raises OSError: if the files can't be used; then the certificate in use stays.
        """
        tls = self._settings.tls
        if self._context is None or tls is None:
            return
        _context(tls)  # a trial, so that bad files leave the context in use unchanged
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
            limit = "the process has no file descriptors left (raise LimitNOFILE or ulimit -n)"
        elif why == MEMORY:
            limit = "memory is nearly used up (docs/limits.md#when-memory-runs-out)"
        _log.warning("%d connections were refused: %s (logged at most once a minute)", self._refusals, limit)
        self._quiet_until, self._refusals = now + _QUIET_SECONDS, 0

    def _turned_away(self, why: str, peer: str, text: str) -> None:
        self._settings.turned_away(why)
        now = time.monotonic()
        until, more = self._turned.get(why, (-math.inf, 0))
        if now < until:
            self._turned[why] = until, more + 1
            return
        self._turned[why] = now + _QUIET_SECONDS, 0
        others = f"; {more} more like it since this was logged last" if more else ""
        _log.warning("a connection of %s was turned away (%s): %s%s", peer, why, text, others)

    def guard(self, admit: Callable[[ServerCall], bool] | None) -> None:
        """Have `admit` asked about each call from now on (`WireServer.admit`); None: nobody."""
        self._server.admit = admit

    def tell_bytes(self, heard: Callable[[int], None]) -> None:
        """Have `heard` called as many bytes come, with their number, on connections that are accepted from now on."""
        self._server.on_bytes = heard

    def close_to_new(self, is_closed: bool) -> None:
        """Refuse new connections, or no longer."""
        self._server.is_closed_to_new = is_closed

    def reset_heaviest(self) -> tuple[str, int] | None:
        """Close the connection that holds the most memory. Its peer and the bytes; None if none holds much."""
        return self._server.reset_heaviest()

    async def stop(self, grace: float) -> None:
        """Take no more calls, wait `grace` seconds for those in flight, then cancel them."""
        await self._server.stop(grace)


def _context(tls: ServerTls) -> ssl.SSLContext:
    context = server_tls(tls.certificate, tls.key, tls.client_ca)
    if tls.client_ca is not None and tls.is_optional:
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _descriptors_for_connections() -> int | None:
    """The lowest file descriptor that callers' connections must not have; None if there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit - min(_RESERVED, limit // 4)
