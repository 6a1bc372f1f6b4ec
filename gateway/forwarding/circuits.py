"""Circuit breaking: whose calls are kept from which variants and endpoints, by how such calls went there before.

`upstream.outlier` compares an endpoint with its peers, and `breaker` lets a variant's calls return to it; both are
pure. Here are those in force: they hear how each attempt has ended, and say of a new call whether it is kept away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from gateway.bounded import make_room
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.breaker import Breaker, BreakerState
from gateway.forwarding.topology import CurrentTopology
from gateway.forwarding.work import Work
from gateway.hooks import BreakerChanged, EndpointEjected, Hooks
from gateway.status import Verdict
from gateway.types import Variant
from gateway.upstream.endpoint import FailedCall
from gateway.upstream.failures import NOBODY_KNOWN, Scopes
from gateway.upstream.outlier import DOUBT_SECONDS, SAMPLE_CALLS, SAMPLED, Counts, Elsewhere
from gateway.upstream.pool import Pool

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 10.0  # between two looks for breakers that nobody needs
_LEAST_FIRST: Final = (BreakerState.TRIPPED, BreakerState.PROBING, BreakerState.ADMITTING)
_MOST: Final = 1024  # breakers, and doubts: there may be one of each caller, and callers choose their names


class Circuits:
    """Those of one worker.

    `breakers`, `doubted` and `has_ejections` say whether there is anything to ask. So a call costs nothing for it while
    all goes well.
    """

    def __init__(
        self, current: CurrentTopology, hooks: Hooks, clock: Callable[[], float], draw: Callable[[], float]
    ) -> None:
        self._current = current
        self._hooks = hooks
        self._clock = clock
        self._draw = draw
        self.breakers: dict[tuple[str, str, Scopes], Breaker] = {}  # by model and variant, and whose calls
        self.doubted: dict[tuple[Variant, Scopes], float] = {}  # until when fallbacks get a sample of whose calls
        self.has_ejections = False  # may some endpoint be ejected for some calls?
        self._look_at = 0.0  # when to look for breakers that nobody needs

    # Before an attempt

    def admits(self, work: Work, first: Variant) -> bool:
        """Does the variant get this call, as far as its breakers are concerned?"""
        if len(work.attempts.targets) < 2:  # a caller may want this variant and no other
            return True
        return all(self._admitted(work, first, *each) for each in self.breakers_of(work, first))

    def breakers_of(self, work: Work, variant: Variant) -> Sequence[tuple[Scopes, Breaker]]:
        """Those that keep this call from the variant, with whose calls they are for."""
        own, model = work.scopes, work.route.model
        around = [own[:depth] for depth in range(1, len(own) + 1)]
        found = [(scopes, self.breakers.get((model, variant.name, scopes))) for scopes in around]
        return [(scopes, breaker) for scopes, breaker in found if breaker is not None]

    def _admitted(self, work: Work, first: Variant, scopes: Scopes, breaker: Breaker) -> bool:
        now, before, topology = self._clock(), breaker.state, self._current.now
        pool = topology.pools.get(first.upstream)
        is_open = pool is not None and pool.is_open(first.model, first.version, now, scopes)
        admitted = breaker.admits(now, self._draw(), is_open)
        if breaker.state is BreakerState.ADMITTING:
            del self.breakers[work.route.model, first.name, scopes]
        if breaker.state is not before:
            self._tell_breaker(work.route.model, first.name, now)
        if admitted or not is_open or not topology.is_available(work.attempts.targets[1]):
            return True
        return breaker.is_untried and self._may_try_it(first, work.scopes)

    def _may_try_it(self, variant: Variant, scopes: Scopes) -> bool:
        """Is the variant on trial after calls of others? Then those of this caller may be the first that go well."""
        pool = self._maybe_pool(variant)
        endpoints = pool.endpoints if pool is not None else ()
        records = [each.record(variant.model, variant.version) for each in endpoints]
        return any(each.is_ejected() for each in records) and not any(each.is_known_to_fail(scopes) for each in records)

    def went_past(self, work: Work, first: Variant) -> None:
        """The chosen variant could not take the call, which goes to its fallback."""
        scopes, now = work.scopes, self._clock()
        pool = self._maybe_pool(first)
        for depth in range(1, len(scopes) + 1):
            key = (work.route.model, first.name, scopes[:depth])
            if key in self.breakers:
                return
            if pool is None or not pool.is_open(first.model, first.version, now, scopes[:depth]):
                make_room(self.breakers, _MOST)
                breaker = self.breakers[key] = Breaker()
                breaker.trip(now)
                self._tell_breaker(work.route.model, first.name, now)
                return

    def is_sample(self, work: Work) -> bool:
        """Should a fallback get this call, so that it is known how it does with calls that the first variant fails?

        Only of whom that variant has failed calls: those of others may go well there.
        """
        targets = work.attempts.targets
        doubted = (targets[0], work.scopes)
        until = self.doubted.get(doubted)
        if until is None or len(targets) < 2:
            return False
        now = self._clock()
        if now >= until or not self._is_doubtful(targets[0]):
            del self.doubted[doubted]
            return False
        if self._draw() >= SAMPLED or not self._current.now.is_available(targets[1]):
            return False
        return sum(calls for calls, _ in self._counts(targets[1], now)) < SAMPLE_CALLS

    def _is_doubtful(self, variant: Variant) -> bool:
        pool = self._maybe_pool(variant)
        endpoints = pool.endpoints if pool is not None else ()
        return any(each.record(variant.model, variant.version).is_doubtful for each in endpoints)

    # After an attempt

    def succeeded(self, work: Work, now: float) -> None:
        """The last attempt of a call went well."""
        last = work.attempts.last
        if last is not None:
            variant = last.variant
            seconds = now - last.began if last.began else 0.0
            endpoint = last.endpoint
            if self.breakers:
                for _, breaker in self.breakers_of(work, variant):
                    breaker.succeeded()
                self._drop_idle_breakers(now)
            scopes = work.scopes if endpoint.has_ejections else NOBODY_KNOWN
            if endpoint.succeeded(variant.model, variant.version, now, seconds, scopes):
                self._tell_ejection(last, now)

    def failed(self, work: Work, attempt: Attempt, verdict: Verdict, now: float) -> None:
        """Compare an endpoint with its peers, by calls that may go to any of them.

        Callers choose where a sequence goes, by its id: what fails there is no evidence.
        """
        variant = attempt.variant
        pool = self._maybe_pool(variant)
        if work.sequence is not None or pool is None:
            return
        scopes = work.scopes
        others = [v for v in work.attempts.targets if v.upstream != variant.upstream or v.model != variant.model]
        # A name that a caller makes up has no others, and no record: those of real models would make room for it.
        record = attempt.endpoint.record(variant.model, variant.version) if others else None
        may_be_broken = record is not None and record.may_be_broken(now, scopes)
        failed = FailedCall(variant.model, variant.version, verdict, now, scopes)
        if pool.failed(attempt.endpoint, failed, self._elsewhere(others, now, may_be_broken)):
            self._tell_ejection(attempt, now)
        elif record is not None and record.is_doubtful:
            make_room(self.doubted, _MOST)
            self.doubted[variant, scopes] = now + DOUBT_SECONDS

    def _elsewhere(self, others: Sequence[Variant], now: float, may_be_broken: bool) -> Elsewhere:
        """How calls go at the variants that may stand in. may_be_broken: may one be compared with them as a whole?"""
        lately = [counts for other in others for counts in self._counts(other, now)] if may_be_broken else ()
        pools = [(other, self._maybe_pool(other)) for other in others]
        ever = [pool.ever(other.model, other.version) for other, pool in pools if pool is not None]
        return Elsewhere(lately, (sum(each[0] for each in ever), sum(each[1] for each in ever)))

    def _counts(self, variant: Variant, now: float) -> Sequence[Counts]:
        pool = self._maybe_pool(variant)
        return pool.counts(variant.model, variant.version, now) if pool is not None else ()

    def _maybe_pool(self, variant: Variant) -> Pool | None:
        return self._current.now.pools.get(variant.upstream)

    def _drop_idle_breakers(self, now: float) -> None:
        """Those of single callers who have gone: they must not look for ever as if the variant had not its calls."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        idle = [key for key, each in self.breakers.items() if key[2] != NOBODY_KNOWN and each.is_idle(now)]
        for key in idle:
            del self.breakers[key]
        for model, variant in {key[:2] for key in idle}:
            self._tell_breaker(model, variant, now)

    # For people

    def breaker_state(self, model: str, variant: str) -> str:
        """Does this variant get its calls? Where callers differ, of those who send it least. From any thread."""
        found = [each.state for key, each in list(self.breakers.items()) if key[:2] == (model, variant)]
        return next((state.value for state in _LEAST_FIRST if state in found), _LEAST_FIRST[-1].value)

    def _tell_breaker(self, model: str, variant: str, now: float) -> None:
        state = self.breaker_state(model, variant)
        _log.info("variant '%s' of model '%s' is %s", variant, model, state)
        self._hooks.breaker_changed(BreakerChanged(model, variant, state, now))

    def _tell_ejection(self, attempt: Attempt, now: float) -> None:
        """An ejection has begun, or has ended."""
        endpoint, model = attempt.endpoint, attempt.variant.model
        record = endpoint.record(model, attempt.variant.version)
        where, seconds = f"{endpoint.upstream}/{endpoint.address}", round(record.seconds_left(now), 1)
        if seconds:
            callers = "all" if record.is_ejected() else f"{len(record.ejections)} of those who call it"
            _log.warning(
                "endpoint %s fails '%s', its peers do not: left alone by %s for %g s", where, model, callers, seconds
            )
        elif not record.ejections:
            _log.info("endpoint %s answers '%s' again", where, model)
        self._hooks.endpoint_ejected(EndpointEjected(endpoint.upstream, endpoint.address, model, seconds, now))
        pools = self._current.now.pools.values()
        self.has_ejections = any(each.has_ejections for pool in pools for each in pool.endpoints)
