"""The dialer: `WireChannel` keeps a few connections to one target and puts calls on them.

While the first connection is being tried, calls wait. Once the target is known to be unreachable, calls fail at once
until it answers again; a call with `patient` waits instead. A call that the server says it has not processed is sent
once more (gRFC A6, transparent retry).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Final

from gateway.http2.frames import EngineError
from gateway.http2.limits import UPSTREAM, Limits
from gateway.rpc.budget import Budget
from gateway.rpc.client import UNLIMITED, ClientCall, ClientConnection
from gateway.rpc.metadata import Fields, text_of
from gateway.status import Code, Origin
from gateway.transport.edge import Alarm, Edge
from gateway.transport.sockets import connect
from gateway.transport.tls import hint

ClientEdge = Edge[ClientConnection]

CLOSED: Final = "The channel is closed"
CROWDED: Final = "Too many calls wait for a connection"
_NO_CONNECTION: Final = Origin.CONNECTION
LONG_LIVED: Final = 5.0  # seconds; a connection that ended sooner, without an answer, counts as a failed attempt

log = logging.getLogger("gateway.transport")

TICK_SECONDS: Final = 1.0
SAY_AGAIN_SECONDS: Final = 60.0  # seconds between two log lines about one lasting fault
AT_ONCE: Final = 100  # waiting calls begun or ended in one turn of the loop


class State(Enum):
    """Connectivity states by the names of gRPC's connectivity API."""

    IDLE = "idle"
    CONNECTING = "connecting"
    READY = "ready"
    TRANSIENT_FAILURE = "transient failure"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """How a channel keeps its connections."""

    connections: int = 2  # with two, one can be replaced while the other serves; each costs Triton threads
    together: int = 32  # calls given to one connection before the next gets any: calls that share packets cost less
    limits: Limits = UPSTREAM
    tls: ssl.SSLContext | None = None  # made by `client_tls`
    server_name: str | None = None  # the name that the certificate must have; None: the target's host
    user_agent: str = "inference-gateway"
    connect_seconds: float = 5.0  # for TCP, TLS and the server's SETTINGS
    backoff_first: float = 0.1  # seconds; short, to find a restarted server quickly
    backoff_factor: float = 1.6
    backoff_most: float = 1.5  # seconds; a dead server is tried about this often
    backoff_jitter: float = 0.2
    most_discarded: int = 0  # calls per connection that may be left to finish; see `ClientCall`
    max_pending: int = 1000  # calls that may wait for a connection, or for room on one
    budget: Budget | None = None  # for answers that are collected; None: each connection has its own


