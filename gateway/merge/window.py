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
_GAIN: Final = 1.05  # of rows per second, that one more in flight must bring in all pairs but one ...
_LOSS: Final = 0.8  # ... and what one less may cost in them, which noise alone does
_REST_EPOCHS: Final = 60  # how long a choice that was found best is kept before another is tried, about 15 s


class Window:
    """Adapts between 1 and `most`."""

    __slots__ = ("_batches", "_began", "_most", "_rates", "_rest", "_rows", "_settled", "_step", "allowed")

    def __init__(self, most: int, now: float) -> None:
        self.allowed = 1
        self._most = most
        self._began = now
        self._rows = 0
        self._batches = 0
        self._settled = 1
        self._rates: list[float] = []  # rows per second, settled and on trial by turns; none if nothing is on trial
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
        if self._rates:
            self._compare(rate)
            return
        if self._rest:
            self._rest -= 1
            return
        if not was_full and self.allowed == 1:
            return
        if not 1 <= self._settled + self._step <= self._most:
            self._step = -self._step
        if 1 <= self._settled + self._step <= self._most:
            self._rates.append(rate)
            self.allowed = self._settled + self._step

    def _compare(self, rate: float) -> None:
        """A larger window must earn its place, nearly every time; a smaller one must only not cost much."""
        rates = self._rates
        rates.append(rate)
        if len(rates) < 2 * _PAIRS:
            self.allowed = self._settled if len(rates) % 2 == 0 else self._settled + self._step
            return
        gains = sorted([tried / plain for plain, tried in zip(rates[::2], rates[1::2], strict=True)])
        second = gains[1]  # least of six: an epoch that callers rested in, or came back in, spoils one pair
        if second > (_GAIN if self._step > 0 else _LOSS):
            self._settled += self._step
        else:
            self._step = -self._step  # the other direction is next
            self._rest = _REST_EPOCHS
        self.allowed = self._settled
        self._rates = []
