"""All that had been seen of an experiment at one time: how arms compare, how units came, and how many are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gateway.experiments.analysis import means, mixture, proportions, quantiles, sample_ratio, weighted
from gateway.experiments.analysis.mixture import Bools, Floats, Ints
from gateway.experiments.bandit import Tally
from gateway.experiments.plan import Amount, Kind, Missing, OutcomeSpec, PerUnit, Plan
from gateway.experiments.units import Reports, Units, any_hit, per_unit
from gateway.experiments.verdict import NOT_COMPARED, Effect, Judgement, Past, SampleRatio, SharesOfEpoch, judged

_WEIGHTED: Final = "inverse propensity, asymptotic"
_BETTING: Final = "betting (exact)"
_RARE: Final = f"; nothing is said until {means.LEAST_VARIED} units have another value than most"


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
class Linear:
    """A value per unit of two arms, of which the arms' means are the outcome."""

    value: Floats
    arm: Ints
    past: Past | None  # by which they were adjusted
    varies: bool  # as `means.varies` has it

    def of(self, arm: int) -> means.Arm:
        return means.arm_of_values(self.value[self.arm == arm])


def _nothing(units: tuple[int, int], method: str) -> _Compared:
    return _Compared((math.nan, math.nan), units, -math.inf, math.inf, -math.inf, math.inf, -math.inf, method)


