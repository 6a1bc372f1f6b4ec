"""A rollout: moves a model's units from one variant to another in steps, or all of them back. Decisions only.

The next state follows from the plan, the last state, what was seen and the time. Who decides, where states are kept and
how shares come into force is for others; they write a state only in place of the one that its version follows.

Error rates: guardrails are judged by confidence sequences that hold at every look, one per step and guardrail, each at
its part of `alpha`. So a variant that is within all limits is rolled back by a guardrail with probability `alpha` at
most in the whole rollout, however often one looks. The fast lane has a rate of its own (`Alarm`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Final

from gateway.experiments.plan import Guardrail, Plan
from gateway.experiments.verdict import Guard, GuardrailState, guardrail_sentence

FRESH_SECONDS: Final = 10.0  # older evidence moves nothing on


class Phase(Enum):
    """Where a rollout stands. One that has ended stays so: another attempt is another rollout, with its own errors."""

    WAITING = "waiting"  # for its variant to be ready
    RUNNING = "running"
    PAUSED = "paused"  # keeps its share and its guardrails, and does not go on by itself
    ROLLED_BACK = "rolled back"
    PROMOTED = "promoted"


ENDED: Final = frozenset({Phase.ROLLED_BACK, Phase.PROMOTED})


class Command(Enum):
    """What a person may ask for."""

    PROMOTE = "promote"  # go to the next step now, or from the last one to all units
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


_ALLOWED: Final = {
    Command.PROMOTE: frozenset({Phase.WAITING, Phase.RUNNING, Phase.PAUSED}),
    Command.PAUSE: frozenset({Phase.RUNNING}),
    Command.RESUME: frozenset({Phase.PAUSED}),
    Command.ABORT: frozenset({Phase.WAITING, Phase.RUNNING, Phase.PAUSED}),
}


class CommandRefused(Exception):
    """The rollout is in no phase for the command. The text is for whoever gave it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A share of units, for a while."""

    share: float  # of the new variant, in (0, 1)
    soak: float  # least seconds here
    units: int = 0  # least units of the new variant that were seen here
    must_hold: bool = False  # go on only once every guardrail is known to hold; otherwise none may be breached


RolloutKey = tuple[str, str, str, str]
"""Which rollout a state is of: its name, the public model and the two variants. Others of that name are another one."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A rollout as config says it.

    :raises ValueError: if there is no step, or shares do not rise within (0, 1)
    """

    name: str
    model: str  # the public model
    before: str  # the variant that serves now
    after: str  # the one that shall
    steps: tuple[Step, ...]
    guardrails: tuple[Guardrail, ...] = ()
    alpha: float = 0.05  # probability of ever rolling back by a guardrail where none is breached
    units: int = 10_000  # about how many are expected in a step: where intervals are narrowest

    def __post_init__(self) -> None:
        shares = [0.0, *(step.share for step in self.steps), 1.0]
        if len(shares) < 3 or any(not low < high for low, high in pairwise(shares)):
            raise ValueError("a rollout has at least one step, and shares that rise between 0 and 1")

    @property
    def key(self) -> RolloutKey:
        return self.name, self.model, self.before, self.after

    def experiment(self, state: State) -> Plan | None:
        """What is compared in a state's step, of which the report's guardrails are evidence; None without guardrails.

        Exposures are of that step alone, under this name: with another share they would be another experiment. So the
        share is the one in force, which a plan that was changed in the middle of the step does not change.
        """
        if not self.guardrails:
            return None
        step, first = state.step, self.guardrails[0]
        share = self.steps[step].share if state.phase in ENDED else state.share
        return Plan(
            name=step_name(self.name, step),
            shares={self.before: 1.0 - share, self.after: share},
            baseline=self.before,
            primary=first.outcome,
            smallest_effect=first.worse_by,
            guardrails=self.guardrails,
            alpha=self.alpha / len(self.steps),
            units=self.units,
            model=self.model,
        )


def step_name(rollout: str, step: int) -> str:
    """By which the units of one step are known. step: from 0."""
    return f"{rollout}/{step + 1}"


@dataclass(frozen=True, slots=True)
class State:
    """A decision, and what is in force since. The share is part of it, so that it holds whatever a replica's config."""

    phase: Phase = Phase.WAITING
    step: int = 0  # from 0
    share: float = 0.0  # of the new variant
    since: float = 0.0  # Unix time at which the share came into force
    at: float = 0.0  # Unix time of the decision
    reason: str = ""
    version: int = 0  # each decision has the next one, and is written only in place of the one before


