"""Before the servers of one model: who goes at once, who waits, and who is told at once that there is no room.

A call waits only if it will be answered in time for all that is known: its turn comes after `FairQueue.ahead` others,
at the rate of answers that was measured, and an answer takes as long as the last ones did. How many may wait depends on
whether the queue is a burst or stands: where places were free most of the time it may be long, else it holds as many as
are in flight, since a longer one would only make everyone late (the idea is CoDel's, as used for servers in
Maurer's "Fail at scale", ACM Queue 2015). Calls of the batch class go when no others wait. Pure: it is told the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gateway.forwarding.admission.fair_queue import FairQueue, Waiting
from gateway.forwarding.admission.limit import AdaptiveLimit
from gateway.hooks import GateNow

FULL: Final = "queue_full"  # it would have to wait for longer than calls may
TOO_LATE: Final = "late"  # its answer would come after its deadline
REASONS: Final = (FULL, TOO_LATE)

_FIRST_WAITING: Final = 50.0  # calls that may wait in a burst before the rate is known
_QUIET_SECONDS: Final = 1.0  # without anyone who waits, after which the rate is no longer what servers can do
_SAFETY: Final = 1.25  # times what is reckoned from the rate, which is a mean
_BURST: Final = 10.0  # times the limit may wait in a burst …
_BURST_SECONDS: Final = 1.0  # … and no more than are answered in this time
_LEAST_WAIT: Final = 0.005  # seconds; what is answered in these may always wait: scheduling alone takes as long
_FEW: Final = 2  # calls of one caller that wait
_PATIENCE: Final = 2.0  # times the latency, that these may wait
_STANDING: Final = 5.0  # times the latency: a queue stands if no place was free in most of this time …
_LEAST_STANDING: Final = 0.5  # … and of so many seconds
_MOST_WAITING: Final = 1_000  # calls; each holds its message
_IDLE_SECONDS: Final = 60.0
_NOT_HELD: Final = 1 << 30
_FOLLOWED: Final = 1.05  # by this factor what is kept goes towards each value that is measured: to their median
_LEAST_STALL: Final = 0.4  # seconds that an answer takes longer if its server had to look by itself …
_LONGEST_STALL: Final = 0.7  # … and no more than these
_BREATH: Final = 0.001  # seconds between an answer and the next call: timers know nothing shorter …
_LONGER: Final = 2.0  # … times this after each stall …
_SHORTER: Final = 0.999  # … and back by each answer: so about one in 700 stalls …
_MOST_BREATH: Final = 0.25  # … and it takes no more of the time that an answer takes …
_LONGEST_BREATH: Final = 0.02  # … and no more seconds
_LEAST_RETRY: Final = 0.05  # seconds: what is told to those that are refused


Later = Callable[[float, Callable[[float], None]], object]
"""Calls a function after so many seconds, with the time that it is then."""


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
        "_adopted",
        "_batch",
        "_breath",
        "_fixed",
        "_full_share",
        "_held",
        "_is_admitting",
        "_is_breathing",
        "_later",
        "_normal",
        "_noted_at",
        "_room",
        "_service",
        "_was_full",
        "in_flight",
        "reached_at",
        "refusals",
    )

    def __init__(
        self,
        now: float,
        *,
        adaptive: AdaptiveLimit,
        fixed: int = 0,
        refusals: dict[str, int] | None = None,
        later: Later | None = None,
    ) -> None:
        """fixed: the limit, if it is not to adapt; then `adaptive` only measures. refusals: where they are counted.

        later: for servers whose room is known, which want a breath between two calls.
        """
        self._adaptive = adaptive
        self._fixed = fixed
        self._held = _NOT_HELD  # no more in flight than this, for the moment
        self._normal = FairQueue()
        self._batch = FairQueue()
        self._is_admitting = False
        self._later = later
        self._room = 0  # calls that the servers take before they refuse one; 0 if not known
        self._service = 0.0  # seconds: the median latency; 0 if not known
        self._is_breathing = False
        self._breath = _BREATH
        self._adopted = 0
        self._full_share = 0.0  # of the last while: time in which no place was free
        self._was_full = False  # when a call came, last
        self._noted_at = now  # which was then
        self.in_flight = 0
        self.reached_at = now  # when a call found no free place, last
        self.refusals = dict.fromkeys(REASONS, 0) if refusals is None else refusals

    def is_idle(self, now: float) -> bool:
        """Has an adaptive limit not been reached for so long that it need not be kept?"""
        return not self._fixed and now - self.reached_at > _IDLE_SECONDS

    @property
    def is_known(self) -> bool:
        """Have servers said what room they have?"""
        return bool(self._room)

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

    def know(self, limit: int, room: int, now: float) -> None:
        """What the servers' config says: how many calls are best in flight, and how many are taken at all."""
        self._room = room
        self.resize(limit, now)

    def enter(self, call: Waiting, is_batch: bool, now: float) -> bool:
        """True: it has a place, which it must give back. False: it waits, and is told.

        :raises Refused: if it would wait in vain.
        """
        waiting = self._normal.size + self._batch.size
        is_full = bool(waiting) or self.in_flight >= self._places() or self._is_breathing
        # Of servers whose room is known calls wait here that would wait there: that is no queue yet.
        self._note(2 * waiting >= self._room if self._room else is_full, now)
        if not is_full:
            if call.until is not None and now - self.reached_at < _QUIET_SECONDS:
                self._check_in_flight(call.until, now)
            self.in_flight += 1
            return True
        self.reached_at = now
        self._adaptive.reached()
        queue = self._batch if is_batch else self._normal
        displaced = self._maybe_displaced(call, is_batch) if waiting >= _MOST_WAITING else None
        has_room = waiting < _MOST_WAITING or displaced is not None
        self._check(call, has_room, self._normal.size if is_batch else 0, queue, now)
        queue.push(call, now)
        if displaced is not None:
            self.abandon(displaced)
            self.refusals[FULL] += 1
            displaced.shed(FULL, _LEAST_RETRY)
        return False

    def _maybe_displaced(self, call: Waiting, is_batch: bool) -> Waiting | None:
        """The call that makes room for this one where no more may wait; None if this one has to go.

        It is one of the batch class if there is any, else the last one of the caller who has the most. So a caller who
        fills the queue takes its last place from himself, and not from others.
        """
        if is_batch:
            return self._batch.maybe_last(self._batch.own(call.turn) + 1)
        return self._batch.maybe_last(0) or self._normal.maybe_last(self._normal.own(call.turn) + 1)

    def maybe_enter(self) -> bool:
        """For a call that can do without: True if it has a place, which it must give back."""
        if self._normal.size or self._batch.size or self.in_flight >= self._places():
            return False
        self.in_flight += 1
        return True

    def _note(self, is_full: bool, now: float) -> None:
        """Keep the share of time in which there was no place free, of the last while."""
        # A stall is no standing queue.
        least = _LEAST_STANDING + 2.0 * _LONGEST_STALL if self._room else _LEAST_STANDING
        span = max(_STANDING * self._adaptive.latency, least)
        state = 1.0 if self._was_full else 0.0
        self._full_share += (state - self._full_share) * min(1.0, (now - self._noted_at) / span)
        self._was_full, self._noted_at = is_full, now

    def _check_in_flight(self, deadline: float, now: float) -> None:
        """A place may be free and the servers' own queue long: those before it need so long for their answers."""
        rate = self._adaptive.rate
        if rate:
            wait = (self.in_flight + 1) / rate
            if now + _SAFETY * wait > deadline:
                self.reached_at = now
                self._adaptive.reached()
                self._refuse(TOO_LATE, wait)

    def _check(self, call: Waiting, has_room: bool, before: int, queue: FairQueue, now: float) -> None:
        rate = self._rate()
        ahead = before + queue.ahead(call.turn)
        if not has_room or ahead >= self._most_ahead(queue.own(call.turn)):
            self._refuse(FULL, (ahead + 1) / rate if rate else 0.0)
        deadline = call.until
        if rate and deadline is not None:
            wait = (ahead + 1) / rate
            if now + wait + self._adaptive.long_latency > deadline:
                self._refuse(TOO_LATE, wait)

    def _rate(self) -> float:
        """Answers per second; 0 if not known yet.

        What was measured, or what follows from latency and calls in flight (Little's law) if that is more: a window in
        which a server stood still must not have calls refused that would be answered.
        """
        adaptive = self._adaptive
        if self._service:
            return self.limit / self._service  # a median, which stalls leave as it is
        return max(adaptive.rate, self.in_flight / adaptive.latency) if adaptive.rate else 0.0

    def _most_ahead(self, own: int) -> float:
        """As many calls as are in flight take as long to be answered as those, which is the latency.

        own: calls of the same caller that wait. Who has few may wait for twice as long: chance brings two together.
        """
        latency, rate = self._adaptive.latency, self._rate() if self._room else self._adaptive.rate
        usual = max(float(self.limit), float(self._room - self.in_flight), _LEAST_WAIT * rate)
        if not rate:
            return max(usual, min(_BURST * usual, _FIRST_WAITING))
        if self._full_share > 0.5:
            return max(usual, _PATIENCE * max(latency * rate, self._room)) if own < _FEW else usual
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
        if self._room:
            self._measure(latency)

    def server_refused(self) -> None:
        """A server had no room for a call that has a place. Nobody else is to learn that before it has answered one."""
        self._held = max(self.in_flight - 1, 1)
        self._adaptive.refused()

    def leave(self, now: float) -> None:
        """Give a place back, to who is next."""
        self.in_flight -= 1
        if self._room:
            self._admit_after_a_breath(now)
        else:
            self._admit_once(now)

    # Servers whose queue has a bound: see `server_room`

    def _admit_after_a_breath(self, now: float) -> None:
        """A call that comes before the instance is free again wakes nobody."""
        breath = min(self._breath, _MOST_BREATH * self._service)
        if breath < _BREATH or self._later is None:
            self._admit_once(now)
        elif not self._is_breathing:
            self._is_breathing = True
            self._later(breath, self._breathed)

    def _breathed(self, now: float) -> None:
        self._is_breathing = False
        self._admit_once(now)

    def _measure(self, latency: float) -> None:
        """Keep the usual latency, and learn from stalls."""
        service = self._service
        if not service:
            self._service = latency
            return
        self._service *= _FOLLOWED if latency > service else 1.0 / _FOLLOWED
        if _LEAST_STALL < latency - service < _LONGEST_STALL:
            self._breath = min(self._breath * _LONGER, _LONGEST_BREATH)
        else:
            self._breath = max(self._breath * _SHORTER, _BREATH)

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
                self.refusals[TOO_LATE] += 1
                call.shed(TOO_LATE, _LEAST_RETRY)
                continue
            self.in_flight += 1
            call.admitted()

    # Calls that were sent before there was this gate

    def adopt(self, calls: int) -> None:
        """So many are on their way, at most."""
        self._adopted = calls
        self.in_flight += calls

    def adopted_left(self, refused: bool, now: float) -> None:
        """One of them has ended. refused: since the server's queue was full."""
        if not self._adopted:
            return
        self._adopted -= 1
        if refused:
            self.server_refused()
        else:
            self._held = _NOT_HELD
        self.leave(now)

    def disown(self, now: float) -> None:
        """Those that are left count no more: they may be of other models."""
        self.in_flight -= self._adopted
        self._adopted = 0
        self._admit_once(now)

    def dissolve(self) -> None:
        """It is no longer in force: who waits goes on."""
        while (found := self._normal.maybe_pop() or self._batch.maybe_pop()) is not None:
            self.in_flight += 1
            found[0].admitted()

    def now(self, upstream: str, model: str) -> GateNow:
        """Of this upstream and model. May be asked from any thread."""
        adaptive = self._adaptive
        waiting = self._normal.size + self._batch.size
        refused = dict(self.refusals)
        return GateNow(upstream, model, self.limit, self.in_flight, waiting, adaptive.latency, adaptive.rate, refused)
