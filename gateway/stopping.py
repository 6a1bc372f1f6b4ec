"""Values: what a signal that asks a process to stop means, after those that came before it."""

from __future__ import annotations

from enum import Enum


class Stop(Enum):
    """What is asked for."""

    DRAIN = "drain"  # finish the calls in flight
    AGAIN = "again"  # the same once more, which changes nothing
    NOW = "now"  # cut them


class StopSignals:
    """Counts SIGTERM and SIGINT of one process. Times are seconds on any one clock.

    One stop is often two signals: systemd sends SIGTERM to every process of a service, and the supervisor sends one to
    its workers; a terminal's Ctrl-C reaches a whole group, and a wrapper in it passes it on. So the second one asks for
    nothing new. The third one, or one after the grace, comes from somebody who will not wait.
    """

    def __init__(self, grace: float) -> None:
        """grace: how long calls in flight may take to end."""
        self._grace = grace
        self._first = 0.0
        self._count = 0

    def arrived(self, now: float) -> Stop:
        self._count += 1
        if self._count == 1:
            self._first = now
            return Stop.DRAIN
        return Stop.NOW if self._count > 2 or now - self._first > self._grace else Stop.AGAIN
