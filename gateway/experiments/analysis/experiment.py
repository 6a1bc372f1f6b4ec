"""A plan and what was seen → a report, at any look."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np

from gateway.experiments.analysis import means, mixture, proportions, quantiles, sample_ratio, weighted
from gateway.experiments.analysis.mixture import Bools, Floats, Ints
from gateway.experiments.bandit import Tally
from gateway.experiments.plan import Amount, Kind, Missing, OutcomeSpec, PerUnit, Plan
from gateway.experiments.units import Reports, Units, any_hit, per_unit
from gateway.experiments.verdict import (
    NOT_COMPARED,
    Answer,
    Effect,
    GuardrailState,
    Judgement,
    Past,
    Report,
    SampleRatio,
    SharesOfEpoch,
    advised,
    decided,
    guarded,
    judged,
    moment,
)

_DAY = 86_400.0
_WEIGHTED: Final = "inverse propensity, asymptotic"
_BETTING: Final = "betting (exact)"
_RARE: Final = f"; nothing is said until {means.LEAST_VARIED} units have another value than most"
_FEW_DATED: Final = 20  # reports, of which so many more may be dated before their unit than after it
_CEASED: Final = 10.0  # units since the last report that would have one; by chance none has, in e^-10 of looks


def looks(plan: Plan, units: Units, each: int) -> Iterator[Report]:
    """What the report was after so many units each, with what had been reported until then."""
    for count in range(each, units.at.size + 1, each):
        wait = plan.window or 0.0
        yield analysed(plan, units, float(units.at[count - 1]) + wait)


def analysed(plan: Plan, units: Units, at: float | None = None) -> Report:
    """The report at that Unix time; by default at the end of what was seen."""
    look = _Look(plan, units, units.end if at is None else at)
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
        doubts=tuple(look.doubts(primary, ratio, guardrails, secondary)),
        advice=advised(answer, arm, guardrails, plan, None if seconds is None else seconds / _DAY),
        account=asdict(units.account),
        since=look.since(),
        epochs=look.epochs(),
    )


def rewards(plan: Plan, reward: OutcomeSpec, units: Units, at: float) -> list[dict[str, Tally]]:
    """What is known of a bandit's reward at that Unix time, by epoch and arm: of units whose window has passed."""
    look = _Look(plan, units, at)
    return look.tallies(look.weighable(reward))


@dataclass(frozen=True, slots=True)
class _Compared:
    """What each kind of outcome comes to."""

    values: tuple[float, float]  # baseline, treatment
    units: tuple[int, int]
    low: float
    high: float
    relative_low: float
    relative_high: float
    log_e: float
    method: str
    past: Past | None = None


@dataclass(frozen=True, slots=True)
class _Linear:
    """A value per unit of two arms, of which the arms' means are the outcome."""

    value: Floats
    arm: Ints
    past: Past | None  # by which they were adjusted
    varies: bool  # as `means.varies` has it

    def of(self, arm: int) -> means.Arm:
        return means.arm_of_values(self.value[self.arm == arm])


def _nothing(units: tuple[int, int], method: str) -> _Compared:
    return _Compared((math.nan, math.nan), units, -math.inf, math.inf, -math.inf, math.inf, -math.inf, method)


