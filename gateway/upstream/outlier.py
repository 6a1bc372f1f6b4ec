"""Pure: whether an endpoint fails a model more often than its peers do, and for how long it is left alone then.

A server with a sticky CUDA error lives, says that its models are ready, and answers every call with INTERNAL at once.
What gives it away is the comparison: others of its pool answer the same calls. What callers or the model itself do
wrong goes wrong at all endpoints alike, and ejects none.

How likely it is that chance made the difference is bounded by Chernoff: of n calls that each fail with probability p, a
share of q > p or more fails with at most exp(-n KL(q, p)). An endpoint is ejected once that is below a millionth, by
its calls of the last seconds, or by the unbroken run of failures at their end beside what its peers did meanwhile: so
it does not matter how many calls went well before it broke.

Where a whole pool fails and other variants of the model may stand in for it, these are the peers. As they have no calls
while all goes to the first, they get a share of them first, for a sample: so input that is bad everywhere is told from
a variant that is broken, before it costs anybody his variant. Input that is bad at one variant only, or too slow there
for who sent it, is told by the calls of others, which go well all the same: while any do, the variant stays.

An ejected endpoint is left alone for some seconds, longer each time. Then single calls, some way apart, go there for a
trial: some that go well let it back in, failures send it off again. Instants are seconds on one clock, and arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from gateway.upstream.latency import Latency

WINDOW: Final = 5.0  # seconds of which calls are remembered, at least; at most twice as long
SURE: Final = 13.8  # -ln of a millionth
LIKELY: Final = 3.0  # -ln of 1 in 20: enough against an endpoint on trial
MEANWHILE: Final = 20  # calls of the peers, from which on a run is judged by them
_MUCH: Final = 2.0  # times the share that failed of these: they are few, and chance may have favoured them
MARGIN: Final = 0.1  # by so much a larger share must fail than at the peers: a sure difference may still be a small one
FIRST_SECONDS: Final = 5.0  # out for so long, and twice as long each time
MOST_SECONDS: Final = 300.0
FORGIVEN_SECONDS: Final = 60.0  # each such time without an ejection takes one of the doublings back
TRIAL_GAP: Final = 0.2  # seconds between two calls to an endpoint on trial
TRIAL_CALLS: Final = 3  # that must go well

BARREN_SECONDS: Final = 1.0  # without a success, after which a whole variant may be compared with others
DOUBTFUL_RUN: Final = 5  # failures in a row, after which it should be known how a fallback does with such calls
DOUBT_SECONDS: Final = 5.0  # for which it is asked
SAMPLED: Final = 0.2  # share of the calls that it gets for that ...
SAMPLE_CALLS: Final = 20  # ... until it had so many in the window, whatever others do to keep the doubt alive

Counts = tuple[int, int]
"""Calls, and how many of them failed."""


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


class Record:
    """How the calls of one model went on one endpoint lately, and whether it is left alone by them."""

    __slots__ = (
        "_before_calls",
        "_before_failed",
        "_beside",
        "_calls",
        "_ejected_at",
        "_failed",
        "_out_until",
        "_run",
        "_seconds",
        "_turned_at",
        "_well",
        "_well_at",
        "ever",
        "ever_failed",
        "is_ejected",
        "is_on_trial",
        "latency",
    )

    def __init__(self) -> None:
        self.is_ejected = False  # also while it is on trial
        self.is_on_trial = False
        self.latency = Latency()
        self._out_until = 0.0  # on trial: until when the next call must wait
        self._ejected_at = 0.0
        self._seconds = 0.0  # of the last ejection, less what was forgiven since
        self._well = 0  # calls of the trial that went well
        self._well_at = 0.0  # when a call went well, last
        self._run = 0  # failures since the last success
        self._beside: Counts = (0, 0)  # of the peers, when the run began
        self.ever = self.ever_failed = 0  # calls
        self._calls = self._failed = self._before_calls = self._before_failed = 0
        self._turned_at = 0.0

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
        self._turned_at = now

    def succeeded(self, now: float) -> bool:
        """A call went well. True: that lets the endpoint back in."""
        if now - self._turned_at >= WINDOW:
            self._turn(now)
        self._calls += 1
        self.ever += 1
        self._run = 0
        self._well_at = now
        if not self.is_on_trial:
            return False
        self._well += 1
        if self._well < TRIAL_CALLS:
            return False
        self.is_ejected = self.is_on_trial = False
        return True

    def failed(self, now: float) -> None:
        self._turn(now)
        self._calls += 1
        self._failed += 1
        self.ever += 1
        self.ever_failed += 1
        self._run += 1

    def is_alone(self, beside: Counts) -> bool:
        """To be asked after each failure: has it failed one call after the other, and its peers did not meanwhile?

        beside: their calls ever, and those that failed.
        """
        if self._run <= 1:
            self._beside = beside
        calls, failed = beside[0] - self._beside[0], beside[1] - self._beside[1]
        if self.is_ejected or calls < MEANWHILE:  # fewer also where a peer has left
            return False
        expected = _MUCH * (max(failed, 0) + 1) / (calls + 2) + MARGIN
        return expected < 1.0 and evidence(self._run, self._run, expected) >= SURE

    def is_outlier(self, expected: float, now: float) -> bool:
        """Does it do worse than it should? Never of one that is out: what comes then was begun before.

        expected: share of failures, of its peers'.
        """
        if self.is_ejected and not self.is_on_trial:
            return False
        bound = LIKELY if self.is_on_trial else SURE
        calls, failed = self.counts(now)
        if not calls or failed / calls - expected < MARGIN:
            return False
        return max(evidence(calls, failed, expected), evidence(self._run, self._run, expected)) >= bound

    def may_be_broken(self, now: float) -> bool:
        """Does nothing go well any more? What fails only some calls may be what these ask for."""
        return self.is_on_trial or now - self._well_at >= BARREN_SECONDS

    @property
    def is_doubtful(self) -> bool:
        return self._run >= DOUBTFUL_RUN and not self.is_ejected

    def eject(self, now: float) -> float:
        """Leave it alone. Answers for how many seconds."""
        forgiven = (now - self._ejected_at - self._seconds) / FORGIVEN_SECONDS
        before = self._seconds / math.pow(2.0, min(max(forgiven, 0.0), 64.0))
        self._seconds = seconds = min(max(2.0 * before, FIRST_SECONDS), MOST_SECONDS)
        self._ejected_at = now
        self._out_until = now + seconds
        self.is_ejected = True
        self._begin_anew()
        return seconds

    def pardon(self, now: float) -> None:
        """It was started anew, it seems: have it tried soon, and judged by what it does from now on."""
        if not self.is_ejected:
            self._begin_anew()
        elif not self.is_on_trial:
            self._out_until = min(self._out_until, now)

    def is_out(self, now: float) -> bool:
        """Is it left alone, and not even on trial?"""
        return self.is_ejected and not self.is_on_trial and now < self._out_until

    def may_try(self, now: float) -> bool:
        """May the next call go there for a trial? Those after it have to wait then."""
        if now < self._out_until:
            return False
        self.is_on_trial = True
        self._out_until = now + TRIAL_GAP
        return True

    def _begin_anew(self) -> None:
        self.is_on_trial = False
        self._well = self._run = 0
        self._calls = self._failed = self._before_calls = self._before_failed = 0
