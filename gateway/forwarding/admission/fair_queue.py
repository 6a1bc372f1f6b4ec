"""Who is next of those that wait: callers by turns, and of one caller's calls the one whose deadline is nearest.

So a caller with a thousand calls waiting holds up another's by one call in each round. Pure.

source: round robin over callers is fair queueing as in Nagle's RFC 970, with calls in place of packets.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Final, Protocol


class Waiting(Protocol):
    """What waits."""

    @property
    def turn(self) -> Hashable:
        """Whose it is: equal for calls that share their turns."""

    @property
    def until(self) -> float | None:
        """When its answer is no longer wanted; None is never."""

    def admitted(self) -> None:
        """It has a place, which it must give back."""

    def shed(self, reason: str, retry_after: float) -> None:
        """It has waited in vain: try again after so many seconds."""


_Place = tuple[float, int, float, Waiting]  # deadline, number, since when; the number decides between equals
_NEVER: Final = math.inf


class FairQueue:
    """Waiting calls. One that no longer waits is taken out by `discard`."""

    __slots__ = ("_by_caller", "_number", "size")

    def __init__(self) -> None:
        self._by_caller: dict[Hashable, list[_Place]] = {}  # whose turn it is comes first
        self._number = 0
        self.size = 0

    def own(self, turn: Hashable) -> int:
        """How many of this caller's wait."""
        places = self._by_caller.get(turn)
        return len(places) if places is not None else 0

    def ahead(self, turn: Hashable) -> int:
        """How many go before a new call of this caller, if no other caller comes in the meantime."""
        return min(self.size, (self.own(turn) + 1) * len(self._by_caller))

    def push(self, waiting: Waiting, now: float) -> None:
        self._number += 1
        deadline = waiting.until
        place = (_NEVER if deadline is None else deadline, self._number, now, waiting)
        heapq.heappush(self._by_caller.setdefault(waiting.turn, []), place)
        self.size += 1

    def maybe_pop(self) -> tuple[Waiting, float] | None:
        """The next one, and since when it has waited."""
        if not self.size:
            return None
        caller = next(iter(self._by_caller))
        places = self._by_caller.pop(caller)
        _, _, since, waiting = heapq.heappop(places)
        if places:
            self._by_caller[caller] = places  # its next turn comes after everyone else's
        self.size -= 1
        return waiting, since

    def maybe_last(self, own: int) -> Waiting | None:
        """Of the caller with the most calls, the one that would go last; None if nobody has more than `own` calls."""
        places = max(self._by_caller.values(), key=len, default=None)
        return None if places is None or len(places) <= own else max(places)[3]

    def discard(self, waiting: Waiting) -> bool:
        """Take one out, if it is here."""
        places = self._by_caller.get(waiting.turn, [])
        for place in places:
            if place[3] is waiting:
                places.remove(place)
                heapq.heapify(places)
                if not places:
                    del self._by_caller[waiting.turn]
                self.size -= 1
                return True
        return False
