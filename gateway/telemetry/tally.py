"""Telemetry: counts that one thread adds to cheaply, and that any one other thread brings to prometheus_client.

Counting only ever adds, and `flush` only reads and remembers how far it came, so neither needs a lock.
"""

from __future__ import annotations

from prometheus_client import Counter, Histogram


class Count:
    """What a counter's child will be told at the next flush."""

    __slots__ = ("_child", "_flushed", "total")

    def __init__(self, child: Counter) -> None:
        self.total = 0
        self._child = child
        self._flushed = 0

    def flush(self) -> None:
        total = self.total
        if total != self._flushed:
            self._child.inc(total - self._flushed)
            self._flushed = total


class Times:
    """What a histogram's child will be told at the next flush, in seconds."""

    __slots__ = ("_bounds", "_child", "_counts", "_flushed", "_flushed_sum", "_sum")

    def __init__(self, child: Histogram) -> None:
        # The library can't add many observations at once, so `flush` writes to private parts of the child.
        self._child = child
        self._bounds: list[float] = list(child._upper_bounds)
        self._counts = [0] * len(self._bounds)
        self._flushed = [0] * len(self._bounds)
        self._sum = 0.0
        self._flushed_sum = 0.0

    def observe(self, seconds: float) -> None:
        number = 0
        for bound in self._bounds:  # few are passed, and a library's search costs more, since it is called from outside
            if seconds <= bound:
                break
            number += 1
        self._counts[number] += 1
        self._sum += seconds

    def flush(self) -> None:
        total = self._sum
        if total != self._flushed_sum:
            self._child._sum.inc(total - self._flushed_sum)
            self._flushed_sum = total
        for number, count in enumerate(self._counts):
            if count != self._flushed[number]:
                self._child._buckets[number].inc(count - self._flushed[number])
                self._flushed[number] = count
