"""Asks the door about each call, and ends those that may not be made. It is the transport's `admit`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from gateway.access.door import Door
from gateway.access.rpcs import PATHS, STREAMING
from gateway.errors import Forbidden, GatewayError, Unauthenticated, UnknownMethod
from gateway.rpc.server import ServerCall

_log = logging.getLogger(__name__)

_QUIET_SECONDS: Final = 60.0
_WRITTEN_SECONDS: Final = 0.02
"""How long the refusal of a stream waits. Clients on grpc.aio write their first message after the header list, and if
the call has ended by then they say "Internal error from Core" in place of its status."""
_MOST_UNREAD: Final = 65_536  # bytes of a message that comes meanwhile; nobody looks at it


def _ignore(body: bytes, compressed: bool) -> None: ...


class Doorkeeper:
    """Lets calls in, or refuses them. What it refuses is counted, and logged once a minute: strangers cause it."""

    def __init__(self, door: Door, refused: Callable[[str], None]) -> None:
        """refused: hears of each call that is refused, and why, in one of few words."""
        self._door = door
        self._refused = refused
        self._quiet_until = 0.0
        self._refusals = 0  # since the last log line

    def admit(self, call: ServerCall) -> bool:
        """Give a call its head behind the door, or end it."""
        try:
            entry = self._door.enter(call.head, call.server.certificate)
        except GatewayError as error:
            self._refuse(call, error)
            return False
        call.head = entry.head
        if entry.most_bytes:
            call.most_bytes = entry.most_bytes
        return True

    def _refuse(self, call: ServerCall, error: GatewayError) -> None:
        if PATHS.get(call.head.path) in STREAMING:
            call.streaming = True
            call.most_bytes = _MOST_UNREAD
            call.on_message = _ignore
            asyncio.get_running_loop().call_later(_WRITTEN_SECONDS, call.fail, error.code, error.text)
        else:
            call.fail(error.code, error.text)
        if isinstance(error, UnknownMethod):
            return
        reason = error.reason if isinstance(error, Unauthenticated) else error.code.name.lower()
        self._refused(reason)
        self._refusals += 1
        now = time.monotonic()
        if now >= self._quiet_until:
            kind = "was" if self._refusals == 1 else "were"
            what = "may not call it" if isinstance(error, Forbidden) else error.text
            _log.warning(
                "%d calls %s refused; the last one, from %s: %s (logged at most once a minute)",
                self._refusals, kind, call.peer, what,
            )  # fmt: skip
            self._quiet_until, self._refusals = now + _QUIET_SECONDS, 0
