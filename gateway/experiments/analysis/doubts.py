"""What may be wrong with a report and is in none of its intervals: who reports, when, and who was left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from gateway.experiments.analysis import means, mixture, sample_ratio
from gateway.experiments.analysis.look import Look
from gateway.experiments.plan import Kind, Missing, OutcomeSpec
from gateway.experiments.units import Units
from gateway.experiments.verdict import Effect, GuardrailState, Judgement, SampleRatio, moment

_DAY: Final = 86_400.0
_FEW_DATED: Final = 20  # reports, of which so many more may be dated before their unit than after it
_CEASED: Final = 10.0  # units since the last report that would have one; by chance none has, in e^-10 of looks


def doubts(
    look: Look,
    primary: tuple[Effect, ...],
    ratio: SampleRatio,
    guardrails: tuple[GuardrailState, ...],
    secondary: tuple[Effect, ...],
) -> Iterator[str]:
    """A sentence for each thing that may be wrong."""
    plan = look.plan
    if ratio.is_mismatched:
        yield "units do not come to arms as planned, so the arms may differ in who is in them"
    winners = [effect.arm for effect in primary if effect.judgement is Judgement.BETTER]
    if len(winners) > 1:
        yield f"{', '.join(map(repr, winners))} are better than the baseline; which of them is best is not tested"
    for effect in primary:
        fewest = min(effect.units, effect.baseline_units)
        if fewest < means.FIRST_LOOK:
            until = "intervals are wide" if effect.kind is Kind.BINARY else "nothing is said"
            yield (
                f"too few units: {fewest} with '{effect.outcome}' in '{effect.baseline}' or '{effect.arm}'; "
                f"{until} below {means.FIRST_LOOK}"
            )
        yield from _novelty(look, effect)
    others = (*(each.effect for each in guardrails), *secondary)
    for effect in {(each.outcome, each.arm): each for each in (*primary, *others)}.values():
        yield from _silent(look, effect)
    for each in guardrails:
        if not each.effect.is_reported:
            yield f"guardrail '{each.effect.outcome}' guards nothing: no reports of it in one of the arms"
    yield from _ceased(look)
    yield from _misdated(look.units)
    yield from _left_out(look.units)
    span = float(look.units.at[look.count - 1] - look.units.at[0]) if look.count else 0.0
    if 0.0 < span < 7 * _DAY:
        yield f"less than a week of units ({span / _DAY:.1f} days): other days may have other users"
    if plan.window is None:
        yield from _late(look)


def _left_out(units: Units) -> Iterator[str]:
    """Units and reports that are left out, where those who remain may be others than those who came."""
    account = units.account
    few = max(2, account.units // 100)
    if units.forgotten_since is not None:
        since = moment(float(units.at[0]))
        yield (
            f"units of before {since} are forgotten (`store.retention`): the past, which may be of their time in "
            "an arm, is not used, and error rates hold for that long and no longer"
        )
    if account.unknown_arms:
        yield (
            f"{account.unknown_arms} exposures are of arms that the plan does not have, and their units are left "
            "out: the plan was changed while it ran, so that its arms have their units at other times"
        )
    elif account.units_in_two_arms > few:
        yield f"{account.units_in_two_arms} units were seen in two arms, and are left out: assignment is not sticky"
    if account.drawn_and_forced > few:
        yield (
            f"{account.drawn_and_forced} units had an arm, and a rule has sent them to one as well, so they are "
            "left out: if that follows from what an arm does to them, those who remain are no longer alike"
        )
    if account.without_exposure > max(2, account.outcomes // 100):
        yield (
            f"{account.without_exposure} of {account.outcomes} reports are of units without an exposure: exposures "
            "may be lost"
        )
    if account.without_propensity:
        yield (
            f"{account.without_propensity} exposures name no known epoch, so nobody knows their propensity: their "
            "units are left out"
        )


def _silent(look: Look, effect: Effect) -> Iterator[str]:
    """Reports that are missing more in one arm than in the other."""
    plan = look.plan
    spec = next(each for each in plan.outcomes if each.name == effect.outcome)
    if spec.kind is Kind.BINARY or spec.is_of_compared:
        return
    if look.is_weighted:
        yield from _silent_of_bandit(look, spec, effect)
        return
    counts = np.array([effect.baseline_units, effect.units], np.float64)
    came = np.bincount(look.arm, minlength=len(plan.order)).astype(np.float64)
    came = came[[0, plan.order.index(effect.arm)]]
    if counts.sum() and came.min() > 0 and counts.sum() < came.sum():
        log_e = float(sample_ratio.log_e_value(counts, came / came.sum(), plan.units))
        if log_e > math.log(1.0 / plan.sample_ratio_alpha):
            yield (
                f"'{effect.outcome}' is reported for {counts[1] / came[1]:.1%} of '{effect.arm}' and "
                f"{counts[0] / came[0]:.1%} of '{effect.baseline}': who reports may differ between the arms"
            )


def _silent_of_bandit(look: Look, spec: OutcomeSpec, effect: Effect) -> Iterator[str]:
    """The same of a bandit, whose arms have their units at other times."""
    plan = look.plan
    place, every = plan.order.index(effect.arm), np.ones(look.count, np.bool_)
    is_told = np.isfinite(look.values(spec)).astype(np.float64)
    if look.count and not is_told.all():
        rho2 = mixture.precision(plan.sample_ratio_alpha, plan.units)
        found = look.weighted_difference(is_told, every, place, plan.sample_ratio_alpha, rho2)
        if found.low[-1] > 0.0 or found.high[-1] < 0.0:
            yield (
                f"'{effect.outcome}' is reported for {found.treatment[-1]:.1%} of '{effect.arm}' and "
                f"{found.baseline[-1]:.1%} of '{effect.baseline}', weighted: who reports may differ"
            )


def _ceased(look: Look) -> Iterator[str]:
    """Outcomes of which no report comes any more, and a unit without one counts as 0."""
    came = look.units.at[: look.count]
    for spec in look.plan.outcomes:
        is_zero = spec.kind is Kind.BINARY or spec.missing is Missing.ZERO
        reports = look.reports(spec.name)
        if spec.measure or not is_zero or not reports.at.size:
            continue
        last = float(reports.at.max())
        before = int(np.searchsorted(came, last, side="right"))
        since = came.size - before
        if since * np.unique(reports.unit).size > _CEASED * before:
            yield (
                f"no report of '{spec.name}' is of after {moment(last)}, and {since} units have come since, which "
                "count as 0: whatever reports it may have stopped"
            )


def _misdated(units: Units) -> Iterator[str]:
    """Reports that a wrong clock or time zone may have put before their unit came.

    It is a hint, since some things do happen before.
    """
    for name, (before, after) in units.dated.items():
        if before > 2 * after + _FEW_DATED:
            yield (
                f"{before} reports of '{name}' are dated in the day before their unit came, and {after} in the day "
                "after it: with a wrong clock or time zone, what an arm has done is taken for the past"
            )


def _novelty(look: Look, effect: Effect) -> Iterator[str]:
    """An effect that is another one in the later half of the units. A hint: it has no error rate of its own."""
    spec = look.plan.primary
    if spec.kind is Kind.QUANTILE or look.is_weighted:
        return
    place = look.plan.order.index(effect.arm)
    if spec.kind is Kind.BINARY:
        pair = look.of_pair(place)
        value, arms = look.values(spec)[pair], look.arm[pair]
    else:
        linear = look.linear(spec, place)
        value, arms = linear.value, linear.arm
    half = value.size // 2
    parts = []
    for part in (slice(0, half), slice(half, None)):
        sides = [means.arm_of_values(value[part][arms[part] == arm]) for arm in (0, place)]
        if min(float(side.units) for side in sides) < means.FIRST_LOOK:
            return
        variance = sum((float(side.variance / side.units) for side in sides), 0.0)
        parts.append((float(sides[1].mean - sides[0].mean), variance))
    error = math.sqrt(parts[0][1] + parts[1][1])
    rho2 = mixture.precision(effect.alpha, look.plan.units)
    far = float(mixture.standard_errors(np.asarray(float(value.size)), effect.alpha, rho2))
    if error > 0.0 and abs(parts[1][0] - parts[0][0]) > far * error:
        yield (
            f"the effect of '{effect.arm}' was {parts[0][0]:+.4g} in the first half of the units and "
            f"{parts[1][0]:+.4g} in the second: novelty, or something changed"
        )


def _late(look: Look) -> Iterator[str]:
    """Units whose outcomes are often still to come: the plan should name a window."""
    reports = look.reports(look.plan.primary.name)
    if reports.at.size and look.count:
        delay = float(np.median(reports.at - look.units.at[reports.unit]))
        waiting = int((look.units.at[: look.count] > look.at - delay).sum())
        if delay > 0.0 and waiting > look.count // 10:
            yield (
                f"half of the reports come later than {delay:.0f} s after exposure, and {waiting} of "
                f"{look.count} units are younger: say a `window`, so that each unit counts once it is complete"
            )
