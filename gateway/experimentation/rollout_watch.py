"""Follows rollouts in the store each second, and decides about those whose lease this worker has. On its own thread.

While the store is away the last known state holds and nothing is decided. Before it was ever read the old variants
serve all.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from gateway.experimentation.analysis_process import AnalysisProcess
from gateway.experimentation.rollout_analysis import StepAnalysis, StepQuestion
from gateway.experimentation.store_watch import LEASE, StoreWatch
from gateway.experiments.crowd import Crowd
from gateway.experiments.fast_lane import FastLane
from gateway.experiments.rollout import (
    ENDED,
    Calls,
    Evidence,
    Phase,
    RolloutKey,
    RolloutPlan,
    State,
    decided,
    step_name,
    waits_for,
)
from gateway.experiments.verdict import GuardrailState, distance, guardrail_sentence
from gateway.hooks import GuardrailNow, RolloutNow
from gateway.store import StoreAway, StoreFailed, StoreSettings

if TYPE_CHECKING:
    from gateway.store.rollouts import Counts, Decision, Look, RolloutStore

_log = logging.getLogger(__name__)

_TELL_SECONDS: Final = 600.0  # after which counts are told again that have not changed: the store forgets who is gone
_HISTORY: Final = 20  # decisions that are shown
_RECALLED: Final = 60  # looks of which it is known how calls ended here

CountsOf = Callable[[], "Mapping[tuple[str, str], Counts]"]
"""How calls ended here since the start, by rollout and variant."""


@dataclass(slots=True)
class _Followed:
    """What this worker knows of one rollout."""

    plan: RolloutPlan
    state: State = field(default_factory=State)
    is_known: bool = False  # was the store ever read?
    decides: bool = False
    trouble: str = ""
    calls: FastLane = field(default_factory=FastLane)  # how they end
    answers: FastLane = field(default_factory=FastLane)  # those that were looked at, for NaN and infinity
    counted: Mapping[tuple[str, str], Counts] | None = None  # all workers', at the last look; None: none yet
    analysis: StepAnalysis | None = None  # of the state in force
    asked: float = 0.0  # when its analysis was last asked for, by the store's clock
    evidence: Evidence | None = None
    history: tuple[tuple[float, str, float, str], ...] = ()

    def lead_no_more(self) -> None:
        self.decides, self.counted = False, None
        self.calls, self.answers = FastLane(), FastLane()
        self.analysis = self.evidence = None


class RolloutWatch(StoreWatch[RolloutPlan, _Followed]):
    """Of rollouts."""

    def __init__(
        self,
        settings: StoreSettings,
        worker: str,
        counts: CountsOf,
        on_moved: Callable[[Mapping[RolloutKey, State]], None],
    ) -> None:
        """
        worker:    names this process among all that use the store.
        on_moved:  called on the thread when another state is known, with those of all rollouts.
        """
        super().__init__("rollouts", settings, worker)
        self._counts = counts
        self._on_moved = on_moved
        self._told: dict[tuple[str, str], Counts] = {}  # what the store has of this worker's counts
        self._told_all = time.monotonic()
        self._own: deque[Mapping[tuple[str, str], Counts]] = deque(maxlen=_RECALLED + 1)  # this worker's, of each look
        self._moved: Mapping[RolloutKey, State] = {}  # what `on_moved` was told last
        self._store: RolloutStore | None = None
        self._analyses = AnalysisProcess[StepAnalysis]()
        self.ready: frozenset[str] = frozenset()  # rollouts whose new variant can be called here

    # On the thread

    def _close(self) -> RolloutStore | None:
        self._analyses.close()
        return self._store

    def look(self) -> None:
        """Read the store, follow what it says, and decide what is to be decided here.

        :raises StoreAway: if it can't be used; then nothing has changed.
        """
        plans = self._plans
        if not plans and not self._followed:
            return
        own = self._counts()
        self._own.append(own)
        store = self._opened()
        if time.monotonic() - self._told_all >= _TELL_SECONDS:
            self._told, self._told_all = {}, time.monotonic()
        counts = {key: each for key, each in own.items() if self._told.get(key) != each}
        look = store.look(self._worker, plans, counts, LEASE)
        if not look.read_only:
            self._told.update(counts)
        self._note_read_only(look.read_only)
        self._looked_at = (look.now, time.monotonic())
        self._take_answer()
        self._followed = {name: _followed(plan, self._followed.get(name)) for name, plan in plans.items()}
        for name, known in self._followed.items():
            self._follow(known, look.decisions.get(name))
        self._tell_moved()
        for name, known in self._followed.items():
            if name in look.led and not known.trouble:
                self._lead(known, look)
            else:
                known.lead_no_more()
        self._tell_moved()
        self._ask_next(look.now)

    def _opened(self) -> RolloutStore:
        if self._store is None:
            from gateway.store.rollouts import RolloutStore  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

            self._store = RolloutStore(self._settings.url, self._settings.unit_key)
        return self._store

    def _follow(self, known: _Followed, decision: Decision | None) -> None:
        """Take over the store's state."""
        state, trouble = State(), ""
        if decision is not None and decision.is_of(known.plan):
            state = decision.state
        elif decision is not None:
            was = f"from '{decision.before}' to '{decision.after}' of '{decision.model}'"
            trouble = f"its name was used for a rollout {was} before: choose another one"
        if trouble and trouble != known.trouble:
            _log.error("rollout %s: %s", known.plan.name, trouble)
        known.trouble = trouble
        if state != known.state or not known.is_known:
            self._put(known, state)
        elif state.version and (not known.history or known.history[-1][0] != state.at):
            self._read_history(known)
        known.is_known = True

    def _put(self, known: _Followed, state: State) -> None:
        name, is_first = known.plan.name, not known.is_known
        was, known.state, known.analysis, known.evidence = known.state, state, None, None
        if not state.version:
            if was.version:
                _log.error("rollout %s: the store knows nothing of it any more, so it begins anew", name)
            known.history = ()
            return
        tell = _log.warning if state.phase in (Phase.ROLLED_BACK, Phase.PAUSED) else _log.info
        step = f"step {state.step + 1} of {len(known.plan.steps)}"
        seen = " (as stored)" if is_first else ""
        tell("rollout %s is %s%s, %s, %g of units: %s", name, state.phase.value, seen, step, state.share, state.reason)
        self._read_history(known)

    def _read_history(self, known: _Followed) -> None:
        """For people, so that the state itself is in force without it; then it is read at the next look."""
        name = known.plan.name
        with suppress(StoreAway, StoreFailed):
            history = self._opened().history(name)[-_HISTORY:]
            known.history = tuple(
                (each.state.at, each.state.phase.value, each.state.share, each.state.reason) for each in history
            )

    def _tell_moved(self) -> None:
        states = {known.plan.key: known.state for known in self._followed.values()}
        if states != self._moved:
            self._moved = states
            self._on_moved(states)

    # Deciding

    def _lead(self, known: _Followed, look: Look) -> None:
        plan, now = known.plan, look.now
        known.decides = True
        self._count(known, look.counts.get(plan.name, {}))
        evidence = known.evidence = self._evidence(known, now)
        state = decided(plan, known.state, evidence, now)
        if state is not None and self._opened().decide(plan, state, self._worker):
            self._put(known, state)

    def _count(self, known: _Followed, counts: Mapping[tuple[str, str], Counts]) -> None:
        """Feed the alarms with what all workers have counted since the last look."""
        last, known.counted = known.counted, counts
        if last is None:
            self._recall(known)
            return
        before, after = _come(known.plan, last, counts)
        known.calls.add(_ended(before), _ended(after))
        known.answers.add(_looked_at(before), _looked_at(after))

    def _recall(self, known: _Followed) -> None:
        """What came before this worker decided may have been looked at by nobody: who decided then was stopped, or the
        store was away. By now a broken variant may be left alone, and have too few calls to be found by."""
        plan = known.plan
        own = [{key: each for key, each in counts.items() if key[0] == plan.name} for counts in self._own]
        for last, counts in pairwise(own):
            before, after = _come(plan, last, counts)
            known.calls.recall(_ended(before), _ended(after))
            known.answers.recall(_looked_at(before), _looked_at(after))

    def _evidence(self, known: _Followed, now: float) -> Evidence:
        plan, state, analysis = known.plan, known.state, known.analysis
        before, after = known.calls.evidence
        if known.answers.is_believed:  # where the old variant's answers have NaN as well, that is how they are
            after = known.answers.after
        seen = now
        if self._asks(known):
            seen = analysis.question.asked if analysis is not None and not analysis.trouble else -math.inf
        return Evidence(
            state.step,
            seen,
            plan.name in self.ready,
            analysis.units.get(plan.after, 0) if analysis is not None else 0,
            analysis.guardrails if analysis is not None else (),
            analysis.is_mismatched if analysis is not None else False,
            before,
            after,
        )

    @staticmethod
    def _asks(known: _Followed) -> bool:
        """Is there something to analyse about its step?"""
        plan, state = known.plan, known.state
        if state.phase not in (Phase.RUNNING, Phase.PAUSED) or state.step >= len(plan.steps):
            return False
        return bool(plan.guardrails) or plan.steps[state.step].units > 0

    def _ask_next(self, now: float) -> None:
        """Have the rollout's step analysed that has waited longest for it, if any needs it."""
        waiting = [known for known in self._followed.values() if known.decides and self._asks(known)]
        if not waiting:
            self._analyses.close()
        elif self._analyses.is_free:
            known = min(waiting, key=lambda each: each.asked)
            known.asked = now
            plan, state, settings = known.plan, known.state, self._settings
            name, compared = step_name(plan.name, state.step), plan.experiment(state)
            self._analyses.ask(
                StepQuestion(settings.url, settings.unit_key, name, plan.name, state.version, now, compared)
            )

    def _take_answer(self) -> None:
        analysis = self._analyses.maybe_answer()
        if analysis is None:
            return
        question = analysis.question
        known = self._followed.get(question.rollout)
        if known is None or known.state.version != question.version:
            return
        if analysis.trouble:
            self._say(f"rollout {question.rollout} can't be analysed: {analysis.trouble}")
            if known.analysis is not None:
                return  # which still takes back, and gets old
        known.analysis = analysis

    # For people and metrics; from any thread

    def now(self) -> list[RolloutNow]:
        now, age = self._age()
        followed = self._followed
        return [
            _now(followed.get(name) or _Followed(plan), now, age, self._why_not())
            for name, plan in dict(self._plans).items()
        ]


