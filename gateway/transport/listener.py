"""The listener: `WireServer` takes the servicers of grpcio's generated code, and handlers of forwarded bytes."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import grpc

from gateway.http2.frames import ErrorCode
from gateway.http2.limits import Limits
from gateway.rpc.budget import Budget
from gateway.rpc.requests import RequestHeads
from gateway.rpc.server import Ends, ServerCall, ServerConnection
from gateway.status import Code
from gateway.transport.acceptor import Acceptor, Source
from gateway.transport.edge import Alarm, Edge
from gateway.transport.handover import HandedOver
from gateway.transport.servicer import MethodHandler, Servicing
from gateway.transport.sockets import bind, peer_name
from gateway.transport.tls import PLAIN_TEXTS, ServerContext

BACKLOG: Final = 1024
AGE_JITTER: Final = 0.1  # part of the maximum age, so that clients which came together leave one by one
TICK_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 1.0  # seconds for the last bytes of connections that were cut
LAST_SECONDS: Final = 1.0  # seconds for connections that were on their way when the server stops
SMALL_REQUEST: Final = 65_536  # bytes of the largest message of a method in `small`; a name has 1,000 at most
COLLECTED: Final = "server.max_collected_bytes"
CONNECTIONS_PART: Final = f"half of {COLLECTED}, which one connection may have"
FAULT_LOG_SECONDS: Final = 60.0  # seconds between two lines about streams that were reset for a client's fault
TICKED_AT_ONCE: Final = 1000  # connections and calls whose timers are checked in one turn of the loop

ServerEdge = Edge[ServerConnection]

log = logging.getLogger("gateway.transport")


MAX_CONNECTIONS: Final = "max_connections"  # reasons for refusing a connection
DESCRIPTORS: Final = "descriptors"
NO_MORE: Final = "no more connections"
MEMORY: Final = "memory"
MOST_NARROW: Final = 32  # connections for vital methods alone, where others are refused; an older one gives way
LEAST_RESET: Final = 1 << 20  # bytes that a connection holds for which it is worth being closed


@dataclass(frozen=True, slots=True)
class ForwardMethod:
    """A method whose messages stay bytes, handled by callbacks on the event loop.

    A unary method is called when its message is complete; with `cut_through`, when the front of a large message has
    arrived (see `ServerCall.on_request`). A streaming method is called with the request's headers, and sets
    `on_message`.
    """

    handle: Callable[[ServerCall], None]
    streaming: bool = False
    cut_through: bool = False


class WireServer:
    """A gRPC server. Add handlers, then `listen`, then `start`, all on one event loop."""

    def __init__(
        self,
        forward: Mapping[str, ForwardMethod] | None = None,
        limits: Limits | None = None,
        *,
        max_connections: int = 10_000,
        age_grace: float | None = None,
        budget: Budget | None = None,
        small: Collection[str] = (),
        vital: Collection[str] = (),
        on_full: Callable[[str], None] | None = None,
        descriptors: int | None = None,
        refused: Callable[[str], None] | None = None,
        turned_away: Callable[[str, str, str], None] | None = None,
    ) -> None:
        """Arguments, all of them optional:

        forward:         methods by full path, "/package.Service/Method"; they win over servicers.
        max_connections: further connections are closed.
        age_grace:       seconds for the calls of a connection that reached its maximum age; None: as long as they take.
        budget:          for messages that are collected, if shared with others.
        small:           full paths of methods whose requests are never large.
        vital:           full paths of methods that are served where new connections are refused, such as health: some
                         connections more are accepted for these alone, and told to go elsewhere by any other call.
        on_full:         called with the peer of a connection that has `max_streams` open calls.
        descriptors:     a connection with this file descriptor or a higher one is closed, to keep some for other uses.
        refused:         called with the reason when a new connection is closed.
        turned_away:     called with the reason, the peer and a text for people when a handshake fails, or when a
                         client speaks no HTTP/2 (`tls.REASONS`).
        """
        self.limits = limits or Limits()
        self.draining = False
        self.on_bytes: Callable[[int], None] | None = None  # hears how many bytes came, when many do
        self.is_closed_to_new = False  # are new connections refused, for want of memory?
        self.admit: Callable[[ServerCall], bool] | None = None
        """Asked about each call before any of its body is read. False: it has ended the call."""
        self._forward = {path.encode(): method for path, method in (forward or {}).items()}
        self._registered: dict[bytes, MethodHandler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._on_full = on_full
        self._budget = budget or Budget(2 * self.limits.collected_bytes, COLLECTED)
        self._small = frozenset(path.encode() for path in small)
        self._vital = frozenset(path.encode() for path in vital)
        self._narrow_limits = replace(
            self.limits, max_streams=8, stream_window=65_535, connection_window=1 << 20, idle_seconds=60.0
        )
        self._narrow: dict[ServerEdge, None] = {}  # connections for vital methods alone, oldest first
        self._next_is_narrow = False  # will the connection that is being accepted be one?
        self._max_connections = max_connections
        self._age_grace = age_grace
        self._descriptors = descriptors
        self._refused = refused
        self._turned_away = turned_away
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._handed: HandedOver | None = None
        self._handed_tls: ssl.SSLContext | None = None
        self._acceptors: list[Acceptor] = []
        self._edges: set[ServerEdge] = set()
        self._shaking: set[Any] = set()  # accepted connections that have no protocol yet: TLS shakes hands first
        self._empty = asyncio.Event()
        self._alarm: Alarm
        self._ticker: asyncio.TimerHandle | None = None
        self._servicing = Servicing(self.limits)
        self._heads = RequestHeads(self.limits)
        self._next_fault_log_at = 0.0

    # Methods

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        for method, handler in method_handlers.items():
            self._registered[f"/{service_name}/{method}".encode()] = handler

    # Addresses

    def listen(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Bind "host:port", "[ipv6]:port" or "unix:path"; returns the port (0 for a unix socket).

        tls: made by `server_tls`. raises: OSError if the address can't be bound.
        """
        if address.startswith("unix:"):
            bound = socket.socket(socket.AF_UNIX)
            bound.bind(address.removeprefix("unix:"))
            port = 0
        else:
            host, _, number = address.rpartition(":")
            bound = bind(host.strip("[]"), int(number))
            try:
                bound.listen(BACKLOG)  # only listening shows that nobody else has the port
            except BaseException:
                bound.close()
                raise
            port = bound.getsockname()[1]
        self.adopt(bound, tls)
        return port

    def adopt(self, bound: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve on a socket that others have bound."""
        bound.setblocking(False)
        self._sockets.append((bound, tls))

    def take_from(self, channel: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve what another process accepts and hands over (`gateway.transport.handover`)."""
        self._handed = HandedOver(channel, self._count, partial(self._count_refusal, DESCRIPTORS))
        self._handed_tls = tls

    # Life

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._alarm = Alarm(loop)
        for bound, tls in self._sockets:
            bound.listen(BACKLOG)
            self._accept_from(bound, tls)
        if self._handed is not None:
            self._accept_from(self._handed, self._handed_tls)
        self._tick()

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing new, ask clients to leave, wait `grace` seconds for their calls, cut what is left.

        Whom the kernel has accepted already is a client too: it has been told that somebody is here.
        """
        if grace:
            if self._handed is not None:
                await self._handed.wait_last(LAST_SECONDS)
            await asyncio.gather(*[acceptor.last(LAST_SECONDS) for acceptor in self._acceptors])
        self.draining = True
        for acceptor in self._acceptors:
            acceptor.close()
        self._empty.clear()
        if grace and self._edges:
            for edge in list(self._edges):
                edge.wire.drain()
            try:
                await asyncio.wait_for(self._empty.wait(), grace)
            except asyncio.TimeoutError:
                log.warning("cut %d connections that were still busy after %g s", len(self._edges), grace)
        for edge in list(self._edges):
            edge.cut("the server is shutting down")
        if self._edges:
            try:
                await asyncio.wait_for(self._empty.wait(), CLOSE_SECONDS)
            except asyncio.TimeoutError:
                for edge in list(self._edges):
                    edge.transport.abort()
        for bound, _ in self._sockets:
            bound.close()
        await self._servicing.stop()
        if self._ticker is not None:
            self._ticker.cancel()
            self._alarm.stop()

    # Connections

    def _accept_from(self, source: Source, tls: ssl.SSLContext | None) -> None:
        acceptor = Acceptor(
            source,
            tls,
            protocol=self._shaking_protocol,
            farewell=self._protocol,
            refuses=self._refuses,
            shaken=self._shaken,
            patience=self.limits.handshake_seconds,
            failed=self._turn_away,
        )
        acceptor.start()
        self._acceptors.append(acceptor)

    def _count(self) -> int:
        return len(self._edges) + len(self._shaking)

    @property
    def connections(self) -> int:
        return len(self._edges)

    @property
    def calls(self) -> int:
        return sum(len(edge.wire.streams) for edge in self._edges)

    def reset_heaviest(self) -> tuple[str, int] | None:
        """Close the connection that holds the most memory. Its peer and the bytes; None if none holds much."""
        weights = {edge: edge.wire.weight for edge in self._edges if not edge.wire.closed}
        heaviest = max(weights, key=lambda edge: weights[edge], default=None)
        if heaviest is None or weights[heaviest] < LEAST_RESET:
            return None
        heaviest.wire.break_off(ErrorCode.ENHANCE_YOUR_CALM, "memory is scarce, and this connection holds the most")
        return heaviest.wire.peer, weights[heaviest]

    def _protocol(self) -> asyncio.Protocol:
        edge = Edge(asyncio.get_running_loop(), self._connection, self._gone, stops_reading=True)
        edge.on_bytes = self.on_bytes
        return edge.protocol

    def _shaking_protocol(self) -> asyncio.Protocol:
        protocol = self._protocol()
        self._shaking.add(protocol)
        if self._next_is_narrow:
            edge: Any = protocol
            self._next_is_narrow = False
            self._narrow[edge] = None
        return protocol

    def _shaken(self, protocol: asyncio.Protocol) -> None:
        if protocol in self._shaking:  # it had no connection in the end
            self._shaking.discard(protocol)
            edge: Any = protocol
            self._narrow.pop(edge, None)
            self._report()

    def _report(self) -> None:
        if self._handed is not None:
            self._handed.report()

    def _connection(self, edge: ServerEdge) -> ServerConnection:
        now = edge.loop.time()
        is_narrow = edge in self._narrow
        connection = ServerConnection(
            self._narrow_limits if is_narrow else self.limits,
            now,
            edge.wake,
            accept=partial(self._accept_vital, edge) if is_narrow else self._accept,
            deadlines=self._alarm.deadlines,
            heads=self._heads,
            peer=peer_name(edge.transport.get_extra_info("peername")),
            ends=self._ends(now),
            budget=Budget(self.limits.collected_bytes, CONNECTIONS_PART, self._budget),
        )
        tls = edge.transport.get_extra_info("ssl_object")
        if tls is not None:
            connection.certificate = tls.getpeercert() or None  # which is empty unless it was asked for and verified
        connection.on_stranger = partial(self._stranger, connection.peer)
        connection.on_fault = partial(self._log_fault, connection.peer)
        if self._on_full is not None:
            connection.on_full = partial(self._on_full, connection.peer)
        if edge not in self._shaking or self.draining:
            connection.break_off(0, NO_MORE)
        self._shaking.discard(edge)
        self._edges.add(edge)
        return connection

    def _stranger(self, peer: str, speaks: str) -> None:
        self._turn_away(speaks, peer, PLAIN_TEXTS[speaks])

    def _turn_away(self, reason: str, peer: str, text: str) -> None:
        if self._turned_away is not None and not self.draining:
            self._turned_away(reason, peer, text)

    def _log_fault(self, peer: str, fault: str) -> None:
        """Log why a stream was reset, at most once a minute: any client may cause it as often as it likes."""
        now = time.monotonic()
        if now >= self._next_fault_log_at and log.isEnabledFor(logging.DEBUG):
            self._next_fault_log_at = now + FAULT_LOG_SECONDS
            log.debug("%s broke the rules of HTTP/2, so its stream was reset: %s", peer, fault)

    def _refuses(self, descriptor: int) -> bool:
        """Must this new connection be closed? It is counted then, and also if it may ask for vital methods alone.

        descriptor: its file descriptor.
        """
        refusal = self._refusal(descriptor)
        if not refusal:
            return False
        self._count_refusal(refusal)
        self._next_is_narrow = self._may_be_narrow(descriptor)
        return not self._next_is_narrow

    def _may_be_narrow(self, descriptor: int) -> bool:
        """Is there a place for a connection that asks for vital methods only? The oldest one, if idle, makes room."""
        is_last = self._descriptors is not None and descriptor >= self._descriptors + MOST_NARROW // 2
        if not self._vital or self.draining or is_last:
            return False
        if len(self._narrow) < MOST_NARROW:
            return True
        open_ones = [edge for edge in self._narrow if edge in self._edges]
        oldest = next((edge for edge in open_ones if not edge.wire.streams), open_ones[0] if open_ones else None)
        if oldest is None:
            return False
        del self._narrow[oldest]
        oldest.wire.break_off(0, NO_MORE)
        return True

    def _count_refusal(self, why: str) -> None:
        if self._refused is not None and not self.draining:
            self._refused(why)

    def _refusal(self, descriptor: int) -> str:
        """Why a new connection must be closed, or "". The kernel gives out the lowest free descriptor."""
        if self.draining:
            return "draining"
        if self.is_closed_to_new:
            return MEMORY
        if self._count() >= self._max_connections:
            return MAX_CONNECTIONS
        if self._descriptors is None:
            return ""
        return DESCRIPTORS if descriptor >= self._descriptors else ""

    def _ends(self, now: float) -> Ends:
        age = self.limits.age_seconds
        if not age:
            return Ends()
        spread = random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)  # noqa: S311  # spreads load, guards nothing
        return Ends(now + age * spread, self._age_grace)

    def _gone(self, edge: ServerEdge) -> None:
        self._edges.discard(edge)
        self._narrow.pop(edge, None)
        self._report()
        if not self._edges:
            self._empty.set()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(TICK_SECONDS, self._tick)
        self._report()
        self._tick_some(iter(list(self._edges)))

    def _tick_some(self, edges: Iterator[ServerEdge]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        looked_at = 0
        for edge in edges:
            edge.tick(now)
            at = edge.wire.leaves_before(now + TICK_SECONDS)
            if at is not None:  # and not all at the tick: their clients connect anew at once
                loop.call_at(at, self._leave, edge)
            looked_at += 1 + len(edge.wire.streams)
            if looked_at >= TICKED_AT_ONCE:
                loop.call_soon(self._tick_some, edges)
                return

    @staticmethod
    def _leave(edge: ServerEdge) -> None:
        edge.wire.leave_if_old(edge.loop.time())

    # Calls

    def _accept(self, call: ServerCall) -> None:
        admit = self.admit
        if admit is not None and not admit(call):
            return
        method = self._forward.get(call.head.path)
        if method is None:
            if call.head.path in self._small:
                call.most_bytes = min(call.most_bytes or SMALL_REQUEST, SMALL_REQUEST)
            handler = self._registered.get(call.head.path) or self._find(call)
            if handler is None:
                call.finish(Code.UNIMPLEMENTED, "Method not found!")
            else:
                self._servicing.accept(call, handler)
        elif method.streaming:
            call.streaming = True
            method.handle(call)
        else:
            call.cut_through = method.cut_through
            call.on_request = method.handle

    def _accept_vital(self, edge: ServerEdge, call: ServerCall) -> None:
        """A call on a connection for vital ones alone. Any other has not begun, and may go elsewhere."""
        if call.head.path in self._vital:
            self._accept(call)
            return
        self._narrow.pop(edge, None)
        edge.wire.turn_away(call, NO_MORE)

    def _find(self, call: ServerCall) -> MethodHandler | None:
        if not self._generic:
            return None
        details = _Details(call.head.path.decode("latin-1"), ())
        for generic in self._generic:
            handler: MethodHandler | None = generic.service(details)
            if handler is not None:
                return handler
        return None


@dataclass(frozen=True, slots=True)
class _Details:
    """A call's details, as grpc.HandlerCallDetails."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


def server_tls(certificate: str, key: str, client_ca: str | None = None) -> ssl.SSLContext:
    """A TLS context for `listen`: TLS 1.2 or later, h2 only.

    certificate, key: files of the server's certificate.
    client_ca:        file of authorities; with it, clients must show a certificate of one of them.
    raises:           OSError, ssl.SSLError.
    """
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
