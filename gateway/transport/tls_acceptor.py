"""I/O: accepts TLS connections, and counts those that are in their handshake.

asyncio's own servers report a TLS connection only after its handshake. With them a client that begins many handshakes
and ends none would take every file descriptor unnoticed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

_AT_ONCE: Final = 200  # connections accepted in one turn of the loop
_PAUSE_SECONDS: Final = 0.5  # pause when the process or the system has no descriptor left

log = logging.getLogger("gateway.transport")


class TlsAcceptor:
    """Accepts on one listening socket, from `start` to `close`."""

    def __init__(
        self,
        bound: socket.socket,
        tls: ssl.SSLContext,
        *,
        protocol: Callable[[], asyncio.Protocol],
        refuses: Callable[[int], bool],
        shaken: Callable[[asyncio.Protocol], None],
        patience: float,
    ) -> None:
        """bound:    a bound, non-blocking socket.
        protocol: makes the protocol of an accepted connection.
        refuses:  says whether to close a new connection, by its file descriptor.
        shaken:   called when a protocol's handshake has ended, successfully or not.
        patience: seconds for a handshake.
        """
        self._bound = bound
        self._tls = tls
        self._protocol = protocol
        self._refuses = refuses
        self._shaken = shaken
        self._patience = patience
        self._shaking: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._pause: asyncio.TimerHandle | None = None

    def start(self, backlog: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound.listen(backlog)
        self._go_on()

    def close(self) -> None:
        """Accept no more, and abort handshakes: their connections have no calls yet."""
        if self._bound.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._bound.fileno())
        self._bound.close()
        for task in self._shaking:
            task.cancel()

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._bound.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("no connection can be accepted for %g s: %s", _PAUSE_SECONDS, error)
                self._loop.remove_reader(self._bound.fileno())
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._go_on)
                return
            if self._refuses(accepted.fileno()):
                accepted.close()
                continue
            protocol = self._protocol()
            task = self._loop.create_task(self._shake(accepted, protocol))
            self._shaking.add(task)
            task.add_done_callback(partial(self._done, accepted, protocol))

    def _done(self, accepted: socket.socket, protocol: asyncio.Protocol, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        self._shaken(protocol)
        if task.cancelled():  # a task that never began has closed nothing
            accepted.close()

    async def _shake(self, accepted: socket.socket, protocol: asyncio.Protocol) -> None:
        """Do the handshake, then hand the connection to its protocol. A failure is not logged, as in asyncio."""
        accepted.setblocking(False)
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(OSError, TimeoutError, asyncio.TimeoutError):
            await self._loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=self._patience
            )
