"""Many deadlines that are cheap to add and discard: each is rounded up to a tick, and a set holds those of one tick."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, Protocol

TICK: Final = 0.005  # seconds; a deadline is noticed at most so late
# A deadline that is more than FAR seconds away may be noticed FAR_TICKS late (5 %), so that there are fewer sets.
FAR: Final = 20.0
FAR_TICKS: Final = 200
SLACK: Final = 64  # stale ticks in the heap at which it is rebuilt


def _nobody(_: object) -> None: ...


def _long_ago() -> float:
    return 0.0


class Expiring(Protocol):
    def expire(self) -> None: ...


class Deadlines:
    """The deadlines of one event loop. The owner calls `expire` at the time that `on_earlier` or `next_at` gives.

    Discarded deadlines free their memory soon. A far tick, which callers choose, goes with its last deadline; a near
    tick goes when it is due.
    """

    __slots__ = ("_due", "_heap", "clock", "on_bug", "on_earlier")

    def __init__(self) -> None:
        self.on_earlier: Callable[[float], None] = _nobody  # called with the time of a deadline that is the earliest
        self.on_bug: Callable[[Exception], None] = _nobody  # called with an exception that `expire` of an item raised
        self.clock: Callable[[], float] = _long_ago  # for those who are told the time only when bytes arrive
        self._due: dict[int, set[Expiring]] = {}
        self._heap: list[int] = []  # the ticks of `_due`, and stale ones

    def __len__(self) -> int:
        return sum(map(len, self._due.values()))

    def add(self, at: float, item: Expiring, now: float) -> int:
        """Have `item.expire` called at `at`. Returns the key for `discard`."""
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
        """Entries in memory, stale ones too."""
        return max(len(self._heap), len(self._due))

    def next_at(self) -> float | None:
        """When the earliest deadline is due; None if there is none. Drops stale ticks."""
        while self._heap:
            tick = self._heap[0]
            if self._due.get(tick):
                return tick * TICK
            heapq.heappop(self._heap)
            self._due.pop(tick, None)
        return None

    def expire(self, now: float) -> None:
        """Call `expire` of every item that is due."""
        while self._heap and self._heap[0] * TICK <= now:
            for item in self._due.pop(heapq.heappop(self._heap), ()):
                try:
                    item.expire()
                except Exception as error:  # a bug behind one item must not keep the others waiting
                    self.on_bug(error)