class Look:
    """All that had been seen at one time."""

    def __init__(self, plan: Plan, units: Units, at: float) -> None:
        self.at = at
        self.plan = plan
        self.units = units
        self.count = units.before(at, plan.window)
        self.arm = units.arm[: self.count]
        self.is_weighted = bool(units.epochs)
        if self.is_weighted:
            self._shares = units.propensities(plan)
            self._epoch = units.epoch[: self.count]

    def reports(self, name: str) -> Reports:
        """Those that had come by then, of units that count."""
        known = self.units.reports[name]
        seen = (known.unit < self.count) & (known.at <= self.at)
        return Reports(known.unit[seen], known.value[seen], known.at[seen], known.times[seen])

    def effect(self, spec: OutcomeSpec, arm: str, alpha: float, worth: Amount | None) -> Effect:
        plan = self.plan
        pair = 1.0 if self.is_weighted else plan.share(plan.baseline, arm)
        rho2 = mixture.precision(alpha, plan.units * pair)
        place = plan.order.index(arm)
        compare = {Kind.BINARY: self._proportions, Kind.QUANTILE: self._quantiles}.get(spec.kind, self._means)
        if spec.is_of_compared:
            compare = self._proportions
        if self.is_weighted:
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

    def of_pair(self, place: int) -> Bools:
        """Which units are in the baseline, or in the arm that has this place in the plan's order."""
        return np.asarray((self.arm == 0) | (self.arm == place))

    def _proportions(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        reports = self.reports(spec.name)
        pair = self.of_pair(place)
        plan = self.plan
        share: float | Floats = plan.share(plan.order[place]) / plan.share(plan.baseline, plan.order[place])
        if not reports.unit.size:
            return _nothing((0, 0), _BETTING)  # a unit without a report is 0, unless nobody reports anything
        if spec.is_of_compared:
            # Who was not compared has agreed with nobody: with the reference away all would seem well.
            pair = pair & (np.bincount(reports.unit, minlength=self.count) > 0)
            arms = proportions.in_blocks(self.arm[pair] == place, np.clip(self.values(spec)[pair], 0.0, 1.0))
            share = proportions.expected_shares(arms, float(share))
        else:
            hits = any_hit(reports.unit, reports.value, self.count)
            arms = proportions.in_blocks(self.arm[pair] == place, hits[pair])
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
        reports = self.reports(spec.name)
        mean, total, counts = per_unit(reports.unit, reports.value, reports.times, self.count)
        if spec.kind is Kind.BINARY:
            return (total > 0.0).astype(np.float64)
        value = total if spec.per_unit is PerUnit.SUM or spec.kind is Kind.RATIO else mean
        absent = 0.0 if spec.missing is Missing.ZERO or spec.kind is Kind.RATIO else math.nan
        return np.where(counts > 0, value, absent)

    def _below(self, spec: OutcomeSpec) -> Floats:
        reports = self.reports(spec.over or spec.name)
        _, total, counts = per_unit(reports.unit, reports.value, reports.times, self.count)
        return total if spec.over else counts.astype(np.float64)

    def linear(self, spec: OutcomeSpec, place: int) -> Linear:
        """Of a mean or a ratio, for the baseline and one arm; adjusted by the past where that helps."""
        value = self.values(spec)
        under = self._below(spec) if spec.kind is Kind.RATIO else None
        chosen = self.of_pair(place) & np.isfinite(value) & (True if under is None else under > 0.0)
        arms = self.arm[chosen]
        value = value[chosen]
        varies = means.varies(value)
        if under is not None:
            under = under[chosen]
            for arm in (0, place):
                own = arms == arm
                if own.any():
                    value[own] = means.linearised(value[own], under[own])
        past = self.units.past[spec.name][: self.count][chosen]
        plain, adjusted = Linear(value, arms, None, varies), means.adjusted(value, past, arms)
        if adjusted is value:
            return plain
        made = Linear(adjusted, arms, None, varies)
        was, left = (means.variance_of_difference(each.of(0), each.of(place)) for each in (plain, made))
        removed = 1.0 - left / was if was > 0.0 else 0.0
        return replace(made, past=Past(int(np.isfinite(past).sum()), removed))

    def _means(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        linear = self.linear(spec, place)
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
        compared = np.bincount(self.reports(spec.name).unit, minlength=self.count) > 0
        return np.where(compared, np.clip(value, 0.0, 1.0), np.nan)

    def _weighted(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        """Of a bandit: a mean or a proportion. Without the past, which `weighted` has no place for."""
        value = self.weighable(spec)
        chosen = np.isfinite(value)
        arms = self.arm[chosen]
        counts = int((arms == 0).sum()), int((arms == place).sum())
        if not min(counts):
            return _nothing(counts, _WEIGHTED)
        found = self.weighted_difference(value[chosen], chosen, place, alpha, rho2)
        values = float(found.baseline[-1]), float(found.treatment[-1])
        if spec.kind is not Kind.BINARY and not means.varies(value[chosen & self.of_pair(place)]):
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

    def weighted_difference(
        self, value: Floats, chosen: Bools, place: int, alpha: float, rho2: float
    ) -> weighted.Difference:
        arms = self.arm[chosen]
        role = np.where(arms == 0, weighted.BASELINE, np.where(arms == place, weighted.TREATMENT, -1))
        return weighted.difference(value, role, self._shares[self._epoch[chosen]][:, [0, place]], alpha, rho2)

    def tallies(self, value: Floats) -> list[dict[str, Tally]]:
        """Values of units by epoch and arm."""
        arms = len(self.plan.order)
        cells = self._epoch * arms + self.arm
        has, most = np.isfinite(value), len(self.units.epochs) * arms
        counts = np.bincount(cells[has], minlength=most)
        total = np.bincount(cells[has], weights=value[has], minlength=most)
        squares = np.bincount(cells[has], weights=value[has] ** 2, minlength=most)
        return [
            {
                arm: Tally(int(counts[cell]), float(total[cell]), float(squares[cell]))
                for cell, arm in enumerate(self.plan.order, number * arms)
            }
            for number in range(len(self.units.epochs))
        ]

    def _counts(self) -> Floats:
        """How many units have come by epoch and arm, whether their window has passed or not."""
        came, arms = self.units.before(self.at, None), len(self.plan.order)
        cells = self.units.epoch[:came] * arms + self.units.arm[:came]
        return np.bincount(cells, minlength=len(self.units.epochs) * arms).reshape(-1, arms).astype(np.float64)

    def epochs(self) -> tuple[SharesOfEpoch, ...]:
        if not self.is_weighted:
            return ()
        order = self.plan.order
        return tuple(
            SharesOfEpoch(
                epoch.since,
                {arm: float(epoch.shares[arm]) for arm in order},
                {arm: int(count) for arm, count in zip(order, counts, strict=True)},
            )
            for epoch, counts in zip(self.units.epochs, self._counts(), strict=True)
            if epoch.since <= self.at
        )

    def _quantiles(self, spec: OutcomeSpec, place: int, alpha: float, rho2: float) -> _Compared:
        reports = self.reports(spec.name)
        arm = self.arm[reports.unit]
        is_single = np.bincount(reports.unit, minlength=1).max() <= 1
        units, sides = [], []
        plan = self.plan
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
        plan = self.plan
        if self.is_weighted:
            return self._ratio_of_epochs()
        # All that came, whether their window has passed or not.
        came = self.units.arm[: self.units.before(self.at, None)]
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
        plan, counts, shares = self.plan, self._counts(), self._shares
        expected = counts.sum(axis=1) @ shares
        return SampleRatio(
            units={arm: int(count) for arm, count in zip(plan.order, counts.sum(axis=0), strict=True)},
            expected={arm: float(each) for arm, each in zip(plan.order, expected, strict=True)},
            p_value=sample_ratio.p_value_of_epochs(counts, shares),
            alpha=plan.sample_ratio_alpha,
        )

    def units_per_second(self) -> float | None:
        """The rate of the last half of the units; None if they came all at once."""
        at = self.units.at[: self.count]
        half = at[at.size // 2 :]
        span = float(half[-1] - half[0]) if half.size > 1 else 0.0
        return (half.size - 1) / span if span > 0.0 else None

    def units_left(self, primary: tuple[Effect, ...]) -> float | None:
        """Units of all arms, until as many as not would have decided the undecided arm that needs most."""
        plan = self.plan
        if self.is_weighted:
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
        units = self.units
        first = float(units.at[0]) if units.at.size else None
        return first if units.forgotten_since is None else units.forgotten_since
