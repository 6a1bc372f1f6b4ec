"""I/O: one process accepts connections and hands each to the worker that has the fewest.

The kernel spreads connections over sockets that share a port (SO_REUSEPORT) by a hash: of four connections and two
workers, all four are with one worker in an eighth of the cases. And each socket has a queue of its own, which dies with
its process. Here there is one queue, in a process that does nothing else; a connection that a worker had not taken when
it died goes to another, and one that hangs is given none.

The descriptors go through a pair of Unix sockets per worker, one byte with each (SCM_RIGHTS, unix(7)). The worker
answers with how many it has taken in all, and how many it has now.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

_REPORT: Final = struct.Struct("!II")  # taken in all, modulo 2**32; open now
_AT_ONCE: Final = 200  # accepted in one turn of the loop
_PAUSE_SECONDS: Final = 0.5  # when the process or the system has nothing left for a connection
_REPORTS_AT_ONCE: Final = 4096
_ROOM_SECONDS: Final = 0.005  # between two looks at whether somebody can take more
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

MOST_ON_THE_WAY: Final = 64
"""Connections that a worker was handed and has not taken: what waits beyond them waits in the kernel's queue, for
whoever is free first."""

LATE_SECONDS: Final = 1.0
"""A worker that has not taken a connection for so long gets no further one: it hangs, or has more than it can do."""

log = logging.getLogger("gateway.transport")


class Taker:
    """A worker as the one who hands over sees it."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.serves = False  # has it reported?
        self.on_the_way: deque[socket.socket] = deque()  # in order; kept, since another may have to take them
        self.waiting_since = 0.0  # of the first of those
        self.open = 0
        self.taken = 0
        self.handed = 0

    @property
    def load(self) -> int:
        return self.open + len(self.on_the_way)

    def takes(self, now: float) -> bool:
        if not self.serves or len(self.on_the_way) >= MOST_ON_THE_WAY:
            return False
        return not self.on_the_way or now - self.waiting_since < LATE_SECONDS

    def hand(self, connection: socket.socket, now: float) -> None:
        """:raises OSError: if it can't be sent; then it still is the caller's."""
        socket.send_fds(self.channel, [b"c"], [connection.fileno()])
        if not self.on_the_way:
            self.waiting_since = now
        self.on_the_way.append(connection)
        self.handed += 1

    def hear(self, now: float) -> bool:
        """Read its reports, if there are any; answers whether it still is there."""
        try:
            told = self.channel.recv(_REPORTS_AT_ONCE * _REPORT.size)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if told:
            taken, now_open = _REPORT.unpack(told[-_REPORT.size :])  # each was written whole; the latest says all
            self.reported(taken, now_open, now)
        return bool(told)

    def reported(self, taken: int, now_open: int, now: float) -> None:
        for _ in range((taken - self.taken) % 2**32):
            self.on_the_way.popleft().close()
            self.waiting_since = now
        self.taken, self.open, self.serves = taken, now_open, True


def fewest(takers: Iterable[Taker], now: float) -> Taker | None:
    """Who gets the next connection; of those that have equally few, the one that was given fewest so far."""
    able = (taker for taker in takers if taker.takes(now))
    return min(able, key=lambda taker: (taker.load, taker.handed), default=None)


