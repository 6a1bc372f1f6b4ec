"""How many merged requests may be in flight at a time: climbs to where throughput is best, stays low where it is flat.

With one in flight everything that arrives meanwhile leaves together, which is best for a model that is cheaper than its
request. A model that computes for long on several instances needs more. Which it is shows in the throughput, so it is
tried: one step up or down, by turns with the settled number, since the rate of callers and machines moves by more than
a step does. Pure: instants are arguments.
"""

from __future__ import annotations

from typing import Final

_EPOCH_SECONDS: Final = 0.25  # long enough for tens of batches of a tiny model, short enough to adapt within seconds
_EPOCH_BATCHES: Final = 8
_PAIRS: Final = 6  # of epochs, one with the settled number and one with that on trial
_MISSES: Final = 2  # pairs below what is wanted end a trial: callers that rest, or come back, spoil one
_GAIN: Final = 1.05  # of rows per second, that one more in flight must bring in the pairs ...
_LOSS: Final = 0.8  # ... and what one less may cost in them, which noise alone does
_REST_EPOCHS: Final = (
    60  # how long a choice is kept after a trial that failed, about 15 s: twice as long after each, ...
)
_MOST_REST_EPOCHS: Final = 240  # ... but no longer than a minute


class Window:
    """Adapts between 1 and `most`."""

    __slots__ = (
        "_batches",
        "_began",
        "_ended_at",
        "_misses",
        "_most",
        "_pairs",
        "_plain",
        "_rest",
        "_rows",
        "_settled",
        "_step",
        "_trusted",
        "_was_full",
        "allowed",
    )

    def __init__(self, most: int, now: float) -> None:
        self.allowed = 1
        self._most = most
        self._settled = 1
        self._step = 1  # the direction to try next
        # This epoch
        self._began = now
        self._rows = 0
        self._batches = 0
        self._ended_at = now  # the last batch
        self._was_full = False
        # The trial that runs, if `allowed` is not the settled number or its turn comes again
        self._pairs = 0  # those that are left of it
        self._misses = 0
        self._plain = 0.0  # rows per second with the settled number, just before
        # Between trials
        self._rest = 0  # epochs
        self._trusted = _REST_EPOCHS  # the rest after the next trial that fails

    def ended(self, rows: int, was_full: bool, now: float) -> None:
        """A batch has come back. was_full: were others waiting, so that a larger window could have been used?"""
        if not self._was_full and now - self._ended_at > _EPOCH_SECONDS:
            self._began, self._rows, self._batches = now, 0, 0  # callers rested, which says nothing of the window
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
            self._plain = rate
            self.allowed = self._settled + self._step

    def _try(self, rate: float) -> None:
        """A larger window must earn its place, nearly every time; a smaller one must only not cost much."""
        if self.allowed == self._settled:  # the second epoch of a pair is next
            self._plain = rate
            self.allowed = self._settled + self._step
            return
        self.allowed = self._settled
        self._pairs -= 1
        if rate <= self._plain * (_GAIN if self._step > 0 else _LOSS):
            self._misses += 1
        if self._misses == _MISSES:
            self._pairs = 0
            self._step = -self._step  # the other direction is next
            self._rest = self._trusted
            self._trusted = min(2 * self._trusted, _MOST_REST_EPOCHS)
        elif not self._pairs:
            self._settled = self.allowed = self._settled + self._step
            self._trusted = _REST_EPOCHS