class WireChannel:
    """Connections to one target: "host:port", "dns:///host:port", "ipv4:…", "ipv6:[…]:port" or "unix:path".

    Names are resolved anew for every connection. A channel belongs to the event loop that uses it first, and connects
    with the first call or `connect`.
    """

    def __init__(self, target: str, options: ChannelOptions | None = None) -> None:
        self.target = target
        self.options = options or ChannelOptions()
        self.state = State.IDLE
        self.on_state: Callable[[State], None] | None = None
        # called with the reason when a connection closed for a fault of the server's
        self.on_fault: Callable[[str], None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._alarm: Alarm | None = None
        self._edges: list[ClientEdge] = []
        self._dialing: asyncio.Task[None] | None = None
        self._failures = 0
        self._pending: deque[ClientCall] = deque()
        self._ticker: asyncio.TimerHandle | None = None
        self.losses = 0  # connections that ended, whoever ended them
        self._last_error = ""
        self._say_dropped_at = 0.0
        self._limits = self.options.limits
        self._together = self.options.together
        self._once_more = self._try_once_more  # bound once, and not for each call
        self._address, self._authority = _parse(target)

    def __repr__(self) -> str:
        return f"<WireChannel {self.target} {self.state.value}, {len(self._edges)} connections, {self.calls} calls>"

    # Calls

    def call(self, path: bytes, fields: Fields = (), deadline: float | None = None) -> ClientCall:
        """A call to fill in and `submit`. deadline: on the loop's clock, that of `time.monotonic()`."""
        alarm = self._alarm or self._open()
        return ClientCall(path, fields, alarm.deadlines, deadline, self._loop.time() if deadline is not None else 0.0)

    def submit(self, call: ClientCall, *, wait_for_ready: bool = False) -> None:
        """Put a call on a connection, now or when there is one. `on_done` is never called before this returns."""
        if not call.retried and not call.request_more:
            call.on_unprocessed = self._once_more
        if self._pending or not self._start(call):
            self._wait(call, wait_for_ready)

    def _start(self, call: ClientCall) -> bool:
        best: ClientConnection | None = None
        fewest = UNLIMITED
        for edge in self._edges:
            connection = edge.wire
            taken = len(connection.streams)
            if taken < fewest and taken < connection.max_streams and not connection.draining:
                best, fewest = connection, taken
                if taken < self._together and not connection.full:
                    break
        if best is None:
            return False
        try:
            best.start(call)
        except EngineError as error:
            log.info("%s: %s", self.target, error)  # the connection has just died, or used all of its stream ids
            best.drain()
            return self._start(call)
        return True

    def _wait(self, call: ClientCall, wait_for_ready: bool) -> None:
        if self.state is State.SHUTDOWN:
            self._loop.call_soon(call.cancel, Code.UNAVAILABLE, CLOSED, _NO_CONNECTION)
        elif self.state is State.TRANSIENT_FAILURE and not wait_for_ready:
            self._dial()
            text = f"Failed to connect: {self._last_error}"
            self._loop.call_soon(call.cancel, Code.UNAVAILABLE, text, _NO_CONNECTION)
        elif len(self._pending) >= self.options.max_pending:
            self._loop.call_soon(call.cancel, Code.RESOURCE_EXHAUSTED, CROWDED, Origin.QUEUE)
        else:
            call.patient = wait_for_ready
            self._pending.append(call)
            self._dial()

    def _room(self) -> None:
        """A connection may take more calls: give it those that wait."""
        for _ in range(min(AT_ONCE, len(self._pending))):
            call = self._pending[0]
            if not call.done and not self._start(call):
                return
            self._pending.popleft()
        if self._pending:
            self._loop.call_soon(self._room)

    def _try_once_more(self, call: ClientCall) -> bool:
        if call.retried or self.state is State.SHUTDOWN:
            return False
        call.rewind()
        self.submit(call)
        return True

    @property
    def calls(self) -> int:
        return sum(len(edge.wire.streams) for edge in self._edges) + len(self._pending)

    # Connectivity

    def connect(self) -> None:
        """Begin to connect, unless that has begun."""
        self._open()
        self._dial()

    def _set_state(self, state: State) -> None:
        if state is self.state:
            return
        self.state = state
        if self.on_state is not None:
            self.on_state(state)

    # Connections

    def _open(self) -> Alarm:
        if self._alarm is None:
            self._loop = asyncio.get_running_loop()
            self._alarm = Alarm(self._loop)
            self._tick()
        return self._alarm

    def _dial(self) -> None:
        if (
            self._dialing is None
            and self.state is not State.SHUTDOWN
            and len(self._usable()) < self.options.connections
        ):
            if self.state is State.IDLE:
                self._set_state(State.CONNECTING)
            self._dialing = self._loop.create_task(self._keep_dialing())

    def _usable(self) -> list[ClientEdge]:
        return [edge for edge in self._edges if not edge.wire.draining]

    async def _keep_dialing(self) -> None:
        """Connect until there are enough connections. While none works, only this one task tries."""
        me = asyncio.current_task()
        try:
            # Before Python 3.12 a cancelled `wait_for` may return normally, so this task checks if it is still wanted.
            while self._dialing is me and len(self._usable()) < self.options.connections:
                if self._failures:
                    await asyncio.sleep(self._backoff())
                try:
                    await self._connect_one()
                except OSError as error:  # ssl.SSLError and TimeoutError are OSErrors
                    self._dial_failed(error)
        finally:
            if self._dialing is me:
                self._dialing = None

    def _backoff(self) -> float:
        options = self.options
        growth = options.backoff_factor ** min(self._failures - 1, 64)  # a float overflows
        seconds = min(options.backoff_first * growth, options.backoff_most)
        spread = random.uniform(1 - options.backoff_jitter, 1 + options.backoff_jitter)  # noqa: S311  # no secret
        return seconds * spread

    async def _connect_one(self) -> None:
        """Make one connection. raises: OSError if that fails, or takes longer than `connect_seconds`."""
        loop = self._loop
        greeted: asyncio.Future[None] = loop.create_future()
        options = self.options
        made = Edge(loop, partial(self._connection, greeted), self._gone, stops_reading=False)

        until = loop.time() + options.connect_seconds
        try:
            await asyncio.wait_for(self._open_transport(made), options.connect_seconds)
            try:
                await asyncio.wait_for(greeted, until - loop.time())
                if made.wire.draining:
                    raise OSError(made.wire.reason)
            except BaseException:
                made.transport.abort()
                raise
        except asyncio.TimeoutError:
            raise OSError("no answer in time") from None
        self._greeted(made)

    async def _open_transport(self, made: ClientEdge) -> None:
        """Connect the socket, with TLS if configured. raises: OSError."""
        try:
            await self._create_connection(made)
        except BaseException:
            made.is_given_up = True
            raise

    async def _create_connection(self, made: ClientEdge) -> None:
        tls: dict[str, Any] = {"ssl": self.options.tls}  # Any: keyword arguments of two methods of the loop
        if isinstance(self._address, str):
            if self.options.tls is not None:
                tls["server_hostname"] = self.options.server_name or "localhost"
            await self._loop.create_unix_connection(lambda: made.protocol, self._address, **tls)
            return
        host, port = self._address
        if self.options.tls is not None:
            tls["server_hostname"] = self.options.server_name or host
        await self._loop.create_connection(lambda: made.protocol, sock=await connect(host, port), **tls)

    def _connection(self, greeted: asyncio.Future[None], edge: ClientEdge) -> ClientConnection:
        connection = ClientConnection(
            self._limits,
            edge.loop.time(),
            edge.wake,
            authority=self.options.server_name or self._authority,
            scheme="https" if self.options.tls else "http",
            user_agent=self.options.user_agent,
            most_discarded=self.options.most_discarded,
            budget=self.options.budget,
        )
        connection.on_greeted = lambda: _settle(greeted, None)
        connection.on_closed = lambda: _settle(greeted, OSError(connection.reason))
        return connection

    def _greeted(self, edge: ClientEdge) -> None:
        if self.state is State.SHUTDOWN:
            edge.cut("the channel is closed")
            return
        connection = edge.wire
        connection.on_room = self._room
        connection.on_leave = self._dial
        connection.on_dropped = self._dropped
        self._edges.append(edge)
        self._set_state(State.READY)
        self._room()

    def _dial_failed(self, error: OSError) -> None:
        self._failures += 1
        self._last_error = _reason(error)
        if self._failures == 1:
            log.warning("%s can't be reached: %s", self.target, self._last_error)
        if not self._usable():
            self._unreachable()

    def _unreachable(self) -> None:
        self._set_state(State.TRANSIENT_FAILURE)
        waiting = [call for call in self._pending if not call.patient]
        self._pending = deque(call for call in self._pending if call.patient)
        self._give_up(deque(waiting), f"Failed to connect: {self._last_error}")

    def _give_up(self, calls: deque[ClientCall], text: str) -> None:
        for _ in range(min(AT_ONCE, len(calls))):
            call = calls.popleft()
            if not call.done:
                call.end(Code.UNAVAILABLE, text, _NO_CONNECTION)
        if calls:
            self._loop.call_soon(self._give_up, calls, text)

    def _gone(self, edge: ClientEdge) -> None:
        if edge not in self._edges:
            return  # the connection never came up, and its dialer reports that
        self._edges.remove(edge)
        self.losses += 1
        log.info("%s: a connection ended: %s", self.target, edge.wire.reason)
        if self.state is State.SHUTDOWN:
            return
        if edge.wire.is_dead:
            self._cut_idle(edge.wire)
        if edge.wire.peer_erred and self.on_fault is not None:
            self.on_fault(edge.wire.reason)
        if edge.wire.pinged_too_often:
            self._limits = replace(self._limits, keepalive_seconds=2 * self._limits.keepalive_seconds)
        useful = edge.wire.answered or self._loop.time() - edge.wire.born > LONG_LIVED
        self._failures = 0 if useful else self._failures + 1
        if not self._usable():
            # The dialer may be waiting to try a second connection, which would be the first one now.
            if self._dialing is not None:
                self._dialing.cancel()
                self._dialing = None
            self._last_error = edge.wire.reason
            if self._failures:
                self._unreachable()
            else:
                self._set_state(State.CONNECTING)
        self._dial()

    def _cut_idle(self, dead: ClientConnection) -> None:
        """Of what was dialled before a connection died without a word, nobody knows whether it leads anywhere.

        Those with calls find out by themselves.
        """
        for edge in list(self._edges):
            if not edge.wire.streams and not edge.wire.has_heard_since(dead):
                edge.cut("another connection is dead")

    def _dropped(self, name: bytes) -> None:
        now = self._loop.time()
        if now >= self._say_dropped_at:
            self._say_dropped_at = now + SAY_AGAIN_SECONDS
            shown = text_of(name[:40])
            log.warning("%s: the field %r of an answer is not legal metadata, and is dropped", self.target, shown)

    def _tick(self) -> None:
        if self.state is State.SHUTDOWN:
            return
        self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)
        now = self._loop.time()
        for edge in list(self._edges):
            edge.tick(now)

    # End

    async def close(self, grace: float | None = None) -> None:
        """Let calls end for `grace` seconds; then end them as UNAVAILABLE, and close the connections.

        grpc.aio would raise CancelledError where such a call is awaited, as if its task had been cancelled.
        """
        self._set_state(State.SHUTDOWN)
        if self._alarm is None:
            return
        dialing, self._dialing = self._dialing, None
        if dialing is not None:
            dialing.cancel()
            await asyncio.gather(dialing, return_exceptions=True)
        until = self._loop.time() + (grace or 0.0)
        while self.calls and self._loop.time() < until:  # noqa: ASYNC110  # an event would cost every call
            await asyncio.sleep(min(0.01, until - self._loop.time()))
        for call in [*self._pending, *(call for edge in self._edges for call in edge.wire.streams.values())]:
            call.cancel(Code.UNAVAILABLE, CLOSED, _NO_CONNECTION)
        self._pending.clear()
        for edge in list(self._edges):
            edge.cut("the channel is closed")
        if self._ticker is not None:
            self._ticker.cancel()
        self._alarm.stop()

    async def __aenter__(self) -> WireChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _parse(target: str) -> tuple[tuple[str, int] | str, str]:
    """Host and port, or the path of a unix socket; and the authority (RFC 9113 section 8.3.1)."""
    if target.startswith("unix:"):
        return target.removeprefix("unix:").removeprefix("//"), "localhost"
    bare = target
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        bare = bare.removeprefix(scheme)
    host, _, port = bare.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"target {target!r} is not host:port or unix:path")
    return (host.strip("[]"), int(port)), bare


def _settle(future: asyncio.Future[None], error: OSError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # marks it as seen: its dialer may have given up before


def client_tls(ca: str | None = None, certificate: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """A TLS context for `ChannelOptions`: TLS 1.2 or later, h2 only.

    ca:               file of trusted authorities; None: the system's.
    certificate, key: files of our own certificate, for mutual TLS.
    raises:           OSError, ssl.SSLError.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _reason(error: OSError) -> str:
    """Why there is no connection, in the system's words, since texts of libraries contain addresses."""
    if isinstance(error, ssl.SSLError) and hint(error):
        return hint(error)
    if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):  # these have error numbers of their own
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
