"""Pure: how long an endpoint takes for a model, as the choice among endpoints weighs it.

A peak EWMA, as Finagle's `P2CPeakEwma` and Linkerd have it: it rises at once and falls slowly, so that who has become
slow is left alone at once and gets its calls back by and by. While an endpoint is left alone nothing but time makes it
fall, with the same time constant; so it gets a call now and then, and is found when it is well.

It differs in one thing: it rises to the lesser one of the last two latencies. Models take requests of any size, and one
caller's large one must not look like a slow server. Instants and times are seconds on one clock, and arguments.
"""

from __future__ import annotations

import math
from typing import Final

DECAY_SECONDS: Final = 5.0  # time constant
SLOWER: Final = 2.0  # times; what differs less may be chance, and then calls are spread evenly


class Latency:
    """Of one model on one endpoint."""

    __slots__ = ("_at", "_before", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0  # as of the last call; 0 as long as it is not known
        self._before = 0.0  # how long the call before it took
        self._at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """A call has been answered."""
        sure = min(seconds, self._before)
        self._before = seconds
        fall = self.seconds - sure
        self.seconds = sure if fall <= 0.0 else sure + fall * math.exp((self._at - now) / DECAY_SECONDS)
        self._at = now

    def slowness(self, peer: Latency) -> float:
        """How many times slower than a peer; 1 if that may be chance, or if it is long since the last call here."""
        mine, its = self.seconds, peer.seconds
        if mine <= SLOWER * its or not its:
            return 1.0
        ratio = mine / its * math.exp(min(self._at - peer._at, 0.0) / DECAY_SECONDS)
        return ratio if ratio > SLOWER else 1.0
