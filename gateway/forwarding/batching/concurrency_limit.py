"""How many merged requests may be in flight at a time: climbs to where throughput is best, stays low where it is flat.

With one in flight, everything that arrives meanwhile leaves together, which is best for a model that costs less than
handling its request. A model that computes for long on several instances needs more. The throughput shows which kind a
model is. So the limit is tried one step higher or lower, in turn with the settled limit: the rates of callers and
machines change by more than one step does. Pure: instants are arguments.
"""

from __future__ import annotations

from typing import Final

_EPOCH_SECONDS: Final = 0.25  # long enough for tens of batches of a tiny model, short enough to adapt within seconds
_EPOCH_BATCHES: Final = 8  # fewest batches of an epoch
_PAIRS: Final = 6  # pairs of epochs in a trial: one epoch with the settled limit, one with the limit on trial
_MISSES: Final = 2  # a trial fails at so many pairs without enough gain: callers that pause or return may spoil one
_GAIN: Final = 1.05  # factor by which one more in flight must raise the rows per second
_LOSS: Final = 0.8  # factor of the rows per second that one fewer in flight must keep; noise alone costs as much
_REST_EPOCHS: Final = 60  # epochs without a trial after one that failed, about 15 s; doubled after each further failure
_MOST_REST_EPOCHS: Final = 240  # longest rest, about a minute


class ConcurrencyLimit:
    """The limit, which adapts between 1 and `most`."""

    __slots__ = (
        "_batches",
        "_began",
        "_ended_at",
        "_misses",
        "_most",
        "_next_rest",
        "_pairs",
        "_rest",
        "_rows",
        "_settled",
        "_settled_rate",
        "_step",
        "_was_full",
        "allowed",
    )

    def __init__(self, most: int, now: float) -> None:
        self.allowed = 1
        self._most = most
        self._settled = 1
        self._step = 1  # the direction to try next
        # State of this epoch
        self._began = now
        self._rows = 0
        self._batches = 0
        self._ended_at = now  # when the last batch came back
        self._was_full = False
        # State of the trial under way
        self._pairs = 0  # pairs of epochs that are left; 0 between trials
        self._misses = 0  # pairs without enough gain
        self._settled_rate = 0.0  # rows per second with the settled limit, in the first epoch of the pair
        # State between trials
        self._rest = 0  # epochs until the next trial
        self._next_rest = _REST_EPOCHS  # the rest after the next trial that fails

    def ended(self, rows: int, was_full: bool, now: float) -> None:
        """A batch of `rows` rows has come back. was_full: did requests wait, so that a higher limit could be used?"""
        if not self._was_full and now - self._ended_at > _EPOCH_SECONDS:
            self._began, self._rows, self._batches = now, 0, 0  # callers paused, which says nothing about the limit
        else:
            self._rows += rows
            self._batches += 1
        self._was_full, self._ended_at = was_full, now
        seconds = now - self._began
        if seconds < _EPOCH_SECONDS or self._batches < _EPOCH_BATCHES:
            return
        rate = self._rows / seconds
        self._began, self._rows, self._batches = now, 0, 0
        self._decide(rate, was_full)

    def _decide(self, rate: float, was_full: bool) -> None:
        if self._pairs:
            self._try(rate)
        elif self._rest:
            self._rest -= 1
        elif was_full or self.allowed > 1:
            self._begin(rate)

    def _begin(self, rate: float) -> None:
        if not 1 <= self._settled + self._step <= self._most:
            self._step = -self._step
        if 1 <= self._settled + self._step <= self._most:
            self._pairs, self._misses = _PAIRS, 0
            self._settled_rate = rate
            self.allowed = self._settled + self._step

    def _try(self, rate: float) -> None:
        """Note one epoch of a trial. A higher limit must bring a gain; a lower one must only not cost much."""
        if self.allowed == self._settled:  # this was the first epoch of a pair
            self._settled_rate = rate
            self.allowed = self._settled + self._step
            return
        self.allowed = self._settled
        self._pairs -= 1
        if rate <= self._settled_rate * (_GAIN if self._step > 0 else _LOSS):
            self._misses += 1
        if self._misses == _MISSES:
            self._pairs = 0
            self._step = -self._step
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, _MOST_REST_EPOCHS)
        elif not self._pairs:
            self._settled = self.allowed = self._settled + self._step
            self._next_rest = _REST_EPOCHS
