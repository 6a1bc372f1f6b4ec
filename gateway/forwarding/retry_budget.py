"""Pure: how many requests may be sent again, so that retries do not become the load that keeps a server down.

A fifth of the calls of the last ten seconds, and ten more each second, whatever there are. Source of the rule and its
figures: Finagle's `RetryBudget` (20 %, 10 per second, 10 s). A fallback to another variant is no retry, since its
servers are others; nor is what the transport sends once more because the server says that it has not looked at it.

One caller whose calls always fail would use up all of it, and when a server dies the others' calls would not be sent
again. So a caller has at most four fifths of what the others leave, as by the dynamic thresholds of shared memory in
switches (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6/2, 1998). One alone has four fifths, two who want
more have four ninths each, and who has spent nothing finds some left. The users of one caller share his part alike.
Only what is sent again is counted by caller, so a call that goes well costs nothing for it.

Instants are seconds on one clock, and arguments.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Final

from gateway.bounded import make_room
from gateway.upstream.failures import NOBODY_KNOWN, Scopes

SHARE: Final = 0.2  # of calls
PER_SECOND: Final = 10
SECONDS: Final = 10  # for which a call counts
MOST_OF_ONE: Final = 0.8  # share of one caller, of what is left and what he has spent himself
MOST_KNOWN: Final = 256  # callers and users whose retries of one second are remembered

_SLOTS: Final = SECONDS


class RetryBudget:
    """Of one model, in one worker."""

    __slots__ = (
        "_calls", "_calls_before", "_least", "_second", "_share", "_slot", "_spent", "_spent_before", "_spent_by",
    )  # fmt: skip

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
        # By second, the current one last: how often calls of each scope were sent again. That of all has none.
        self._spent_by: deque[dict[int, int]] = _nothing_spent()

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
        """What the caller with the fewest has left, for people. It changes nothing, so that any thread may ask."""
        gone = max(0, math.floor(now - self._second) + 1)  # seconds that have ended since it was used last
        if gone > _SLOTS:
            return int(self._least)
        kept = [(self._slot + n) % _SLOTS for n in range(gone, _SLOTS)]
        calls = self._calls + sum([self._calls_before[n] for n in kept])
        spent = self._spent + sum([self._spent_before[n] for n in kept])
        left = self._share * calls + self._least - spent
        spent_by: Counter[int] = Counter()
        for each in list(self._spent_by)[gone:]:
            spent_by.update(each.copy())
        return max(0, int(_part(left, max(spent_by.values())) if spent_by else left))

    def has_some(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """May a request be sent again? scopes: whose it is."""
        left = self.balance(now)
        if left < 1.0:
            return False
        for scope in scopes[1:]:
            left = _part(left, sum([each.get(scope, 0) for each in self._spent_by]))
        return left > 0.0

    def take(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> None:
        """A request is sent again."""
        if now >= self._second:
            self._turn(now)
        self._spent += 1
        spent_by = self._spent_by[-1]
        for scope in scopes[1:]:
            spent = spent_by.pop(scope, 0)  # and put in again behind the others: those who spend are not forgotten
            make_room(spent_by, MOST_KNOWN)
            spent_by[scope] = spent + 1

    def _turn(self, now: float) -> None:
        past = now - self._second
        if past >= SECONDS:  # all is long ago; also the first call of all
            self._calls_before = [0] * _SLOTS
            self._spent_before = [0] * _SLOTS
            self._calls = self._spent = 0
            self._spent_by = _nothing_spent()
            self._second = now + 1.0
            return
        while now >= self._second:
            self._calls_before[self._slot] = self._calls
            self._spent_before[self._slot] = self._spent
            self._slot = (self._slot + 1) % _SLOTS
            self._calls = self._spent = 0
            self._spent_by.append({})
            self._second += 1.0


def _nothing_spent() -> deque[dict[int, int]]:
    return deque([{} for _ in range(_SLOTS + 1)], maxlen=_SLOTS + 1)


def _part(left: float, spent: int) -> float:
    """How much of what is left one may have who has spent so much himself."""
    return MOST_OF_ONE * (left + spent) - spent
