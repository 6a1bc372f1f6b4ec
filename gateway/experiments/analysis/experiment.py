"""A plan and what was seen → a report, at any look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from gateway.experiments.analysis.doubts import doubts
from gateway.experiments.analysis.look import Look
from gateway.experiments.bandit import Tally
from gateway.experiments.plan import OutcomeSpec, Plan
from gateway.experiments.units import Units
from gateway.experiments.verdict import Answer, GuardrailState, Report, advised, decided, guarded

_DAY: Final = 86_400.0


def looks(plan: Plan, units: Units, each: int) -> Iterator[Report]:
    """What the report was after so many units each, with what had been reported until then."""
    for count in range(each, units.at.size + 1, each):
        wait = plan.window or 0.0
        yield analysed(plan, units, float(units.at[count - 1]) + wait)


def analysed(plan: Plan, units: Units, at: float | None = None) -> Report:
    """The report at that Unix time; by default at the end of what was seen."""
    look = Look(plan, units, units.end if at is None else at)
    treatments = plan.treatments
    alpha = plan.alpha / len(treatments)
    primary = tuple(look.effect(plan.primary, arm, alpha, plan.smallest_effect) for arm in treatments)
    guards = len(plan.guardrails) * len(treatments)
    guardrails = tuple(
        GuardrailState(effect, each.worse_by, guarded(effect, each.worse_by))
        for each in plan.guardrails
        for effect in (look.effect(each.outcome, arm, plan.alpha / guards, None) for arm in treatments)
    )
    others = len(plan.secondary) * len(treatments)
    secondary = tuple(
        look.effect(each, arm, plan.alpha / others, None) for each in plan.secondary for arm in treatments
    )
    ratio = look.sample_ratio()
    answer, arm = decided(plan, primary, guardrails, ratio)
    left = look.units_left(primary) if answer is Answer.UNDECIDED else None
    rate = look.units_per_second()
    seconds = left / rate if left is not None and rate else None
    return Report(
        experiment=plan.name,
        at=look.at,
        units=look.count,
        answer=answer,
        arm=arm,
        primary=primary,
        guardrails=guardrails,
        secondary=secondary,
        sample_ratio=ratio,
        seconds_left=seconds,
        units_left=left,
        doubts=tuple(doubts(look, primary, ratio, guardrails, secondary)),
        advice=advised(answer, arm, guardrails, plan, None if seconds is None else seconds / _DAY),
        account=asdict(units.account),
        since=look.since(),
        epochs=look.epochs(),
    )


def rewards(plan: Plan, reward: OutcomeSpec, units: Units, at: float) -> list[dict[str, Tally]]:
    """What is known of a bandit's reward at that Unix time, by epoch and arm: of units whose window has passed."""
    look = Look(plan, units, at)
    return look.tallies(look.weighable(reward))
