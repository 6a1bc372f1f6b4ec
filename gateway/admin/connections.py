"""Admin: limits the number of connections and their time. May depend on asyncio alone.

A connection costs a descriptor, which callers and upstreams need too, and a health check must always get one. So when
there are too many, the connection that has been idle for longest is closed for the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Final

_log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 32  # half of the descriptors that are kept from callers
HEAD_SECONDS: Final = 10.0  # for a request's head, from the connection's begin or from the head's first byte
IDLE_SECONDS: Final = 75.0  # for reading an answer and asking again; longer than the minute between two scrapes
ADMIN: Final = "admin"  # reason for closing, as a label
_QUIET_SECONDS: Final = 60.0


class Connection:
    """A connection, which is closed unless it asks in time."""

    def __init__(self, among: Connections, transport: asyncio.Transport) -> None:
        self._among = among
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._in_head = False
        self._end: asyncio.TimerHandle | None = None
        self.is_answered = False  # is a handler making its answer?
        self.head_begins()

    def head_begins(self) -> None:
        """Note that bytes of a head have arrived. Further bytes give no more time."""
        if not self._in_head:
            self._in_head = True
            self._close_after(self._among.head_seconds)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While entered, a handler answers a complete request."""
        self._in_head, self.is_answered = False, True
        self._close_after(self._among.idle_seconds)
        try:
            yield
        finally:
            self.is_answered = False

    def close(self) -> None:
        self.gone()
        self._transport.abort()

    def gone(self) -> None:
        """Note that the connection is lost or closed."""
        if self._end is not None:
            self._end.cancel()
        self._among.remove(self)

    def _close_after(self, seconds: float) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self._loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self._in_head:
            self._among.log_closed("it did not send a whole request in time")
        self.close()


class Connections:
    """The connections of the admin plane; the last one is the one that asked last."""

    def __init__(
        self,
        closed: Callable[[str], None] = lambda why: None,
        *,
        most: int = MOST_CONNECTIONS,
        head_seconds: float = HEAD_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """closed: called with the reason for each connection that was closed because there were too many."""
        self.head_seconds = head_seconds
        self.idle_seconds = idle_seconds
        self._closed = closed
        self._most = most
        self._open: dict[Connection, None] = {}
        self._quiet_until = -math.inf
        self._unlogged = 0

    def __len__(self) -> int:
        return len(self._open)

    def maybe_add(self, transport: asyncio.Transport) -> Connection | None:
        """A new connection; None, having closed it, if all others are being answered."""
        if len(self._open) >= self._most:
            self._closed(ADMIN)
            self.log_closed(f"there were more than {self._most} at once")
            waiting = next((each for each in self._open if not each.is_answered), None)
            if waiting is None:
                transport.abort()
                return None
            waiting.close()
        connection = Connection(self, transport)
        self._open[connection] = None
        return connection

    def remove(self, connection: Connection) -> None:
        self._open.pop(connection, None)

    def log_closed(self, why: str) -> None:
        """Log that a connection was closed, at most once a minute."""
        self._unlogged += 1
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            _log.warning(
                "%d connections to the admin plane were closed, the last one because %s; logged at most once a minute",
                self._unlogged,
                why,
            )
            self._quiet_until, self._unlogged = now + _QUIET_SECONDS, 0