@dataclass(frozen=True, slots=True)
class Calls:
    """How calls of one variant ended, in some short time."""

    good: int = 0
    errors: int = 0
    unanswered: int = 0  # until their deadline
    not_finite: int = 0  # NaN or Inf in the answer
    wrong: int = 0  # the answer was refused for that, or since it is not what the model's metadata says
    left_alone: int = 0  # another variant had it, as this one was left alone for what it did to others

    @property
    def bad(self) -> int:
        return self.errors + self.unanswered + self.not_finite + self.wrong + self.left_alone

    def plus(self, other: Calls) -> Calls:
        return Calls(
            self.good + other.good,
            self.errors + other.errors,
            self.unanswered + other.unanswered,
            self.not_finite + other.not_finite,
            self.wrong + other.wrong,
            self.left_alone + other.left_alone,
        )


_TOLERATED: Final = 0.2  # of calls that are bad: no reason for haste, the guardrails judge it
_BROKEN: Final = 0.95
LOG_BAD: Final = math.log(_BROKEN / _TOLERATED)
_LOG_GOOD: Final = math.log((1.0 - _BROKEN) / (1.0 - _TOLERATED))
_ALARM: Final = math.log(1e9)


def moved(log_e: float, good: int, bad: int) -> float:
    """`Alarm.log_e` after such calls."""
    return min(max(log_e + bad * LOG_BAD + good * _LOG_GOOD, 0.0), _ALARM)


