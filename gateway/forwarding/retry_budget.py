"""Pure: how many requests may be sent again, so that retries do not become the load that keeps a server down.

A fifth of the calls of the last ten seconds, and ten more each second, whatever there are. Source of the rule and its
figures: Finagle's `RetryBudget` (20 %, 10 per second, 10 s). A fallback to another variant is no retry, since its
servers are others; nor is what the transport sends once more because the server says that it has not looked at it.

Instants are seconds on one clock, and arguments.
"""

from __future__ import annotations

import math
from typing import Final

SHARE: Final = 0.2  # of calls
PER_SECOND: Final = 10
SECONDS: Final = 10  # for which a call counts

_SLOTS: Final = SECONDS


class RetryBudget:
    """Of one model, in one worker."""

    __slots__ = ("_calls", "_calls_before", "_least", "_second", "_share", "_slot", "_spent", "_spent_before")

    def __init__(self, share: float = SHARE, per_second: float = PER_SECOND) -> None:
        self._share = share
        self._least = per_second * SECONDS
        # By second: a ring of the last ones, and their sums. The current second's are counted apart.
        self._calls_before = [0] * _SLOTS
        self._spent_before = [0] * _SLOTS
        self._slot = 0
        self._second = 0.0  # when the current slot ends
        self._calls = 0
        self._spent = 0

    def began(self, now: float) -> None:
        """A call has come."""
        if now >= self._second:
            self._turn(now)
        self._calls += 1

    def balance(self, now: float) -> float:
        """Retries that may be made now."""
        if now >= self._second:
            self._turn(now)
        calls = self._calls + sum(self._calls_before)
        return self._share * calls + self._least - self._spent - sum(self._spent_before)

    def left(self, now: float) -> int:
        """As `balance`, for people: changes nothing, so that any thread may ask."""
        gone = max(0, math.floor(now - self._second) + 1)  # seconds that have ended since it was used last
        if gone > _SLOTS:
            return int(self._least)
        kept = [(self._slot + n) % _SLOTS for n in range(gone, _SLOTS)]
        calls = self._calls + sum([self._calls_before[n] for n in kept])
        spent = self._spent + sum([self._spent_before[n] for n in kept])
        return max(0, int(self._share * calls + self._least - spent))

    def has_some(self, now: float) -> bool:
        """May one request be sent again?"""
        return self.balance(now) >= 1.0

    def take(self, now: float) -> None:
        """One is."""
        if now >= self._second:
            self._turn(now)
        self._spent += 1

    def _turn(self, now: float) -> None:
        past = now - self._second
        if past >= SECONDS:  # all is long ago; also the first call of all
            self._calls_before = [0] * _SLOTS
            self._spent_before = [0] * _SLOTS
            self._calls = self._spent = 0
            self._second = now + 1.0
            return
        while now >= self._second:
            self._calls_before[self._slot] = self._calls
            self._spent_before[self._slot] = self._spent
            self._slot = (self._slot + 1) % _SLOTS
            self._calls = self._spent = 0
            self._second += 1.0
