"""Quantiles: confidence sequences of the difference and the ratio of one quantile in two arms, with no assumption.

How many of an arm's values lie at or below the true quantile is a count of coin throws with a known coin. So each arm
has a martingale per candidate, and the product of both arms' is one for each pair of candidates: the interval is all
differences of pairs for which it has not reached 1/alpha. That is narrower than the difference of two intervals.

source: Howard and Ramdas, "Sequential estimation of quantiles with applications to A/B testing and best-arm
identification", Bernoulli 28 (2022), section 3: the beta-binomial mixture for a fixed quantile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, xlogy

from gateway.experiments.analysis import mixture
from gateway.experiments.analysis.means import FIRST_LOOK
from gateway.experiments.analysis.mixture import Floats, Ints


def log_wealth(at_most: Floats, units: Floats, level: float, rho2: float) -> Floats:
    """The logarithm of the evidence that a value with so many values at or below it is not the quantile.

    level: 0.99 for the 99th percentile. rho2: as of `mixture.precision`, for this arm's units.

    source: Howard and Ramdas (2022), section 3, and Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform,
    nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021), proposition 7.
    """
    a, b = level / rho2, (1.0 - level) / rho2
    above = units - at_most
    return np.asarray(betaln(a + at_most, b + above) - betaln(a, b) - xlogy(at_most, level) - xlogy(above, 1.0 - level))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """One quantile of baseline and treatment, and what lies between them."""

    baseline: float
    treatment: float
    low: float  # of the difference
    high: float
    relative_low: float  # of the ratio less 1; -1 and inf where values are not all above 0
    relative_high: float
    log_e: float  # of the evidence against "no difference"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Where an arm's quantile may be: cells from one edge to the next, both included, with the evidence against each.

    The evidence falls to one lowest cell and rises from there.
    """

    estimate: float
    edges: Floats  # from -inf to inf, one more than there are cells
    log_e: Floats


def of_units(values: Floats, level: float, rho2: float) -> Candidates:
    """Candidates from one value per unit: exact, whatever the distribution, also with ties."""
    ordered = np.sort(values)
    counts = np.arange(ordered.size + 1.0)  # a count stands for all candidates between that value and the next
    wealth = log_wealth(counts, np.float64(ordered.size), level, rho2)  # type: ignore[arg-type]
    return Candidates(_empirical(ordered, level), np.concatenate(([-np.inf], ordered, [np.inf])), wealth)