class Handover:
    """Serves one bound socket until `close`, for takers that come and go. Make it on the event loop."""

    def __init__(self, bound: socket.socket) -> None:
        self._bound = bound
        self._takers: list[Taker] = []
        self._homeless: deque[socket.socket] = deque()  # accepted, but nobody could take them
        self._is_reading = False
        self._pause: asyncio.TimerHandle | None = None
        self._served = asyncio.Event()
        self._is_open = False
        self._closed = False
        self._loop = asyncio.get_running_loop()

    async def open(self, backlog: int) -> None:
        """Listen, as soon as the first taker serves: until then clients had better be refused than wait.

        :raises OSError: if somebody else listens there by now.
        """
        await self._served.wait()
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a predecessor's connections may linger
        self._bound.setblocking(False)
        self._bound.listen(backlog)
        self._is_open = True
        self._go_on()

    def join(self) -> tuple[Taker, socket.socket]:
        """A new worker: what is known of it, and its end of the channel, which the caller passes on and closes."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        taker = Taker(ours)
        self._takers.append(taker)
        self._loop.add_reader(ours.fileno(), self._hear, taker)
        return taker, theirs

    def leave(self, taker: Taker) -> None:
        """It has ended, or takes no more: others take what it has not."""
        if taker not in self._takers:
            return
        taker.hear(time.monotonic())  # what it took before its end is not to be handed on
        self._takers.remove(taker)
        self._loop.remove_reader(taker.channel.fileno())
        taker.channel.close()
        self._homeless.extend(taker.on_the_way)
        taker.on_the_way.clear()
        if self._closed:
            self._drop_homeless()
        self._go_on()

    async def close(self, seconds: float) -> None:
        """Hand over what is in the queue, tell the takers that it was the last, and hold the port no more.

        seconds: for takers to make room. Reports are heard on, since what was handed over is not all taken yet.
        """
        give_up = self._loop.time() + seconds
        while not self._hand_all() and self._loop.time() < give_up:  # noqa: ASYNC110  # who hangs sets no event
            await asyncio.sleep(_ROOM_SECONDS)
        self._closed, self._is_open = True, False
        self._stop_reading()
        if self._pause is not None:
            self._pause.cancel()
        self._bound.close()
        for taker in self._takers:
            try:
                taker.channel.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # it has gone
        self._drop_homeless()

    def _drop_homeless(self) -> None:
        while self._homeless:
            self._homeless.popleft().close()

    def _hear(self, taker: Taker) -> None:
        if not taker.hear(time.monotonic()):
            self.leave(taker)
            return
        self._served.set()
        self._go_on()

    def _go_on(self) -> None:
        if not self._is_open or self._pause is not None or not any(taker.serves for taker in self._takers):
            return
        if not self._is_reading:
            self._is_reading = True
            self._loop.add_reader(self._bound.fileno(), self._hand_all)
        if self._homeless:
            self._loop.call_soon(self._hand_all)

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._bound.fileno())

    def _rested(self) -> None:
        self._pause = None
        self._go_on()

    def _hand_all(self) -> bool:
        """Answers whether that was all: nothing is left in the queue, or nobody to take it."""
        if not self._is_open:
            return True
        for _ in range(_AT_ONCE):
            if fewest(self._takers, time.monotonic()) is None:
                self._stop_reading()  # until one reports
                return not any(each.serves for each in self._takers)
            if not self._homeless:
                try:
                    accepted, _ = self._bound.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    return True
                except OSError as error:
                    log.error("no connection can be accepted for %g s: %s", _PAUSE_SECONDS, error)
                    self._stop_reading()
                    if self._pause is None:
                        self._pause = self._loop.call_later(_PAUSE_SECONDS, self._rested)
                    return False
                self._homeless.append(accepted)
            self._hand_next()
        return False

    def _hand_next(self) -> None:
        now = time.monotonic()
        taker = fewest(self._takers, now)
        if taker is None:
            return
        connection = self._homeless.popleft()
        try:
            taker.hand(connection, now)
        except OSError as error:
            self._homeless.append(connection)
            if isinstance(error, ConnectionError):
                self.leave(taker)
            else:  # its channel is full, or the kernel has too many descriptors on their way: neither is its end
                taker.serves = False  # until it reports, which it does each second


class HandedOver:
    """What a worker accepts from, in place of a listening socket."""

    def __init__(self, channel: socket.socket, count: Callable[[], int], lost: Callable[[], None]) -> None:
        """count: the connections that this process has. lost: hears that one came for which no descriptor was left."""
        channel.setblocking(False)
        self._channel = channel
        self._count = count
        self._lost = lost
        self._taken = 0
        self.ended = asyncio.Event()
        """None comes any more."""

    def fileno(self) -> int:
        return self._channel.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            told, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1, _CLOEXEC)
            if not told:
                self.ended.set()
                raise EOFError
            self._taken = (self._taken + 1) % 2**32
            self._report(self._count() + len(descriptors))
            if descriptors:
                return socket.socket(fileno=descriptors[0]), None
            self._lost()  # the kernel has closed it

    async def wait_last(self, seconds: float) -> None:
        """Until none comes any more, but no longer than that."""
        try:
            await asyncio.wait_for(self.ended.wait(), seconds)
        except asyncio.TimeoutError:
            return

    def report(self) -> None:
        """Say how many there are now: when some have gone, and once in a while."""
        if self._channel.fileno() >= 0:
            self._report(self._count())

    def _report(self, count: int) -> None:
        try:
            self._channel.send(_REPORT.pack(self._taken, count))
        except OSError:
            return  # nobody listens, or has not for long; the next report says all

    def close(self) -> None:
        self.ended.set()
        self._channel.close()
