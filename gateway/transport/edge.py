"""One socket and the wire connection on it: reads, a few writes per turn of the loop, and back-pressure both ways."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import ssl
import sys
import termios
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast

from gateway.http2.engine import WRITE_SIZE
from gateway.rpc.connection import Connection
from gateway.rpc.deadlines import Deadlines
from gateway.transport.in_place import InPlace
from gateway.transport.inflating import inflate_elsewhere
from gateway.transport.tls import hint, text_of

SOCKET_BUFFER: Final = 65_536  # unsent bytes of a socket, above which nothing more is framed, and little is read

TURN_BYTES: Final = 262_144  # bytes read from one connection in a turn of the loop; without it, megabytes
LAID_AS: Final = 4  # so many bytes that are read straight to where they belong count as one: nothing else is done

MANY_BYTES: Final = 16_384  # read in a turn of the loop, from which on `on_bytes` hears of them

LAID_SECONDS: Final = 2.0  # seconds without a body to be laid, after which reads are bytes again

MOST_PIECES: Final = 1024  # of one write (IOV_MAX of Linux)

LINGER_SECONDS: Final = 5.0  # seconds for the last bytes of a connection that is closing

Wire = TypeVar("Wire", bound=Connection[Any])  # a connection of either role

log = logging.getLogger("gateway.transport")


class Edge(Generic[Wire]):
    """The socket's side of a wire connection, which `make` creates when the socket is connected."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Callable[[Edge[Wire]], Wire],
        gone: Callable[[Edge[Wire]], None],
        *,
        stops_reading: bool,
    ) -> None:
        """stops_reading: is nothing read from a peer that reads nothing itself?"""
        self.loop = loop
        self.transport: asyncio.Transport
        self.wire: Wire
        self.on_bytes: Callable[[int], None] | None = None  # hears how many bytes a turn has read, if they are many
        self.is_given_up = False  # by whoever dialled: uvloop has closed its transport, and does not say so
        self._make = make
        self._gone = gone
        self._stops_reading = stops_reading
        self._scheduled = False
        self._turn_bytes = 0  # read in this turn of the loop
        self._turn_spared = 0  # of these, what does not count as work
        self._rests = False  # reading is paused until the next turn of the loop
        self._full_since: float | None = None
        self._waiting = 0  # bytes that the peer had not taken at the last tick with a full socket
        self._closing_since: float | None = None
        self._is_in_place = False  # is the socket read by `InPlace`?
        self._fd = -1  # of the socket, where large output is written to it directly; with TLS it never is
        self._laid_at = 0.0  # when a body was last to be laid where it belongs

    # Called by asyncio

    @property
    def protocol(self) -> asyncio.Protocol:
        """This object: it has the methods of asyncio.Protocol, but a native class can't have that as its base."""
        itself: Any = self
        return itself  # type: ignore[no-any-return]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=SOCKET_BUFFER)
        tls = transport.get_extra_info("ssl_object")
        self.wire = self._make(self)
        self.wire.on_bug = _log_bug
        if tls is None:  # with it all bytes are copied anyway
            self.wire.on_laid = self._lay
            self._fd = transport.get_extra_info("socket").fileno()
        self.wire.elsewhere = inflate_elsewhere
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.wire.not_chosen()
        self.wake()

    def data_received(self, data: bytes) -> None:
        self.wire.receive(data, self.loop.time())
        self._has_read(len(data))

    def take(self, view: memoryview) -> None:
        """Take bytes that are not there any more once this has returned."""
        self.wire.receive_view(view, self.loop.time())
        self._has_read(len(view))

    def filled(self, size: int) -> None:
        """So many bytes are where `wire.maybe_room` has told to read them."""
        self.wire.filled(size, self.loop.time())
        self._turn_spared += size - size // LAID_AS
        self._has_read(size)

    def _has_read(self, size: int) -> None:
        self._turn_bytes += size
        if self._turn_bytes - self._turn_spared > TURN_BYTES or self.wire.turn_left <= 0:
            self._rests = True
            self.transport.pause_reading()
        if not self._scheduled and (self._rests or self.wire.has_output or self.wire.has_work):
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def pause_writing(self) -> None:
        self._full_since = self.loop.time()
        self.wire.full = True
        if self._stops_reading:
            self.wire.reads = False
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        self._full_since = None
        self.wire.full, self.wire.reads = False, True
        if self._stops_reading and not self.transport.is_closing():
            self.transport.resume_reading()
        self.wake()

    def eof_received(self) -> bool:
        return False  # closes: HTTP/2 has no half-open connections

    def connection_lost(self, exc: Exception | None) -> None:
        self.wire.close(self.wire.reason or _end_of(exc, self.wire))
        self._gone(self)

    # Called by the wire connection

    def _lay(self) -> None:
        self._laid_at = self.loop.time()
        if not self._is_in_place:
            self._is_in_place = True
            reader = InPlace(self.protocol, self.take, self.wire.maybe_room, self.filled)
            self.loop.call_soon(self._read_by, reader)

    def _read_by(self, protocol: asyncio.BaseProtocol) -> None:
        """Have another protocol read the socket. uvloop chooses how it reads when it begins to."""
        transport = self.transport
        if transport.is_closing():
            return
        is_reading = transport.is_reading()
        if is_reading:
            transport.pause_reading()
        transport.set_protocol(protocol)
        if is_reading:
            transport.resume_reading()

    def wake(self) -> None:
        """Write soon: there may be output."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._turn_bytes > MANY_BYTES and self.on_bytes is not None:
            self.on_bytes(self._turn_bytes)
        self._turn_bytes = self._turn_spared = 0
        self.wire.advance()
        if self.is_given_up or (self._closing_since is None and self.transport.is_closing()):
            return  # uvloop allows no more calls on it
        if self._rests and not self.wire.is_late:
            self._rests = False
            if self.wire.reads and not self.transport.is_closing():
                self.transport.resume_reading()
        while self._full_since is None:
            if self.wire.has_large_output:
                pieces, size = self.wire.large_output()
                if size:
                    self._write(pieces, size)
                    continue
            data = self.wire.output()
            if data:
                self.transport.write(data)
            # When `output` closes the connection, the next call returns the GOAWAY.
            if not data or (len(data) < WRITE_SIZE and not self.wire.closed):
                break
        if self.wire.closed and self._closing_since is None:
            self._closing_since = self.loop.time()
            if self.wire.is_dead:
                self.transport.abort()
            else:
                self.transport.close()  # closes when all is written

    def _write(self, pieces: list[bytes | memoryview], size: int) -> None:
        """Write what the socket takes at once, and leave a copy of the rest to the transport.

        Else that would keep the pieces until its peer has read them, and they may be memory that others wait for.
        """
        taken, transport = 0, self.transport
        if self._fd >= 0 and not transport.get_write_buffer_size() and not transport.is_closing():
            with contextlib.suppress(OSError):  # it is full, or the transport finds out what is wrong with it
                taken = os.writev(self._fd, pieces[:MOST_PIECES])
        if taken < size:
            transport.write(b"".join(pieces)[taken:])

    # Called by the owner

    def tick(self, now: float) -> None:
        """Check timers, once a second."""
        self.wire.tick(now)
        if self._is_in_place and now - self._laid_at > LAID_SECONDS:
            self._is_in_place = False
            self._read_by(self.protocol)
        if self._full_since is not None and self._has_moved():
            self._full_since = now
        stalled = self._full_since is not None and now - self._full_since > self.wire.limits.write_stall_seconds
        lingers = self._closing_since is not None and now - self._closing_since > LINGER_SECONDS
        if stalled or lingers:
            self.wire.close("the peer reads nothing")
            self.transport.abort()

    def _has_moved(self) -> bool:
        """Has the peer taken bytes since the last tick? A slow peer leaves the buffer full, so its size tells too
        little."""
        waiting = self.transport.get_write_buffer_size() + _unacknowledged(self.transport)
        moved = self._waiting - waiting
        self._waiting = waiting
        return moved >= self.wire.limits.min_rate

    def cut(self, reason: str) -> None:
        """Close now, with a GOAWAY."""
        self.wire.break_off(0, reason)
        self._flush()


def _end_of(error: Exception | None, wire: Connection[Any]) -> str:
    """Why a connection has ended that nobody here has closed."""
    if isinstance(error, ssl.SSLError):
        return hint(error) or text_of(error)
    stranger = wire.engine.maybe_stranger
    if stranger is not None:
        return str(stranger)
    if wire.greeted:
        return "the peer closed the connection"
    return "the peer closed the connection before it spoke HTTP/2; is it a gRPC port? (Triton's is 8001, not 8000)"


class Alarm:
    """The timer of the event loop that expires `Deadlines`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.deadlines = Deadlines()
        self.deadlines.clock = loop.time
        self.deadlines.on_earlier = self._set
        self.deadlines.on_bug = _log_bug
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.deadlines.expire(self._loop.time())
        following = self.deadlines.next_at()
        if following is not None:
            self._set(following)  # though what expired may have set it already

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the kernel holds for the peer (on Linux; elsewhere 0)."""
    sock = transport.get_extra_info("socket")
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:  # the socket has just closed, or the system can't tell
        return 0


def _log_bug(error: Exception) -> None:
    log.error("a call's handler failed", exc_info=error)