def of_clusters(unit: Ints, values: Floats, level: float, rho2: float) -> Candidates:
    """Candidates from several values per unit: asymptotic, by what units vary and not by what their values do.

    For a candidate m the mean over units of #{values ≤ m} - level · #{values} is 0 if it is the quantile of all
    values; the evidence is that of an asymptotic confidence sequence for that mean. Its variance is not believed to be
    less than it would be if the values of a unit were independent, which matters while few lie above m.

    source: Deng, Knoblich and Lu, "Applying the delta method in metric analytics", KDD 2018, section 4, for the sums
    per unit; Waudby-Smith et al. (2024), theorem 2.2, for the boundary.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    places, owner = np.unique(unit[order], return_inverse=True)
    units, rows = places.size, ordered.size
    if units < FIRST_LOOK:
        return Candidates(_empirical(ordered, level), np.array([-np.inf, np.inf]), np.zeros(1))
    counts = np.bincount(owner).astype(np.float64)
    # One value more at or below m raises its unit's score by 1, and so the sum of squares by what follows from that.
    rises = 2.0 * (_earlier_of_owner(owner) - level * counts[owner]) + 1.0
    squares = level * level * float((counts * counts).sum()) + np.concatenate(([0.0], np.cumsum(rises)))
    mean = (np.arange(rows + 1.0) - level * rows) / units
    variance = np.maximum(squares / units - mean * mean, level * (1.0 - level) * rows / units)
    wealth = mixture.log_e_value(mean / np.sqrt(variance / units), np.float64(units), rho2)  # type: ignore[arg-type]
    lowest = int(np.argmin(wealth))
    wealth[: lowest + 1] = np.minimum.accumulate(wealth[: lowest + 1])
    wealth[lowest:] = np.minimum.accumulate(wealth[lowest:][::-1])[::-1]
    return Candidates(_empirical(ordered, level), np.concatenate(([-np.inf], ordered, [np.inf])), wealth)


def _earlier_of_owner(owner: Ints) -> Floats:
    """For each row, how many rows before it have the same owner."""
    order = np.argsort(owner, kind="stable")
    grouped = owner[order]
    starts = np.flatnonzero(np.concatenate(([True], grouped[1:] != grouped[:-1])))
    within = np.arange(owner.size) - np.repeat(starts, np.diff(np.append(starts, owner.size)))
    earlier = np.empty(owner.size)
    earlier[order] = within
    return earlier


def difference(baseline: Candidates, treatment: Candidates, alpha: float) -> Quantiles:
    """The intervals, which hold at all looks at once: each pair of cells whose evidence together is below 1/alpha."""
    first, last, cells = _partners(baseline.log_e, treatment.log_e, np.log(1.0 / alpha))
    low = (treatment.edges[first] - baseline.edges[cells + 1]).min(initial=np.inf)
    high = (treatment.edges[last + 1] - baseline.edges[cells]).max(initial=-np.inf)
    relative_low, relative_high = -1.0, np.inf
    if baseline.edges[1:2].min(initial=np.inf) > 0.0 and treatment.edges[1:2].min(initial=np.inf) > 0.0:
        with np.errstate(divide="ignore", invalid="ignore"):
            lows = np.maximum(treatment.edges[first], 0.0) / baseline.edges[cells + 1]
            highs = treatment.edges[last + 1] / np.maximum(baseline.edges[cells], 0.0)
        relative_low = float(np.nan_to_num(lows, nan=0.0).min(initial=np.inf)) - 1.0
        relative_high = float(np.where(np.isnan(highs), np.inf, highs).max(initial=0.0)) - 1.0
    return Quantiles(
        baseline.estimate,
        treatment.estimate,
        float(low),
        float(high),
        relative_low,
        relative_high,
        _against_equality((baseline, treatment)),
    )


def _empirical(ordered: Floats, level: float) -> float:
    """The smallest value with at least this share of the values at or below it."""
    if not ordered.size:
        return float("nan")
    return float(ordered[min(ordered.size, max(1, int(np.ceil(level * ordered.size)))) - 1])


def _partners(baseline: Floats, treatment: Floats, limit: float) -> tuple[Ints, Ints, Ints]:
    """For each cell of the baseline that some cell of the treatment goes with: the first, the last, and itself."""
    lowest = int(np.argmin(treatment))
    cells = np.flatnonzero(baseline + treatment[lowest] < limit)
    left = limit - baseline[cells]
    first = lowest + 1 - np.searchsorted(treatment[lowest::-1], left, side="left")
    last = lowest - 1 + np.searchsorted(treatment[lowest:], left, side="left")
    return first, last, cells


def _against_equality(arms: tuple[Candidates, Candidates]) -> float:
    """The least evidence that any one number, as the quantile of both arms, has against it.

    A number that is the edge of several cells has that of the least of them, so that ties decide nothing.
    """
    numbers = np.unique(np.concatenate([arm.edges[1:-1] for arm in arms]))
    at, after = np.zeros(numbers.size), np.zeros(numbers.size)
    before = 0.0
    for arm in arms:
        lowest = int(np.argmin(arm.log_e))
        first = np.searchsorted(arm.edges, numbers, side="left") - 1
        last = np.searchsorted(arm.edges, numbers, side="right") - 1
        at += arm.log_e[np.clip(lowest, first, last)]
        after += arm.log_e[last]
        before += float(arm.log_e[0])
    return float(min(before, at.min(initial=np.inf), after.min(initial=np.inf)))
