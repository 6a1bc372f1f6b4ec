"""Many deadlines, cheap to set and to drop: instants are rounded up to a tick and kept in one set per tick."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, Protocol

TICK: Final = 0.005  # seconds; how late a deadline may be noticed
FAR: Final = 20.0  # seconds from now; such deadlines ...
FAR_TICKS: Final = 200  # ... may be noticed this many ticks late (5 %), so that few sets are kept
SLACK: Final = 64  # ticks in the heap that nobody waits for any more, before it is made anew


def _nobody(_: object) -> None: ...


class Expiring(Protocol):
    def expire(self) -> None: ...


class Deadlines:
    """One per event loop. Its owner calls `expire` when `on_earlier` or `next_at` said so.

    What was dropped costs nothing for long: a far tick goes with its last deadline, since callers choose how far it is;
    a near one may be used again, and comes due soon.
    """

    __slots__ = ("_due", "_heap", "on_bug", "on_earlier")

    def __init__(self) -> None:
        self.on_earlier: Callable[[float], None] = _nobody  # told when what was added is due before all else
        self.on_bug: Callable[[Exception], None] = _nobody  # told of exceptions out of `expire`
        self._due: dict[int, set[Expiring]] = {}
        self._heap: list[int] = []  # all ticks of `_due`, and some that were in it

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def add(self, at: float, item: Expiring, now: float) -> int:
        """Answers the key for `discard`."""
        tick = int(at / TICK) + 1
        if at - now > FAR:
            tick += FAR_TICKS - tick % FAR_TICKS
        due = self._due.get(tick)
        if due is None:
            self._due[tick] = {item}
            heapq.heappush(self._heap, tick)
            if self._heap[0] == tick:
                self.on_earlier(tick * TICK)
        else:
            due.add(item)
        return tick

    def discard(self, key: int, item: Expiring) -> None:
        due = self._due.get(key)
        if due is not None:
            due.discard(item)
            if not due and not key % FAR_TICKS:
                self._forget(key)

    def _forget(self, tick: int) -> None:
        del self._due[tick]
        if len(self._heap) > 2 * len(self._due) + SLACK:
            self._heap = list(self._due)
            heapq.heapify(self._heap)

    @property
    def size(self) -> int:
        """Entries that take memory, for deadlines or for none."""
        return max(len(self._heap), len(self._due))

    def next_at(self) -> float | None:
        """When the earliest that is left is due; ticks that became empty are forgotten on the way."""
        while self._heap:
            tick = self._heap[0]
            if self._due.get(tick):
                return tick * TICK
            heapq.heappop(self._heap)
            self._due.pop(tick, None)
        return None

    def expire(self, now: float) -> None:
        """Expire everything that is due."""
        while self._heap and self._heap[0] * TICK <= now:
            for item in self._due.pop(heapq.heappop(self._heap), ()):
                try:
                    item.expire()
                except Exception as error:  # the fault of one must not keep the others waiting
                    self.on_bug(error)
