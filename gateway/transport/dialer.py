"""The dialer: `WireChannel` keeps a few connections to one target and puts calls on them.

A call waits only while a connection is first being tried; once the target is known to be unreachable, calls
fail at once until it answers again (`wait_for_ready` waits instead). A call that the server says it has not looked at
goes out once more by itself (gRFC A6, transparent retry).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Final

from gateway.http2.frames import EngineError
from gateway.http2.limits import UPSTREAM, Limits
from gateway.rpc.budget import Budget
from gateway.rpc.client import ClientCall, ClientConnection
from gateway.rpc.metadata import Fields, text_of
from gateway.status import Code, Origin
from gateway.transport.edge import Alarm, Edge
from gateway.transport.sockets import connect

ClientEdge = Edge[ClientConnection]

CLOSED: Final = "The channel is closed"
CROWDED: Final = "Too many calls wait for a connection"
_NO_CONNECTION: Final = Origin.CONNECTION
LONG_LIVED: Final = 5.0  # seconds; a connection that ended sooner and answered nothing counts as a failed attempt

log = logging.getLogger("gateway.transport")

TICK_SECONDS: Final = 1.0
SAY_AGAIN_SECONDS: Final = 60.0  # what may go on for long is logged no more often
AT_ONCE: Final = 100  # calls that waited, begun or ended in one turn of the loop


class State(Enum):
    """As gRPC's connectivity API names them."""

    IDLE = "idle"
    CONNECTING = "connecting"
    READY = "ready"
    TRANSIENT_FAILURE = "transient failure"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """How a channel keeps its connections."""

    connections: int = 2  # one can be replaced while the other serves; more only cost Triton threads
    together: int = 32  # calls that one takes before the next gets any: what travels together costs less
    limits: Limits = UPSTREAM
    tls: ssl.SSLContext | None = None  # as `client_tls` makes it
    server_name: str | None = None  # to check the certificate against, if not the target's host
    user_agent: str = "inference-gateway"
    connect_seconds: float = 5.0  # for TCP, TLS and the server's SETTINGS
    backoff_first: float = 0.1  # seconds; a restarted server is found again quickly ...
    backoff_factor: float = 1.6
    backoff_most: float = 1.5  # ... and a dead one asked less than once a second
    backoff_jitter: float = 0.2
    most_discarded: int = 0  # small calls that are given up and may finish all the same, at once on a connection
    max_pending: int = 1000  # calls that wait for a connection or for room on one
    budget: Budget | None = None  # for answers that are collected whole; None: each connection has its own


class WireChannel:
    """Connections to one target: "host:port", "dns:///host:port", "ipv4:…", "ipv6:[…]:port" or "unix:path".

    Names are resolved anew for every connection. Belongs to the event loop it is first used on; nothing is connected
    before the first call or `connect`.
    """

    def __init__(self, target: str, options: ChannelOptions | None = None) -> None:
        self.target = target
        self.options = options or ChannelOptions()
        self.state = State.IDLE
        self.on_state: Callable[[State], None] | None = None
        self.on_fault: Callable[[str], None] | None = None  # told why a connection was cut for what the server did
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
        self._address, self._authority = _parse(target)

    def __repr__(self) -> str:
        return f"<WireChannel {self.target} {self.state.value}, {len(self._edges)} connections, {self.calls} calls>"

    # Calls

    def call(self, path: bytes, fields: Fields = (), deadline: float | None = None) -> ClientCall:
        """A call to fill in and `submit`. deadline: on the loop's clock (that of `time.monotonic()`)."""
        alarm = self._alarm or self._open()
        return ClientCall(path, fields, alarm.deadlines, deadline, self._loop.time() if deadline is not None else 0.0)

    def submit(self, call: ClientCall, *, wait_for_ready: bool = False) -> None:
        """Put a call on a connection, now or as soon as there is one. Its `on_done` never comes before this returns."""
        if not call.retried and not call.request_more:
            call.on_unprocessed = self._try_once_more
        if self._pending or not self._start(call):
            self._wait(call, wait_for_ready)

    def _start(self, call: ClientCall) -> bool:
        best: ClientConnection | None = None
        fewest = sys.maxsize
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
            log.info("%s: %s", self.target, error)  # its ids are used up, or it has just died
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
        """A connection may take more calls."""
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
        """Begin to connect, if that is not under way."""
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
        """Until there are enough connections. While none works, this one task is the only one that tries."""
        me = asyncio.current_task()
        try:
            # A cancelled `wait_for` may return all the same (before Python 3.12), so who was replaced looks for itself.
            while self._dialing is me and len(self._usable()) < self.options.connections:
                if self._failures:
                    await asyncio.sleep(self._backoff())
                try:
                    await self._connect_one()
                except OSError as error:  # ssl.SSLError and TimeoutError are such too
                    self._dial_failed(error)
        finally:
            if self._dialing is me:
                self._dialing = None

    def _backoff(self) -> float:
        options = self.options
        growth = options.backoff_factor ** min(self._failures - 1, 64)  # a float can't grow for ever
        seconds = min(options.backoff_first * growth, options.backoff_most)
        spread = random.uniform(1 - options.backoff_jitter, 1 + options.backoff_jitter)  # noqa: S311  # no secret
        return seconds * spread

    async def _connect_one(self) -> None:
        """raises: OSError if there is no connection within the time allowed."""
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
        """raises: OSError."""
        tls: dict[str, Any] = {"ssl": self.options.tls}  # the keyword arguments of two methods of the loop
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
            return  # it never came up; whoever dialled knows
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
            if self._dialing is not None:  # it may be sleeping over a second connection; this is the first now
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
            log.warning("%s: the field %r of an answer is no legal metadata, and is dropped", self.target, shown)

    def _tick(self) -> None:
        if self.state is State.SHUTDOWN:
            return
        self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)
        now = self._loop.time()
        for edge in list(self._edges):
            edge.tick(now)

    # End

    async def close(self, grace: float | None = None) -> None:
        """Let calls end for `grace` seconds; then they are UNAVAILABLE, and the connections closed.

        (grpc.aio would raise CancelledError where such a call is awaited, which looks as if its task was cancelled.)
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
    """Where to connect (host and port, or a unix socket's path), and the authority."""
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
        future.exception()  # seen: whoever waits for it may have given up before


def client_tls(ca: str | None = None, certificate: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """A TLS context for `ChannelOptions`: TLS 1.2 or later, h2 only. `ca`: file of trusted authorities, if not the
    system's. `certificate`, `key`: our own, for mTLS.

    raises: OSError, ssl.SSLError.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _reason(error: OSError) -> str:
    """Why there is no connection, as the system names it: libraries put addresses into their texts."""
    if error.errno and not isinstance(error, (ssl.SSLError, socket.gaierror)):  # whose numbers are their own
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
