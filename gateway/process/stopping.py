"""Values: the meaning of a signal to stop, which depends on the signals before it."""

from __future__ import annotations

from enum import Enum


class Stop(Enum):
    """What a signal asks for."""

    DRAIN = "drain"  # finish the calls in flight
    AGAIN = "again"  # the same again, which changes nothing
    NOW = "now"  # cut the calls in flight


class StopSignals:
    """Counts SIGTERM and SIGINT of one process. Times are seconds on any one clock.

    One stop is often two signals: systemd sends SIGTERM to every process of a service, and the supervisor sends one to
    its workers; a terminal's Ctrl-C reaches a whole group, and a wrapper in it passes it on. So the second one asks for
    nothing new. The third one, or one after the grace, means that the sender does not want to wait.
    """

    def __init__(self, grace: float) -> None:
        """grace: seconds that calls in flight may take to end."""
        self._grace = grace
        self._first = 0.0
        self._count = 0

    def arrived(self, now: float) -> Stop:
        self._count += 1
        if self._count == 1:
            self._first = now
            return Stop.DRAIN
        return Stop.NOW if self._count > 2 or now - self._first > self._grace else Stop.AGAIN