def _followed(plan: RolloutPlan, known: _Followed | None) -> _Followed:
    """What is known of a plan that may have changed, or be another one."""
    if known is None or known.plan.key != plan.key:
        return _Followed(plan)
    return known if known.plan == plan else _Followed(plan, known.state, known.is_known, history=known.history)


def _come(
    plan: RolloutPlan, last: Mapping[tuple[str, str], Counts], counts: Mapping[tuple[str, str], Counts]
) -> tuple[list[Counts], list[Counts]]:
    """What has come to the old variant's counts and the new one's. The second of a key is the variant."""
    new: dict[str, list[Counts]] = {plan.before: [], plan.after: []}
    for key, each in counts.items():
        if key[1] in new:
            new[key[1]].append(each.since(last[key]) if key in last else each)
    return new[plan.before], new[plan.after]


def _ended(counts: Sequence[Counts]) -> Crowd:
    """How calls ended at all workers."""
    sums = Calls(
        sum(each.good for each in counts),
        sum(each.errors for each in counts),
        sum(each.unanswered for each in counts),
        wrong=sum(each.wrong for each in counts),
        left_alone=sum(each.left_alone for each in counts),
    )
    return Crowd(sums, _summed(each.ended_good for each in counts), _summed(each.ended_bad for each in counts))