@dataclass(frozen=True, slots=True)
class Alarm:
    """The fast lane: is nearly every call of a variant bad, all of a sudden or from the start?

    While at most a fifth of its calls are bad, whatever went before, a false alarm comes on average after 1e9 calls or
    more. If all are bad it takes 14 calls. Below about two thirds it may never come, and guardrails decide. One good
    call more than bad ones ends it, however long it was raised.

    source: Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", New
    England Journal of Statistics in Data Science 2 (2023), the detector of CUSUM type.
    """

    log_e: float = 0.0
    calls: Calls = Calls()  # since it last was at zero

    def after(self, calls: Calls) -> Alarm:
        """With calls of the last moment, such as a second: a change within it is noticed later, never falsely."""
        log_e = moved(self.log_e, calls.good, calls.bad)
        return Alarm(log_e, self.calls.plus(calls)) if log_e > 0.0 else Alarm()

    @property
    def is_raised(self) -> bool:
        return self.log_e >= _ALARM

    def doubted(self) -> Alarm:
        """The same, of which it is not known whether it is its own fault: it is not raised, nor is all well."""
        return replace(self, log_e=min(self.log_e, _ALARM / 2.0))

    def __str__(self) -> str:
        counts = self.calls
        kinds = (
            (counts.errors, "errors"),
            (counts.unanswered, "unanswered"),
            (counts.not_finite, "NaN or Inf"),
            (counts.wrong, "wrong answers: NaN, Inf or undeclared"),
            (counts.left_alone, "not tried after that"),
        )
        told = ", ".join(f"{count} {what}" for count, what in kinds if count)
        return f"{counts.bad} of its last {counts.bad + counts.good} calls are bad ({told})"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of one step."""

    step: int
    at: float  # Unix time until which it was seen
    is_ready: bool = True  # the new variant can be called, and has passed its parity gate
    units: int = 0  # of the new variant
    guardrails: tuple[GuardrailState, ...] = ()
    is_mismatched: bool = False  # units do not come to variants as planned
    before: Alarm = Alarm()
    after: Alarm = Alarm()


def decided(plan: RolloutPlan, state: State, evidence: Evidence | None, now: float) -> State | None:
    """The next state, or None if this one stays. evidence: None if nothing is known, such as with the store away.

    Old evidence of a step can still take it back, and never moves it on. Evidence of another step does neither.
    """
    if state.phase in ENDED or evidence is None or evidence.step != state.step:
        return None
    if state.phase is not Phase.WAITING:
        harm = _harm(plan, evidence)
        if harm:
            return _next(state, now, Phase.ROLLED_BACK, harm, share=0.0)
    if state.phase is Phase.PAUSED:
        return None
    if state.phase is Phase.RUNNING:
        doubt = _doubt(plan, state, evidence)
        if doubt:
            return _next(state, now, Phase.PAUSED, doubt)
    if any(waits_for(plan, state, evidence, now)):
        return None
    return _onwards(plan, state, now, "the variant is ready" if state.phase is Phase.WAITING else "the step has passed")


def commanded(plan: RolloutPlan, state: State, command: Command, by: str, now: float) -> State:
    """The next state as a person asked for it.

    by: who asked, for the reason that is kept.

    :raises CommandRefused: if the rollout is in no phase for it
    """
    if state.phase not in _ALLOWED[command]:
        phases = " or ".join(phase.value for phase in Phase if phase in _ALLOWED[command])
        raise CommandRefused(
            f"rollout '{plan.name}' is {state.phase.value}; {command.value} is for one that is {phases}"
        )
    reason = f"{command.value} by {by}"
    if command is Command.PROMOTE:
        return _onwards(plan, state, now, reason)
    if command is Command.ABORT:
        return _next(state, now, Phase.ROLLED_BACK, reason, share=0.0)
    return _next(state, now, Phase.PAUSED if command is Command.PAUSE else Phase.RUNNING, reason)


def waits_for(plan: RolloutPlan, state: State, evidence: Evidence | None, now: float) -> Iterator[str]:
    """Why a rollout does not go on by itself, for people; nothing if it does, or has ended."""
    if state.phase in ENDED:
        return
    if state.phase is Phase.PAUSED:
        # However long its soak time and whatever its guardrails, it goes on by a person alone.
        yield f"it is paused ({state.reason}): resume, promote or abort it"
        return
    if evidence is None or evidence.step != state.step or abs(now - evidence.at) > FRESH_SECONDS:
        yield "nothing new is known of this step"
        return
    if not evidence.is_ready:
        yield f"'{plan.after}' is not ready"
    if evidence.after.log_e > 0.0:
        yield f"the latest calls of '{plan.after}' have failed"
    if state.phase is not Phase.WAITING and state.step < len(plan.steps):
        yield from _missing(plan, plan.steps[state.step], evidence, now - state.since)


def _missing(plan: RolloutPlan, step: Step, evidence: Evidence, seconds: float) -> Iterator[str]:
    if seconds < step.soak:
        yield f"{step.soak - seconds:.0f} s of its soak time are left"
    if evidence.units < step.units:
        yield f"{evidence.units} of {step.units} units were seen"
    for each in evidence.guardrails:
        if not each.effect.is_reported:  # of nobody it tells nothing, and what nobody reports would guard nothing
            yield f"nothing is known of guardrail '{each.effect.outcome}': no report of units of one variant"
    if step.must_hold:
        held = {each.effect.outcome for each in evidence.guardrails if each.state is Guard.HELD}
        for guardrail in plan.guardrails:
            if guardrail.outcome.name not in held:
                yield f"guardrail '{guardrail.outcome.name}' is not decided"


def _harm(plan: RolloutPlan, evidence: Evidence) -> str:
    """Why all units must go back; "" if nothing says so.

    What breaks both variants is not the new one's fault. Where the old one has few calls that may not be seen in time.
    """
    if evidence.after.is_raised and not evidence.before.is_raised:
        return f"'{plan.after}' is broken: {evidence.after}"
    for each in evidence.guardrails:
        if each.state is Guard.BREACHED:
            return f"guardrail breached: {guardrail_sentence(each)}"
    return ""


def _doubt(plan: RolloutPlan, state: State, evidence: Evidence) -> str:
    """Why a person should look; "" if nothing says so."""
    if evidence.after.is_raised:
        return f"both variants are broken; '{plan.after}': {evidence.after}"
    if evidence.is_mismatched:
        return "units do not come to variants as planned, so guardrails say nothing"
    if state.step >= len(plan.steps):
        return f"the plan has {len(plan.steps)} steps now, and this is step {state.step + 1}"
    return ""


def _onwards(plan: RolloutPlan, state: State, now: float, reason: str) -> State:
    step = 0 if state.phase is Phase.WAITING else state.step + 1
    if step >= len(plan.steps):
        return _next(state, now, Phase.PROMOTED, reason, share=1.0)
    # A plan that was changed meanwhile takes no units back: that is for a rollback.
    share = max(state.share, plan.steps[step].share)
    return replace(_next(state, now, Phase.RUNNING, reason, share=share), step=step)


def _next(state: State, now: float, phase: Phase, reason: str, *, share: float | None = None) -> State:
    since, share = (state.since, state.share) if share is None else (now, share)
    return State(phase, state.step, share, since, now, reason, state.version + 1)
