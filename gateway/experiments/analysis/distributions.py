"""How the values of an outcome are spread in each arm, for people to look at: nothing is decided by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gateway.experiments.analysis.mixture import Floats, Ints
from gateway.experiments.plan import Kind, OutcomeSpec, Plan
from gateway.experiments.units import Units, per_unit

_BINS = 25
_TAIL = 0.005  # the share of values at either end that the first and last bin take in as well


@dataclass(frozen=True, slots=True)
class Distribution:
    """The shares of an arm's values by bins that all arms have in common."""

    outcome: str
    what: str  # of what: "units" or "reports"
    edges: Sequence[float]  # one more than there are bins
    shares: Mapping[str, Sequence[float]]  # by arm, of the bins
    medians: Mapping[str, float]


def distributions(plan: Plan, units: Units) -> Iterator[Distribution]:
    """Of each outcome that is a number: of each unit's value, or of a quantile's reports. Of a bandit none: its arms
    have their units at other times."""
    if units.epochs:
        return
    for spec in plan.outcomes:
        if spec.kind is Kind.BINARY:
            continue
        value, arm = _values(spec, units)
        found = _maybe_spread(plan, spec, value, arm)
        if found is not None:
            yield found


def _values(spec: OutcomeSpec, units: Units) -> tuple[Floats, Ints]:
    reports = units.reports[spec.name]
    if spec.kind is Kind.QUANTILE:
        return reports.value, units.arm[reports.unit]
    mean, total, counts = per_unit(reports.unit, reports.value, reports.times, units.arm.size)
    if spec.kind is Kind.RATIO and spec.over:
        below = units.reports[spec.over]
        _, under, _ = per_unit(below.unit, below.value, below.times, units.arm.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(under > 0.0, total / under, np.nan)
    value = np.where(counts > 0, total, np.nan) if spec.per_unit.value == "sum" else mean
    known = np.isfinite(value)
    return value[known], units.arm[known]


def _maybe_spread(plan: Plan, spec: OutcomeSpec, value: Floats, arm: Ints) -> Distribution | None:
    """None if there are too few values, or all are one."""
    if value.size < 2 * _BINS:
        return None
    low, high = (float(each) for each in np.quantile(value, (_TAIL, 1.0 - _TAIL)))
    if not low < high or not math.isfinite(high - low):
        return None
    edges = np.linspace(low, high, _BINS + 1)
    shares, medians = {}, {}
    for place, name in enumerate(plan.order):
        own = value[arm == place]
        if own.size:
            counts, _ = np.histogram(np.clip(own, low, high), edges)
            shares[name] = [float(each) for each in counts / own.size]
            medians[name] = float(np.median(own))
    what = "reports" if spec.kind is Kind.QUANTILE else "units"
    return Distribution(spec.name, what, [float(each) for each in edges], shares, medians)