def _looked_at(counts: Sequence[Counts]) -> Crowd:
    sums = Calls(good=sum(each.finite for each in counts), not_finite=sum(each.not_finite for each in counts))
    return Crowd(sums, _summed(each.seen_good for each in counts), _summed(each.seen_bad for each in counts))


def _summed(places: Iterable[Sequence[int]]) -> Sequence[int]:
    """By place; workers of the version before say nothing of them."""
    return [sum(each) for each in zip(*filter(None, places), strict=True)]


def _now(known: _Followed, now: float, age: float, why_not: str) -> RolloutNow:
    plan, state, analysis = known.plan, known.state, known.analysis
    waits = tuple(waits_for(plan, state, known.evidence, now)) if known.decides else ()
    trouble = why_not or known.trouble or (analysis.trouble if analysis is not None else "")
    soak = plan.steps[state.step].soak if state.step < len(plan.steps) else 0.0
    is_open = known.is_known and state.phase not in ENDED and state.version > 0
    return RolloutNow(
        plan.name,
        plan.model,
        plan.before,
        plan.after,
        state.phase.value if known.is_known else "unknown",
        state.step + 1,
        len(plan.steps),
        state.share,
        state.since,
        state.reason,
        waits,
        tuple(map(guardrail_now, analysis.guardrails)) if analysis is not None else (),
        analysis.units.get(plan.after, 0) if analysis is not None else 0,
        known.decides,
        age,
        max(0.0, now - state.since - soak) if is_open else 0.0,
        trouble,
        known.history,
    )


def guardrail_now(guardrail: GuardrailState) -> GuardrailNow:
    """As it is shown."""
    name, state = guardrail.effect.outcome, guardrail.state.value
    return GuardrailNow(name, state, distance(guardrail), guardrail_sentence(guardrail))
