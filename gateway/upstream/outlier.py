"""Pure: whether an endpoint fails a model more often than its peers do, and for how long it is left alone then.

A server with a sticky CUDA error lives, says that its models are ready, and answers every call with INTERNAL at once.
What gives it away is the comparison: others of its pool answer the same calls. What callers or the model itself do
wrong goes wrong at all endpoints alike, and ejects none.

How likely it is that chance made the difference is bounded by Chernoff: of n calls that each fail with probability p, a
share of q > p or more fails with at most exp(-n KL(q, p)). An endpoint is ejected once that is below a millionth, by
its calls of the last seconds, or by the unbroken run of failures at their end beside what its peers did meanwhile: so
it does not matter how many calls went well before it broke.

Where a whole pool fails and other variants of the model may stand in for it, these are the peers. As they have no calls
while all goes to the first, they get a share of those that fail first, for a sample: so input that is bad everywhere is
told from a variant that is broken, before it costs anybody his variant.

Input that is bad at one variant only, or too slow there for who sent it, looks like a broken variant to whoever sends
it, and to nobody else. So the failures of one caller keep away his own calls alone, those of one user of a caller that
user's; others find the endpoint as it is. Once calls of several callers fail there it is ejected for all. For how long,
and what lets calls back, is said in `ejection`; whose the failures are, in `failures`. Instants are seconds on one
clock, and arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gateway.upstream.ejection import MOST_SECONDS, MOST_SHARED_SECONDS, Ejection
from gateway.upstream.failures import EVERYBODY, NOBODY_KNOWN, Failures, Scopes
from gateway.upstream.latency import Latency

WINDOW: Final = 5.0  # seconds of which calls are remembered, at least; at most twice as long
SURE: Final = 13.8  # -ln of a millionth
LIKELY: Final = 1.0  # -ln of 1 in 3: enough against an endpoint on trial, as one failure is beside one good call
ENOUGH: Final = 7.0  # -ln of 1 in 1,000: enough for a caller's own calls, where another variant answers them meanwhile
CONFIRMED: Final = 6.0  # -ln of 1 in 400: enough of a second caller, where it is sure for a first one
MOST_EJECTIONS: Final = 256  # of one model on one endpoint, for different callers
_LOOK_SECONDS: Final = 10.0  # between two looks for ejections that may be forgotten
MEANWHILE: Final = 20  # calls of the peers, from which on a run is judged by them
_MUCH: Final = 2.0  # times the share that failed of these: they are few, and chance may have favoured them
_COMPARABLE: Final = 4  # times as many failures as a sample has calls: of more, most were other calls than these
MARGIN: Final = 0.1  # by so much a larger share must fail than at the peers: a sure difference may still be a small one

BARREN_SECONDS: Final = 1.0  # without a success, after which a whole variant may be compared with others
DOUBTFUL_RUN: Final = 5  # failures in a row, after which it should be known how a fallback does with such calls
DOUBT_SECONDS: Final = 60.0  # for which it is asked, by calls of whom the last of these failed
SAMPLED: Final = 0.5  # share of these calls that it gets for that ...
SAMPLE_CALLS: Final = 8  # ... until it had so many in the window, whatever anybody does to keep the doubt alive

Counts = tuple[int, int]
"""Calls, and how many of them failed."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """How calls went where an endpoint's own could have gone."""

    lately: Sequence[Counts] = ()  # at each, in its window; none: there is nothing to measure the endpoint by
    ever: Counts = (0, 0)  # at all together, with those that have left by now


NOWHERE: Final = Elsewhere()


def evidence(calls: int, failed: int, expected: float) -> float:
    """-ln of a bound on the probability that chance makes so many of the calls fail. expected: share, within (0, 1)."""
    share = failed / calls if calls else 0.0
    if share <= expected:
        return 0.0
    divergence = share * math.log(share / expected)
    if share < 1.0:
        divergence += (1.0 - share) * math.log((1.0 - share) / (1.0 - expected))
    return calls * divergence


