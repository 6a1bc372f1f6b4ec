"""How many merged requests may be in flight at a time: climbs to where throughput is best, stays low where it is flat.

With one in flight everything that arrives meanwhile leaves together, which is best for a model that is cheaper than its
request. A model that computes for long on several instances needs more. Which it is shows in the throughput, so it is
tried: one step up or down, kept if rows per second grew by a margin. Pure: instants are arguments.
"""

from __future__ import annotations

from typing import Final

_EPOCH_SECONDS: Final = 0.25  # long enough for tens of batches of a tiny model, short enough to adapt within seconds
_EPOCH_BATCHES: Final = 8
_MARGIN: Final = 1.05  # what is less may be noise
_REST_EPOCHS: Final = 40  # how long a choice that was found best is kept before another is tried, about 10 s


class Window:
    """Adapts between 1 and `most`."""

    __slots__ = ("_batches", "_began", "_best", "_most", "_rest", "_rows", "_step", "_trial", "allowed")

    def __init__(self, most: int, now: float) -> None:
        self.allowed = 1
        self._most = most
        self._began = now
        self._rows = 0
        self._batches = 0
        self._best = 0.0  # rows per second with the settled number
        self._trial = 0  # the number settled on while another is tried; 0 if none is
        self._rest = 0
        self._step = 1  # the direction to try next

    def ended(self, rows: int, was_full: bool, now: float) -> None:
        """A batch has come back. was_full: were others waiting, so that a larger window could have been used?"""
        self._rows += rows
        self._batches += 1
        seconds = now - self._began
        if seconds < _EPOCH_SECONDS or self._batches < _EPOCH_BATCHES:
            return
        rate = self._rows / seconds
        self._began, self._rows, self._batches = now, 0, 0
        self._decide(rate, was_full)

    def _decide(self, rate: float, was_full: bool) -> None:
        if self._trial:
            self._judge(rate)
            return
        self._best = rate
        if self._rest:
            self._rest -= 1
            return
        if not was_full and self.allowed == 1:
            return
        if not 1 <= self.allowed + self._step <= self._most:
            self._step = -self._step
        if 1 <= self.allowed + self._step <= self._most:
            self._trial, self.allowed = self.allowed, self.allowed + self._step

    def _judge(self, rate: float) -> None:
        """A larger window must earn its place; a smaller one must only not cost anything."""
        settled, self._trial = self._trial, 0
        up = self._step > 0
        if rate > (self._best * _MARGIN if up else self._best / _MARGIN):
            self._best = rate
            return
        self.allowed = settled
        self._step = -self._step  # the other direction is next
        self._rest = _REST_EPOCHS
