"""Before the servers of one model: who goes at once, who waits, and who is told at once that there is no room.

A call waits only if it will be answered in time for all that is known: its turn comes after `FairQueue.ahead` others,
at the rate of answers that was measured, and an answer takes as long as the last ones did. How many may wait depends on
whether the queue is a burst or stands: when none had to wait for a second it may be long at first, and then it holds as
many as are in flight, since a longer one would only make everyone late (the idea is CoDel's, as used for servers in Maurer's
"Fail at scale", ACM Queue 2015). Calls of the batch class go when no others wait. Pure: instants are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gateway.forwarding.admission.fair_queue import FairQueue, Waiting
from gateway.forwarding.admission.limit import AdaptiveLimit

FULL: Final = "queue_full"  # it would have to wait for longer than calls may
LATE: Final = "late"  # its answer would come after its deadline
REASONS: Final = (FULL, LATE)

_QUIET_SECONDS: Final = 1.0  # without anyone who waits, after which the next one begins a burst
_BURST: Final = 10.0  # times the limit may wait in a burst …
_BURST_SECONDS: Final = 1.0  # … and no more than are answered in this time
_LEAST_WAIT: Final = 0.005  # seconds; what is answered in these may always wait: scheduling alone takes as long
_STANDING: Final = 5.0  # times the latency, after which the queue stands …
_LEAST_STANDING: Final = 0.1  # … and at least so many seconds
_MOST_WAITING: Final = 1_000  # calls; each holds its message
_IDLE_SECONDS: Final = 60.0
_NOT_HELD: Final = 1 << 30
_LEAST_RETRY: Final = 0.05  # seconds: what is told to those that are refused


@dataclass(frozen=True, slots=True)
class GateNow:
    """What a gate decides by, for those who want to know why a call was refused."""

    limit: int
    in_flight: int
    waiting: int
    latency: float  # seconds, the mean of the last answers; 0 if not measured yet
    rate: float  # answers per second; 0 if not measured yet
    refused: Mapping[str, int]  # by reason


class Refused(Exception):
    """There is no room for a call."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after  # seconds


class Gate:
    """Calls in flight to one model of one upstream."""

    __slots__ = (
        "_adaptive",
        "_batch",
        "_began_at",
        "_fixed",
        "_held",
        "_is_admitting",
        "_normal",
        "in_flight",
        "reached_at",
        "refusals",
    )

    def __init__(self, now: float, *, adaptive: AdaptiveLimit, fixed: int = 0) -> None:
        """fixed: the limit, if it is not to adapt; then `adaptive` only measures."""
        self._adaptive = adaptive
        self._fixed = fixed
        self._held = _NOT_HELD  # no more in flight than this, for the moment
        self._normal = FairQueue()
        self._batch = FairQueue()
        self._is_admitting = False
        self._began_at = now  # when a call had to wait, after a time in which none had to
        self.in_flight = 0
        self.reached_at = now  # when a call found no free place, last
        self.refusals = dict.fromkeys(REASONS, 0)

    def is_idle(self, now: float) -> bool:
        """Has an adaptive limit not been reached for so long that it need not be kept?"""
        return not self._fixed and now - self.reached_at > _IDLE_SECONDS

    @property
    def limit(self) -> int:
        return self._fixed or self._adaptive.limit

    def _places(self) -> int:
        limit = self._fixed or self._adaptive.limit
        return limit if limit < self._held else self._held

    def resize(self, limit: int, now: float) -> None:
        """Of a fixed limit: there is another one."""
        self._fixed = limit
        self._admit_once(now)

    def enter(self, call: Waiting, is_batch: bool, now: float) -> bool:
        """True: it has a place, which it must give back. False: it waits, and is told.

        :raises Refused: if it would wait in vain.
        """
        waiting = self._normal.size + self._batch.size
        if not waiting and self.in_flight < self._places():
            self.in_flight += 1
            return True
        if now - self.reached_at > _QUIET_SECONDS:
            self._began_at = now
        self.reached_at = now
        self._adaptive.reached()
        queue = self._batch if is_batch else self._normal
        self._check(call, waiting, self._normal.size if is_batch else 0, queue, now)
        queue.push(call, now)
        return False

    def _check(self, call: Waiting, waiting: int, before: int, queue: FairQueue, now: float) -> None:
        latency, rate = self._adaptive.latency, self._adaptive.rate
        ahead = before + queue.ahead(call.turn)
        if waiting >= _MOST_WAITING or ahead >= self._most_ahead(latency, rate, now):
            self._refuse(FULL, (ahead + 1) / rate if rate else 0.0)
        deadline = call.until
        if rate and deadline is not None:
            wait = (ahead + 1) / rate
            if now + wait + self._adaptive.long_latency > deadline:
                self._refuse(LATE, wait)

    def _most_ahead(self, latency: float, rate: float, now: float) -> float:
        """As many calls as are in flight take as long to be answered as those, which is the latency."""
        usual = max(float(self.limit), _LEAST_WAIT * rate)
        if now - self._began_at > max(_STANDING * latency, _LEAST_STANDING):
            return usual
        return max(usual, min(_BURST * usual, _BURST_SECONDS * rate))

    def _refuse(self, reason: str, wait: float) -> None:
        self.refusals[reason] += 1
        raise Refused(reason, max(wait, _LEAST_RETRY))

    def abandon(self, call: Waiting) -> None:
        """A call no longer waits."""
        if not self._normal.discard(call):
            self._batch.discard(call)

    def answered(self, latency: float, now: float) -> None:
        """A call that has a place went well; it must still give it back."""
        self._held = _NOT_HELD
        self._adaptive.answered(latency, now)

    def server_refused(self) -> None:
        """A server had no room for a call that has a place. Nobody else is to learn that before it has answered one."""
        self._held = max(self.in_flight - 1, 1)
        self._adaptive.refused()

    def leave(self, now: float) -> None:
        """Give a place back, to who is next."""
        self.in_flight -= 1
        self._admit_once(now)

    def _admit_once(self, now: float) -> None:
        if self._is_admitting:  # by a call that has ended as soon as it was admitted
            return
        self._is_admitting = True
        try:
            self._admit(now)
        finally:
            self._is_admitting = False

    def _admit(self, now: float) -> None:
        while self.in_flight < self._places():
            found = self._normal.maybe_pop() or self._batch.maybe_pop()
            if found is None:
                return
            call, _ = found
            deadline = call.until
            if deadline is not None and now + self._adaptive.latency > deadline:
                self.refusals[LATE] += 1
                call.shed(LATE, _LEAST_RETRY)
                continue
            self.in_flight += 1
            call.admitted()

    def dissolve(self) -> None:
        """It is no longer in force: who waits goes on."""
        while (found := self._normal.maybe_pop() or self._batch.maybe_pop()) is not None:
            self.in_flight += 1
            found[0].admitted()

    def now(self) -> GateNow:
        adaptive = self._adaptive
        waiting = self._normal.size + self._batch.size
        return GateNow(self.limit, self.in_flight, waiting, adaptive.latency, adaptive.rate, dict(self.refusals))
