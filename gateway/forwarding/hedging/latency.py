"""Pure: a quantile of how long answers took lately.

Answers are counted in buckets that grow by the eighth root of two, so a quantile is at most 9 % too high. Two such
histograms take turns: one is filled for `SECONDS`, and both are read, so an answer counts for that long at least and
for twice as long at most. (HDR histograms with rotation, as in Finagle's and Envoy's statistics; P², Jain and Chlamtac
1985, needs five numbers only, but never forgets.)
"""

from __future__ import annotations

import math
from typing import Final

SECONDS: Final = 30.0
FEWEST: Final = 20  # answers without which nothing is known

_STEPS: Final = 8.0  # buckets in which a time doubles
_LEAST: Final = 1e-5  # seconds: all that is faster is alike
_BUCKETS: Final = 200  # up to 300 s
_LOOK_SECONDS: Final = 0.1  # for which a quantile holds that was worked out


class Latency:
    """Of one model, at one share."""

    def __init__(self, share: float) -> None:
        """share: of answers that are faster than `quantile`, in (0, 1)."""
        self._share = share
        self._now = [0] * _BUCKETS
        self._before = [0] * _BUCKETS
        self._turn_at = -math.inf
        self.known: float | None = None  # when it was asked for last
        self._look_at = -math.inf

    def took(self, seconds: float, now: float) -> None:
        """An answer came after so long, or was waited for in vain for so long."""
        if now >= self._turn_at:
            fresh = now - self._turn_at < SECONDS
            self._before = self._now if fresh else [0] * _BUCKETS
            self._now = [0] * _BUCKETS
            self._turn_at = now + SECONDS
        place = int(_STEPS * math.log2(seconds / _LEAST)) + 1 if seconds > _LEAST else 0
        self._now[place if place < _BUCKETS else _BUCKETS - 1] += 1

    def quantile(self, now: float) -> float | None:
        """Seconds; None if too few answers are known."""
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self.known = self._worked_out()
        return self.known

    def _worked_out(self) -> float | None:
        total = sum(self._now) + sum(self._before)
        if total < FEWEST:
            return None
        wanted = math.ceil(self._share * total)
        seen = 0
        for place in range(_BUCKETS):
            seen += self._now[place] + self._before[place]
            if seen >= wanted:
                return float(_LEAST * 2.0 ** (place / _STEPS))
        return None
