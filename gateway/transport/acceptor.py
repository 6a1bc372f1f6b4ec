"""I/O: accepts connections, by TLS too, and loses none that the kernel has accepted already when it stops.

asyncio's own servers tell of a TLS connection only after its handshake: whoever begins many and ends none would take
every descriptor, and nobody would hear of it. And they close with connections in their queue, which the kernel resets.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

from gateway.transport.sockets import peer_name
from gateway.transport.tls import failed_handshake

_AT_ONCE: Final = 200  # accepted in one turn of the loop
_LAST_TURNS: Final = 20  # for what is in the queue at the end, while more may still come
_FAREWELL_SECONDS: Final = 0.05  # until a connection whose handshake has failed is closed on our side
_LEAVE_SECONDS: Final = 1.0  # for its client to close it
_PAUSE_SECONDS: Final = 0.5  # when the process or the system has nothing left for a connection

log = logging.getLogger("gateway.transport")


class Source(Protocol):
    """Where connections come from: a listening socket, or what hands them over."""

    def fileno(self) -> int: ...

    def accept(self) -> tuple[socket.socket, Any]:
        """The next one. Never blocks: raises BlockingIOError while there is none, and EOFError once none can come."""

    def close(self) -> None: ...


class Acceptor:
    """Serves one source from `start` to `close`."""

    def __init__(
        self,
        source: Source,
        tls: ssl.SSLContext | None,
        *,
        protocol: Callable[[], asyncio.Protocol],
        farewell: Callable[[], asyncio.Protocol],
        refuses: Callable[[int], bool],
        shaken: Callable[[asyncio.Protocol], None],
        patience: float,
        failed: Callable[[str, str, str], None] = lambda reason, peer, text: None,
    ) -> None:
        """protocol: one is made as a connection is accepted. refuses: by its descriptor, must a new connection go?
        farewell: makes one that tells its peer so; with TLS that is worth no handshake, and the connection is closed.
        shaken: its protocol has the connection, after its handshake if there is TLS, or never will. patience: seconds
        for a handshake. failed: with the reason, the peer and a text, when one fails and not because its client left.
        """
        self._source = source
        self._tls = tls
        self._protocol = protocol
        self._farewell = farewell
        self._refuses = refuses
        self._shaken = shaken
        self._patience = None if tls is None else patience
        self._failed = failed
        self._shaking: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._go_on()

    async def last(self, seconds: float) -> None:
        """Take what is in the queue, and give handshakes so long to end: who is half-way in counts as a caller."""
        turns = 0
        while self._accept() and turns < _LAST_TURNS:
            turns += 1
            await asyncio.sleep(0)
        if self._shaking:
            await asyncio.wait(self._shaking, timeout=seconds)

    def close(self) -> None:
        """Accept nothing more, and end handshakes: no call has begun on them."""
        if self._source.fileno() < 0:
            return
        self._rest()
        self._source.close()
        for task in self._shaking:
            task.cancel()

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._source.fileno(), self._accept)

    def _rest(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._loop.remove_reader(self._source.fileno())

    def _accept(self) -> bool:
        """Answers whether there may be more."""
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = self._source.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return False
            except EOFError:
                self._rest()
                return False
            except OSError as error:
                log.error("no connection can be accepted for %g s: %s", _PAUSE_SECONDS, error)
                self._rest()
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._go_on)
                return False
            if not self._refuses(accepted.fileno()):
                self._begin(accepted, self._protocol())
            elif self._tls is not None:
                accepted.close()
            else:
                self._begin(accepted, self._farewell())
                return True  # its descriptor must be free again before the next one takes another
        return True

    def _begin(self, accepted: socket.socket, protocol: asyncio.Protocol) -> None:
        task = self._loop.create_task(self._shake(accepted, protocol))
        self._shaking.add(task)
        task.add_done_callback(partial(self._done, accepted, protocol))

    def _done(self, accepted: socket.socket, protocol: asyncio.Protocol, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        self._shaken(protocol)
        if task.cancelled():  # it may not have begun
            accepted.close()

    async def _shake(self, accepted: socket.socket, protocol: asyncio.Protocol) -> None:
        """Shake hands; then the connection is its protocol's. One that fails is its client's matter, as in asyncio."""
        accepted.setblocking(False)
        peer = ""
        try:
            if self._tls is not None:
                peer = _peer_of(accepted)
                failed_handshake.set(partial(self._handshake_failed, accepted, peer))  # in this task alone
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=self._patience
            )
        except ConnectionAbortedError as error:
            if "handshake" in str(error):  # as both loops say
                self._failed("timeout", peer, f"no TLS handshake in {self._patience:g} s")
        except (OSError, TimeoutError, asyncio.TimeoutError):
            return

    def _handshake_failed(self, accepted: socket.socket, peer: str, reason: str, text: str) -> None:
        """Tell of it, and close once the peer has been told, which both loops do in this turn or the next."""
        self._failed(reason, peer, text)
        self._loop.call_later(_FAREWELL_SECONDS, _shut, accepted, socket.SHUT_WR)
        self._loop.call_later(_LEAVE_SECONDS, _shut, accepted, socket.SHUT_RDWR)


def _shut(accepted: socket.socket, how: int) -> None:
    with suppress(OSError):  # it has gone already
        accepted.shutdown(how)


def _peer_of(accepted: socket.socket) -> str:
    try:
        return peer_name(accepted.getpeername())
    except OSError:  # it has gone already
        return "unknown"