class _Look:
    """All that had been seen at one time."""

    def __init__(self, plan: Plan, units: Units, at: float) -> None:
        self.at = at
        self._plan = plan
        self._units = units
        self.count = units.before(at, plan.window)
        self._arm = units.arm[: self.count]
        self._is_weighted = bool(units.epochs)
        if self._is_weighted:
            self._shares = units.propensities(plan)
            self._epoch = units.epoch[: self.count]

    def _reports(self, name: str) -> Reports:
        known = self._units.reports[name]
        seen = (known.unit < self.count) & (known.at <= self.at)
        return Reports(known.unit[seen], known.value[seen], known.at[seen], known.times[seen])

    def effect(self, spec: OutcomeSpec, arm: str, alpha: float, worth: Amount | None) -> Effect:
        plan = self._plan
        pair = 1.0 if self._is_weighted else plan.share(plan.baseline, arm)
        rho2 = mixture.precision(alpha, plan.units * pair)
        place = plan.order.index(arm)
        compare = {Kind.BINARY: self._proportions, Kind.QUANTILE: self._quantiles}.get(spec.kind, self._means)
        if spec.is_of_compared:
            compare = self._proportions
        if self._is_weighted:
            compare = self._not_compared if spec.kind in (Kind.RATIO, Kind.QUANTILE) else self._weighted
        found = compare(spec, place, alpha, rho2)
        before, after = found.values
        relative = (after - before) / abs(before) if before else math.nan
        return Effect(
            outcome=spec.name,
            kind=spec.kind,
            better=spec.better,
            arm=arm,
            baseline=plan.baseline,
            units=found.units[1],
            baseline_units=found.units[0],
            value=after,
            baseline_value=before,
            difference=after - before,
            low=found.low,
            high=found.high,
            relative=relative,
            relative_low=found.relative_low,
            relative_high=found.relative_high,
            p_value=math.exp(min(0.0, -found.log_e)),
            alpha=alpha,
            method=found.method,
            judgement=judged(found.low, found.high, (found.relative_low, found.relative_high), spec, worth),
            past=found.past,
        )

    def _of_pair(self, place: int) -> Bools:
        return np.asarray((self._arm == 0) | (self._arm == place))

    def _proportions(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        reports = self._reports(spec.name)
        pair = self._of_pair(place)
        plan = self._plan
        share: float | Floats = plan.share(plan.order[place]) / plan.share(plan.baseline, plan.order[place])
        if not reports.unit.size:
            return _nothing((0, 0), _BETTING)  # a unit without a report is 0, unless nobody reports anything
        if spec.is_of_compared:
            # Who was not compared has agreed with nobody: with the reference away all would seem well.
            pair = pair & (np.bincount(reports.unit, minlength=self.count) > 0)
            arms = proportions.in_blocks(self._arm[pair] == place, np.clip(self.values(spec)[pair], 0.0, 1.0))
            share = proportions.expected_shares(arms, float(share))
        else:
            hits = any_hit(reports.unit, reports.value, self.count)
            arms = proportions.in_blocks(self._arm[pair] == place, hits[pair])
        found = proportions.difference(arms, share, alpha, rho2)
        return _Compared(
            (found.baseline, found.treatment),
            (int(arms[0].units.sum()), int(arms[1].units.sum())),
            found.low,
            found.high,
            found.relative_low,
            found.relative_high,
            found.log_e,
            _BETTING,
        )

    def values(self, spec: OutcomeSpec) -> Floats:
        """One value per unit, NaN for those that do not count; of a ratio a numerator only."""
        reports = self._reports(spec.name)
        mean, total, counts = per_unit(reports.unit, reports.value, reports.times, self.count)
        if spec.kind is Kind.BINARY:
            return (total > 0.0).astype(np.float64)
        value = total if spec.per_unit is PerUnit.SUM or spec.kind is Kind.RATIO else mean
        absent = 0.0 if spec.missing is Missing.ZERO or spec.kind is Kind.RATIO else math.nan
        return np.where(counts > 0, value, absent)

    def _below(self, spec: OutcomeSpec) -> Floats:
        reports = self._reports(spec.over or spec.name)
        _, total, counts = per_unit(reports.unit, reports.value, reports.times, self.count)
        return total if spec.over else counts.astype(np.float64)

    def _linear(self, spec: OutcomeSpec, place: int) -> _Linear:
        value = self.values(spec)
        under = self._below(spec) if spec.kind is Kind.RATIO else None
        chosen = self._of_pair(place) & np.isfinite(value) & (True if under is None else under > 0.0)
        arms = self._arm[chosen]
        value = value[chosen]
        varies = means.varies(value)
        if under is not None:
            under = under[chosen]
            for arm in (0, place):
                own = arms == arm
                if own.any():
                    value[own] = means.linearised(value[own], under[own])
        past = self._units.past[spec.name][: self.count][chosen]
        plain, adjusted = _Linear(value, arms, None, varies), means.adjusted(value, past, arms)
        if adjusted is value:
            return plain
        made = _Linear(adjusted, arms, None, varies)
        was, left = (means.variance_of_difference(each.of(0), each.of(place)) for each in (plain, made))
        removed = 1.0 - left / was if was > 0.0 else 0.0
        return replace(made, past=Past(int(np.isfinite(past).sum()), removed))

    def _means(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        linear = self._linear(spec, place)
        before, after = linear.of(0), linear.of(place)
        method = "delta method, asymptotic" if spec.kind is Kind.RATIO else "asymptotic"
        method += ", adjusted by the past (CUPED)" if linear.past is not None else ""
        values, units = (float(before.mean), float(after.mean)), (int(before.units), int(after.units))
        if not linear.varies:
            return replace(_nothing(units, method + _RARE), values=values)
        found = means.difference(before, after, alpha, rho2)
        return _Compared(
            values,
            units,
            float(found.low),
            float(found.high),
            float(found.relative_low),
            float(found.relative_high),
            float(found.log_e),
            method,
            linear.past,
        )

    def _not_compared(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        return _nothing((0, 0), NOT_COMPARED)

    def weighable(self, spec: OutcomeSpec) -> Floats:
        """Values of a mean or a proportion. Who was not compared has agreed with nobody, and is left out."""
        value = self.values(spec)
        if not spec.is_of_compared:
            return value
        compared = np.bincount(self._reports(spec.name).unit, minlength=self.count) > 0
        return np.where(compared, np.clip(value, 0.0, 1.0), np.nan)

    def _weighted(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        """Of a bandit: a mean or a proportion. Without the past, which `weighted` has no place for."""
        value = self.weighable(spec)
        chosen = np.isfinite(value)
        arms = self._arm[chosen]
        counts = int((arms == 0).sum()), int((arms == place).sum())
        if not min(counts):
            return _nothing(counts, _WEIGHTED)
        found = self._difference(value[chosen], chosen, place, alpha, rho2)
        values = float(found.baseline[-1]), float(found.treatment[-1])
        if spec.kind is not Kind.BINARY and not means.varies(value[chosen & self._of_pair(place)]):
            return replace(_nothing(counts, _WEIGHTED + _RARE), values=values)
        return _Compared(
            values,
            counts,
            float(found.low[-1]),
            float(found.high[-1]),
            float(found.relative_low[-1]),
            float(found.relative_high[-1]),
            float(found.log_e[-1]),
            _WEIGHTED,
        )

    def _difference(self, value: Floats, chosen: Bools, place: int, alpha: float, rho2: float) -> weighted.Difference:
        arms = self._arm[chosen]
        role = np.where(arms == 0, weighted.BASELINE, np.where(arms == place, weighted.TREATMENT, -1))
        return weighted.difference(value, role, self._shares[self._epoch[chosen]][:, [0, place]], alpha, rho2)

    def tallies(self, value: Floats) -> list[dict[str, Tally]]:
        """Values of units by epoch and arm."""
        arms = len(self._plan.order)
        cells = self._epoch * arms + self._arm
        has, most = np.isfinite(value), len(self._units.epochs) * arms
        counts = np.bincount(cells[has], minlength=most)
        total = np.bincount(cells[has], weights=value[has], minlength=most)
        squares = np.bincount(cells[has], weights=value[has] ** 2, minlength=most)
        return [
            {
                arm: Tally(int(counts[cell]), float(total[cell]), float(squares[cell]))
                for cell, arm in enumerate(self._plan.order, number * arms)
            }
            for number in range(len(self._units.epochs))
        ]

    def _counts(self) -> Floats:
        """How many units have come by epoch and arm, whether their window has passed or not."""
        came, arms = self._units.before(self.at, None), len(self._plan.order)
        cells = self._units.epoch[:came] * arms + self._units.arm[:came]
        return np.bincount(cells, minlength=len(self._units.epochs) * arms).reshape(-1, arms).astype(np.float64)

    def epochs(self) -> tuple[SharesOfEpoch, ...]:
        if not self._is_weighted:
            return ()
        order = self._plan.order
        return tuple(
            SharesOfEpoch(
                epoch.since,
                {arm: float(epoch.shares[arm]) for arm in order},
                {arm: int(count) for arm, count in zip(order, counts, strict=True)},
            )
            for epoch, counts in zip(self._units.epochs, self._counts(), strict=True)
            if epoch.since <= self.at
        )

    def _quantiles(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        reports = self._reports(spec.name)
        arm = self._arm[reports.unit]
        is_single = np.bincount(reports.unit, minlength=1).max() <= 1
        units, sides = [], []
        plan = self._plan
        for side in (0, place):
            own = arm == side
            units.append(int(np.unique(reports.unit[own]).size))
            # Each arm's own units tell when its interval is narrowest.
            part = rho2 * plan.share(plan.baseline, plan.order[place]) / plan.share(plan.order[side])
            if is_single:
                sides.append(quantiles.of_units(reports.value[own], spec.quantile, part))
            else:
                sides.append(quantiles.of_clusters(reports.unit[own], reports.value[own], spec.quantile, part))
        found = quantiles.difference(sides[0], sides[1], alpha)
        return _Compared(
            (found.baseline, found.treatment),
            (units[0], units[1]),
            found.low,
            found.high,
            found.relative_low,
            found.relative_high,
            found.log_e,
            "beta-binomial (exact)" if is_single else "sums per unit, asymptotic",
        )

    def sample_ratio(self) -> SampleRatio:
        plan = self._plan
        if self._is_weighted:
            return self._ratio_of_epochs()
        # All that came, whether their window has passed or not.
        came = self._units.arm[: self._units.before(self.at, None)]
        counts = np.bincount(came, minlength=len(plan.order)).astype(np.float64)
        shares = np.array([plan.share(arm) for arm in plan.order])
        log_e = float(sample_ratio.log_e_value(counts, shares, plan.units))
        return SampleRatio(
            units={arm: int(count) for arm, count in zip(plan.order, counts, strict=True)},
            expected={arm: float(share * counts.sum()) for arm, share in zip(plan.order, shares, strict=True)},
            p_value=math.exp(min(0.0, -log_e)),
            alpha=plan.sample_ratio_alpha,
        )

    def _ratio_of_epochs(self) -> SampleRatio:
        plan, counts, shares = self._plan, self._counts(), self._shares
        expected = counts.sum(axis=1) @ shares
        return SampleRatio(
            units={arm: int(count) for arm, count in zip(plan.order, counts.sum(axis=0), strict=True)},
            expected={arm: float(each) for arm, each in zip(plan.order, expected, strict=True)},
            p_value=sample_ratio.p_value_of_epochs(counts, shares),
            alpha=plan.sample_ratio_alpha,
        )

    def units_per_second(self) -> float | None:
        """The rate of the last half of the units; None if they came all at once."""
        at = self._units.at[: self.count]
        half = at[at.size // 2 :]
        span = float(half[-1] - half[0]) if half.size > 1 else 0.0
        return (half.size - 1) / span if span > 0.0 else None

    def units_left(self, primary: tuple[Effect, ...]) -> float | None:
        """Units of all arms, until as many as not would have decided the undecided arm that needs most."""
        plan = self._plan
        if self._is_weighted:
            return None  # shares go on moving, and with them how much a unit tells
        left = []
        for effect in primary:
            if effect.judgement is not Judgement.UNDECIDED:
                continue
            worth = plan.smallest_effect
            smallest = worth.size * abs(effect.baseline_value) if worth.is_relative else worth.size
            pair = plan.share(plan.baseline, effect.arm)
            rho2 = mixture.precision(effect.alpha, plan.units * pair)
            seen = effect.units + effect.baseline_units
            width = (effect.high - effect.low) / 2.0
            if not math.isfinite(width) or not seen:
                return None
            error = width / float(mixture.standard_errors(np.asarray(float(seen)), effect.alpha, rho2))
            needed = mixture.units_until(
                error * error * seen, max(abs(effect.difference), smallest), effect.alpha, rho2
            )
            # Some units have no report, and will have none.
            left.append(max(0.0, needed - seen) * self.count / max(1, seen))
        return max(left) if left and math.isfinite(max(left)) else None

    def since(self) -> float | None:
        units = self._units
        first = float(units.at[0]) if units.at.size else None
        return first if units.forgotten_since is None else units.forgotten_since

    def doubts(
        self,
        primary: tuple[Effect, ...],
        ratio: SampleRatio,
        guardrails: tuple[GuardrailState, ...],
        secondary: tuple[Effect, ...],
    ) -> Iterator[str]:
        plan = self._plan
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
            yield from self._novelty(effect)
        others = (*(each.effect for each in guardrails), *secondary)
        for effect in {(each.outcome, each.arm): each for each in (*primary, *others)}.values():
            yield from self._silent(effect)
        for each in guardrails:
            if not each.effect.is_reported:
                yield f"guardrail '{each.effect.outcome}' guards nothing: no reports of it in one of the arms"
        yield from self._ceased()
        yield from self._misdated()
        yield from self._left_out()
        span = float(self._units.at[self.count - 1] - self._units.at[0]) if self.count else 0.0
        if 0.0 < span < 7 * _DAY:
            yield f"less than a week of units ({span / _DAY:.1f} days): other days may have other users"
        if plan.window is None:
            yield from self._late()

    def _left_out(self) -> Iterator[str]:
        """Units and reports that are left out, where those who remain may be others than those who came."""
        account = self._units.account
        few = max(2, account.units // 100)
        if self._units.forgotten_since is not None:
            since = moment(float(self._units.at[0]))
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

    def _silent(self, effect: Effect) -> Iterator[str]:
        """Reports that are missing more in one arm than in the other."""
        plan = self._plan
        spec = next(each for each in plan.outcomes if each.name == effect.outcome)
        if spec.kind is Kind.BINARY or spec.is_of_compared:
            return
        if self._is_weighted:
            yield from self._silent_of_bandit(spec, effect)
            return
        counts = np.array([effect.baseline_units, effect.units], np.float64)
        came = np.bincount(self._arm, minlength=len(plan.order)).astype(np.float64)
        came = came[[0, plan.order.index(effect.arm)]]
        if counts.sum() and came.min() > 0 and counts.sum() < came.sum():
            log_e = float(sample_ratio.log_e_value(counts, came / came.sum(), plan.units))
            if log_e > math.log(1.0 / plan.sample_ratio_alpha):
                yield (
                    f"'{effect.outcome}' is reported for {counts[1] / came[1]:.1%} of '{effect.arm}' and "
                    f"{counts[0] / came[0]:.1%} of '{effect.baseline}': who reports may differ between the arms"
                )

    def _silent_of_bandit(self, spec: OutcomeSpec, effect: Effect) -> Iterator[str]:
        """The same of a bandit, whose arms have their units at other times."""
        plan = self._plan
        place, every = plan.order.index(effect.arm), np.ones(self.count, np.bool_)
        is_told = np.isfinite(self.values(spec)).astype(np.float64)
        if self.count and not is_told.all():
            rho2 = mixture.precision(plan.sample_ratio_alpha, plan.units)
            found = self._difference(is_told, every, place, plan.sample_ratio_alpha, rho2)
            if found.low[-1] > 0.0 or found.high[-1] < 0.0:
                yield (
                    f"'{effect.outcome}' is reported for {found.treatment[-1]:.1%} of '{effect.arm}' and "
                    f"{found.baseline[-1]:.1%} of '{effect.baseline}', weighted: who reports may differ"
                )

    def _ceased(self) -> Iterator[str]:
        """Outcomes of which no report comes any more, and a unit without one counts as 0."""
        came = self._units.at[: self.count]
        for spec in self._plan.outcomes:
            is_zero = spec.kind is Kind.BINARY or spec.missing is Missing.ZERO
            reports = self._reports(spec.name)
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

    def _misdated(self) -> Iterator[str]:
        """Reports that a wrong clock or time zone may have put before their unit came.

        It is a hint, since some things do happen before.
        """
        for name, (before, after) in self._units.dated.items():
            if before > 2 * after + _FEW_DATED:
                yield (
                    f"{before} reports of '{name}' are dated in the day before their unit came, and {after} in the day "
                    "after it: with a wrong clock or time zone, what an arm has done is taken for the past"
                )

    def _novelty(self, effect: Effect) -> Iterator[str]:
        """An effect that is another one in the later half of the units. A hint: it has no error rate of its own."""
        spec = self._plan.primary
        if spec.kind is Kind.QUANTILE or self._is_weighted:
            return
        place = self._plan.order.index(effect.arm)
        if spec.kind is Kind.BINARY:
            pair = self._of_pair(place)
            value, arms = self.values(spec)[pair], self._arm[pair]
        else:
            linear = self._linear(spec, place)
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
        rho2 = mixture.precision(effect.alpha, self._plan.units)
        far = float(mixture.standard_errors(np.asarray(float(value.size)), effect.alpha, rho2))
        if error > 0.0 and abs(parts[1][0] - parts[0][0]) > far * error:
            yield (
                f"the effect of '{effect.arm}' was {parts[0][0]:+.4g} in the first half of the units and "
                f"{parts[1][0]:+.4g} in the second: novelty, or something changed"
            )

    def _late(self) -> Iterator[str]:
        """Units whose outcomes are often still to come: the plan should name a window."""
        reports = self._reports(self._plan.primary.name)
        if reports.at.size and self.count:
            delay = float(np.median(reports.at - self._units.at[reports.unit]))
            waiting = int((self._units.at[: self.count] > self.at - delay).sum())
            if delay > 0.0 and waiting > self.count // 10:
                yield (
                    f"half of the reports come later than {delay:.0f} s after exposure, and {waiting} of "
                    f"{self.count} units are younger: say a `window`, so that each unit counts once it is complete"
                )