def expected_share(peers: Sequence[Counts]) -> float:
    """The share of calls that fails without the endpoint's doing: that of the better half of its peers.

    Of half of them, since several may be broken at once. By Laplace's rule, so that few calls prove little: a half if
    there were none.
    """
    best = sorted(((failed + 1) / (calls + 2), calls, failed) for calls, failed in peers)[: (len(peers) + 1) // 2]
    calls = sum(each[1] for each in best)
    failed = sum(each[2] for each in best)
    return (failed + 1) / (calls + 2)


class Standing(Enum):
    """May an endpoint be used for a model, as far as its peers are better at it?"""

    IN = "in"
    OUT = "out"  # it is left alone
    TRIAL = "trial"  # this call should go there, to see whether it has recovered


def surprise(run: int, peers: Counts) -> float:
    """-ln of the probability that so many calls in a row fail, if each does as likely as each of these few did.

    How likely that is they tell by a uniform prior, so the more failures are asked for, the fewer the peers' calls are:
    the product of (failed + 1 + i) / (calls + 2 + i) for i below `run`. 0 if none of the peers' calls went well.

    A run may have begun long before the few came: input that fails everywhere, of whom nobody else was calling then,
    makes the longest. So no more of it counts than what may have come beside them.
    """
    calls, failed = peers
    if failed >= calls:
        return 0.0
    run = min(run, _COMPARABLE * calls)
    lgamma = math.lgamma
    return lgamma(failed + 1) - lgamma(failed + 1 + run) + lgamma(calls + 2 + run) - lgamma(calls + 2)


@dataclass(frozen=True, slots=True)
class Standard:
    """What a failing endpoint is measured by: how its peers do, or variants that may stand in for its own."""

    lately: float  # share of their calls that failed in their windows, within (0, 1)
    meanwhile: float = 1.0  # the same since the endpoint's last failures in a row began; 1: too few to tell
    samples: Sequence[Counts] = ()  # of those who get few calls: they are measured by these alone
    enough: float = SURE  # evidence, for a single caller's or user's calls

    def against(self, calls: int, failed: int, run: int) -> float:
        """Evidence against an endpoint that failed so many calls of its window, and so many in a row since."""
        if self.samples:
            return max(surprise(run, sample) for sample in self.samples)
        found = 0.0
        if calls and failed / calls - self.lately >= MARGIN:
            found = max(evidence(calls, failed, self.lately), evidence(run, run, self.lately))
        return found if self.meanwhile >= 1.0 else max(found, evidence(run, run, self.meanwhile))


class Record:
    """How the calls of one model went on one endpoint lately, and whose calls leave it alone by them."""

    __slots__ = (
        "_before_at",
        "_before_calls",
        "_before_failed",
        "_began",
        "_calls",
        "_failed",
        "_failures",
        "_look_at",
        "_run",
        "_turned_at",
        "_well_at",
        "ejections",
        "ever",
        "ever_failed",
        "latency",
    )

    def __init__(self) -> None:
        self.ejections: dict[int, Ejection] = {}  # by the last of their scopes; also those on trial
        self.latency = Latency()
        self._failures = Failures()
        self._look_at = 0.0  # when to look for ejections that may be forgotten
        self._well_at = 0.0  # when a call went well, last
        self._run = 0  # failures since the last success
        self._began: tuple[Counts, Counts] = ((0, 0), (0, 0))  # of peers and of others, when the run began
        self.ever = self.ever_failed = 0  # calls
        self._calls = self._failed = self._before_calls = self._before_failed = 0
        self._turned_at = self._before_at = 0.0

    def counts(self, now: float) -> Counts:
        """Of the window."""
        self._turn(now)
        return self._calls + self._before_calls, self._failed + self._before_failed

    def _turn(self, now: float) -> None:
        past = now - self._turned_at
        if past < WINDOW:
            return
        is_recent = past < 2 * WINDOW
        self._before_calls = self._calls if is_recent else 0
        self._before_failed = self._failed if is_recent else 0
        self._calls = self._failed = 0
        self._before_at = self._turned_at if is_recent else now
        self._turned_at = now

    def succeeded(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """A call went well. True: that ends an ejection. scopes: of the call; not asked for if there is none."""
        if now - self._turned_at >= WINDOW:
            self._turn(now)
        self._calls += 1
        self.ever += 1
        self._run = 0
        self._well_at = now
        return bool(self.ejections) and self._tried_well(scopes, now)

    def _tried_well(self, scopes: Scopes, now: float) -> bool:
        before = len(self.ejections)
        for each in self._of(scopes):
            if each.is_on_trial and each.went_well():
                del self.ejections[each.whose[-1]]
                for narrower in self._within(each.whose):
                    narrower.pardon(now)
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            for scope in [scope for scope, each in self.ejections.items() if scope and each.is_forgotten(now)]:
                del self.ejections[scope]
        return len(self.ejections) < before

    def failed(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> None:
        """A call has failed. Of those who leave the endpoint alone only their trials count, and only for themselves."""
        self._turn(now)
        self.ever += 1
        self.ever_failed += 1
        found = self._of(scopes)
        if found:
            if found[-1].is_on_trial:
                found[-1].went_wrong()
            return
        self._calls += 1
        self._failed += 1
        self._run += 1
        self._failures.add(now, scopes)

    def standards(self, peers: Elsewhere, others: Elsewhere) -> Sequence[Standard]:
        """What it is measured by, to be asked after each failure.

        peers: the endpoints of its pool; others: the variants that may stand in.
        """
        if self._run <= 1:
            self._began = (peers.ever, others.ever)
        found = []
        if peers.lately:
            calls, failed = _since(peers.ever, self._began[0])
            meanwhile = _MUCH * (failed + 1) / (calls + 2) + MARGIN if calls >= MEANWHILE else 1.0
            found.append(Standard(expected_share(peers.lately), meanwhile))
        if others.lately:
            lately = (sum(each[0] for each in others.lately), sum(each[1] for each in others.lately))
            samples = (lately, _since(others.ever, self._began[1]))
            found.append(Standard(expected_share(others.lately), samples=samples, enough=ENOUGH))
        return found

    def condemned_by(self, scopes: Scopes, standards: Sequence[Standard], now: float) -> Scopes | None:
        """After a failure: who should leave the endpoint alone for it. None: nobody, or who does so already.

        scopes: of the call that failed. What fails for one of a kind is held against the endpoint by him alone.
        """
        found = self._of(scopes)
        if found:
            return self._condemned_again(found, standards, now)
        calls, failed = self.counts(now)
        found_by = [(each.against(calls, failed, self._run), each.enough) for each in standards]
        against = max((each[0] for each in found_by), default=0.0)
        if against < CONFIRMED:
            return None
        for depth in range(1, max(len(scopes), 2)):
            within = scopes[:depth]
            if any(
                each.whose[:-1][:depth] == within and each.whose[: depth + 1] != scopes[: depth + 1]
                for each in self.ejections.values()
            ):
                return within  # another one has found so already
            if against >= SURE and self._is_said_by_others(within, standards, now):
                return within
        return self._worst(now) if any(found >= enough for found, enough in found_by) else None

    def _condemned_again(self, found: Sequence[Ejection], standards: Sequence[Standard], now: float) -> Scopes | None:
        """A call of a trial has failed, or one that was begun before. found: the ejections that it comes under."""
        own = found[-1]
        if not own.is_on_trial or not own.failed:
            return None
        calls = own.well + own.failed
        if standards and max(each.against(calls, own.failed, own.run) for each in standards) < LIKELY:
            return None  # if there is nobody to compare it with now, what was found before holds
        for wider in found[:-1]:
            wider.was_hindered(now)
        return own.whose

    def _is_said_by_others(self, within: Scopes, standards: Sequence[Standard], now: float) -> bool:
        """Is there evidence also without the one who had most failures?"""
        calls, failed = self.counts(now)
        run, lately = self._failures.others(within, self._run, self._before_at)
        return max((each.against(calls - failed + lately, lately, run) for each in standards), default=0.0) >= CONFIRMED

    def _worst(self, now: float) -> Scopes:
        """The one who had most failures, and of his users the one."""
        whose: Scopes = NOBODY_KNOWN
        while True:
            narrower = self._failures.worst(whose, self._run, self._before_at)
            if narrower == whose:
                return whose
            whose = narrower

    def may_be_broken(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Does nothing go well any more? What fails only some calls may be what these ask for."""
        return now - self._well_at >= BARREN_SECONDS or any(each.is_on_trial for each in self._of(scopes))

    @property
    def is_doubtful(self) -> bool:
        return self._run >= DOUBTFUL_RUN and EVERYBODY not in self.ejections

    def eject(self, now: float, whose: Scopes = NOBODY_KNOWN, by: Scopes = NOBODY_KNOWN) -> float:
        """Have those of a scope leave it alone. Answers for how many seconds. by: whose call was the last to fail.

        Those of them who are known to fail have an ejection of their own beside it: once it has ended by the calls of
        others, they still have to prove that theirs go well.
        """
        depth = len(whose)
        known = {scopes[: depth + 1] for scopes in (by, *self._failures.within(whose))}
        known.discard(whose)
        for each in known:
            self._eject(each, now, MOST_SECONDS)
        seconds = self._eject(whose, now, MOST_SHARED_SECONDS if known else MOST_SECONDS)
        calls, failed = self.counts(now)
        self._run, lately = self._failures.forget(whose, self._run, self._before_at)
        self._calls, self._failed = calls - failed + lately, lately
        self._before_calls = self._before_failed = 0
        return seconds

    def _eject(self, whose: Scopes, now: float, most: float) -> float:
        found = self.ejections.get(whose[-1])
        if found is None:
            if len(self.ejections) >= MOST_EJECTIONS:
                del self.ejections[next(scope for scope in self.ejections if scope != EVERYBODY)]
            found = self.ejections[whose[-1]] = Ejection(whose)
        return found.begin(now, most)

    def pardon(self, now: float) -> None:
        """It was started anew, it seems: have it tried soon, and judged by what it does from now on."""
        self._failures.clear()
        self._run = self._calls = self._failed = self._before_calls = self._before_failed = 0
        for each in self.ejections.values():
            each.pardon(now)

    def standing(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> Standing:
        """TRIAL is answered to one call, and to the next one after a while."""
        found = self._of(scopes)
        if not found:
            return Standing.IN
        own = found[-1]
        for each in found:
            if each.must_wait(now, is_known=each is not own):
                return Standing.OUT
        for each in found:
            each.try_once(now)
        return Standing.TRIAL

    def is_out(self, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Is it left alone by these, and not even on trial?"""
        return any(each.is_out(now) for each in self._of(scopes))

    def is_ejected(self, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Also while it is on trial."""
        return bool(self._of(scopes))

    def is_known_to_fail(self, scopes: Scopes) -> bool:
        """Have these had it ejected themselves?"""
        return bool(self._of(scopes[-1:]))

    def seconds_left(self, now: float) -> float:
        """Of the longest of its ejections, until a call may go there for a trial."""
        return max((each.seconds_left(now) for each in self.ejections.values()), default=0.0)

    def _of(self, scopes: Scopes) -> Sequence[Ejection]:
        """The ejections that a call comes under, from the widest."""
        ejections = self.ejections
        return [ejections[scope] for scope in scopes if scope in ejections] if ejections else ()

    def _within(self, whose: Scopes) -> Sequence[Ejection]:
        """Those of parts of a scope."""
        return [each for each in self.ejections.values() if each.whose[:-1][: len(whose)] == whose]


def _since(now: Counts, then: Counts) -> Counts:
    """What was counted meanwhile; fewer where one of those counted has left."""
    return max(now[0] - then[0], 0), max(now[1] - then[1], 0)
