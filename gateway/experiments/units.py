"""Exposures and outcomes joined: per unit, in the order in which units came, and an account of what was left out.

The unit of analysis is the unit of assignment. Requests of one user are not independent, and to treat them so calls
differences that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from gateway.experiments.analysis.mixture import Bools, Floats, Ints
from gateway.experiments.epochs import Epoch
from gateway.experiments.plan import Kind, Plan
from gateway.experiments.records import Exposure, Outcome

_DAY = 86_400.0
_ROUNDED = 1e-6  # that a propensity may differ by from what its epoch says: files have them rounded


@dataclass(slots=True)
class Account:
    """How many records there were, and why some do not count."""

    exposures: int = 0
    repeated_exposures: int = 0  # of units that are known already
    unknown_arms: int = 0  # exposures to an arm that the plan does not have: their units are left out
    units: int = 0  # that count
    forced_units: int = 0
    drawn_and_forced: int = 0  # of these, such that came to an arm by themselves as well
    units_in_two_arms: int = 0
    without_propensity: int = 0  # exposures of a bandit of which no known epoch says how probable their arm was
    outcomes: int = 0
    repeated_reports: int = 0  # with a report id that was seen before of that outcome
    without_exposure: int = 0
    of_excluded_units: int = 0
    of_other_names: int = 0  # that the plan does not ask for
    before_exposure: int = 0  # a unit's past
    after_window: int = 0
    after_end: int = 0  # reports of what happened once the experiment was stopped, and all had one arm


@dataclass(frozen=True, slots=True)
class Reports:
    """Reports of one outcome, in no order."""

    unit: Ints  # its place among the units
    value: Floats
    at: Floats
    times: Ints  # as how many reports each counts; of quantiles each counts once


@dataclass(frozen=True, slots=True)
class Units:
    """Units that count, in the order of their first exposure."""

    arm: Ints  # its place in the plan's `order`
    at: Floats
    reports: Mapping[str, Reports]  # by outcome
    past: Mapping[str, Floats]  # by outcome, one value per unit: the mean of reports before its exposure, or NaN
    account: Account
    end: float  # the latest time of any record
    epochs: tuple[Epoch, ...] = ()  # of a bandit …
    epoch: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # … and the number of each unit's
    dated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By outcome: reports of the day before their unit came, and of the day after it if that has passed."""
    forgotten_since: float | None = None  # Unix time of the first exposure, if those of then are no longer kept

    def without_past(self) -> Units:
        """The same units without what they did before their exposure, as they may have had their arm by then."""
        return replace(self, past={name: np.full_like(past, np.nan) for name, past in self.past.items()})

    def since_start(self, start: float) -> Units:
        """The same of an experiment that began at `start`, and whose first exposures are no longer kept.

        A unit that comes again is then exposed anew, and what is dated before that may be of its time in an arm.
        """
        return replace(self.without_past(), forgotten_since=start)

    def propensities(self, plan: Plan) -> Floats:
        """Of a bandit: a row for each epoch, and in it the share of each arm in the plan's order."""
        return np.array([[epoch.shares[arm] for arm in plan.order] for epoch in self.epochs], np.float64)

    def before(self, at: float, window: float | None) -> int:
        """How many units had come by then, and had their window, if there is one."""
        return int(np.searchsorted(self.at, at if window is None else at - window, side="right"))


def join(
    plan: Plan,
    exposures: Iterable[Exposure],
    outcomes: Iterable[Outcome],
    epochs: Sequence[Epoch] = (),
    until: float = math.inf,
) -> Units:
    """Join them by unit, or by request id where a report has no unit.

    epochs: of a bandit. Then units count of which it is known with which probability they got their arm.
    until: Unix time of the experiment's end. All have had one arm since then, so what happened later is of no arm.
    """
    account = Account()
    seen = _Exposed(plan, account, epochs)
    for exposure in exposures:
        if exposure.at <= until:
            seen.add(exposure)
    places, arms, ats, of_epoch = seen.in_order()
    singly = {each.name for each in plan.outcomes if each.kind is Kind.QUANTILE}
    names = {each.name for each in plan.outcomes} | {each.over for each in plan.outcomes} - {""}
    reports = _Reported(names, singly, until, account)
    for outcome in outcomes:
        unit = outcome.unit or seen.unit_of_request.get(outcome.request_id, "")
        reports.add(outcome, places.get(unit), unit in seen.excluded)
    end = max(seen.end, reports.end)
    counted, past = reports.split(ats, plan.window)
    return Units(arms, ats, counted, past, account, end, tuple(epochs), of_epoch, dated=reports.dated(ats, end))


class _Exposed:
    """Who came where and when first."""

    def __init__(self, plan: Plan, account: Account, epochs: Sequence[Epoch]) -> None:
        self._arms = {arm: place for place, arm in enumerate(plan.order)}
        self._account = account
        self._epochs = epochs
        self._first: dict[str, tuple[float, int, int]] = {}  # by unit: when, in which arm, in which epoch
        self._forced: set[str] = set()
        self._two: set[str] = set()
        self._elsewhere: set[str] = set()  # had an arm that the plan does not have
        self._unweighted: set[str] = set()
        self.excluded: set[str] = set()
        self.unit_of_request: dict[str, str] = {}
        self.end = -np.inf

    def add(self, exposure: Exposure) -> None:
        self._account.exposures += 1
        arm = self._arms.get(exposure.arm)
        if arm is None:
            self._account.unknown_arms += 1
            self._elsewhere.add(exposure.unit)
            return
        self.end = max(self.end, exposure.at)
        if exposure.request_id:
            self.unit_of_request[exposure.request_id] = exposure.unit
        if exposure.is_forced:
            self._forced.add(exposure.unit)
            return
        if self._epochs and not self._has_propensity(exposure):
            self._account.without_propensity += 1
            self._unweighted.add(exposure.unit)
            return
        known = self._first.get(exposure.unit)
        if known is None:
            self._first[exposure.unit] = (exposure.at, arm, exposure.epoch or 0)
            return
        self._account.repeated_exposures += 1
        if known[1] != arm:
            self._two.add(exposure.unit)
        elif exposure.at < known[0]:
            self._first[exposure.unit] = (exposure.at, arm, exposure.epoch or 0)

    def _has_propensity(self, exposure: Exposure) -> bool:
        """Does what was recorded agree with the epoch that it names?"""
        epoch, recorded = exposure.epoch, exposure.propensity
        if epoch is None or recorded is None or not 0 <= epoch < len(self._epochs):
            return False
        return abs(self._epochs[epoch].shares.get(exposure.arm, 0.0) - recorded) <= _ROUNDED

    def in_order(self) -> tuple[dict[str, int], Ints, Floats, Ints]:
        """Each unit's place; their arms; their times; their epochs."""
        self._two |= self._elsewhere & self._first.keys()
        self.excluded = self._forced | self._two | self._elsewhere | self._unweighted
        kept = sorted(
            ((at, arm, unit, epoch) for unit, (at, arm, epoch) in self._first.items() if unit not in self.excluded),
            key=_when,
        )
        account = self._account
        account.units, account.forced_units = len(kept), len(self._forced)
        account.drawn_and_forced = len(self._forced & self._first.keys())
        account.units_in_two_arms = len(self._two - self._forced)
        places = {unit: place for place, (_, _, unit, _) in enumerate(kept)}
        ats, arms, _, epochs = zip(*kept, strict=True) if kept else ((), (), (), ())
        return places, np.array(arms, np.int64), np.array(ats, np.float64), np.array(epochs, np.int64)


def _when(unit: tuple[float, int, str, int]) -> tuple[float, int]:
    """The place of a unit in the order of their coming.

    Among units of one moment, as where a file has days, a hash decides. A file's own order may be that of the arms, and
    the bets on proportions need arms that come as if drawn.
    """
    at, _, name, _ = unit
    return at, crc32(name.encode("utf-8", "surrogatepass"))


@dataclass(slots=True)
class _Reported:
    names: set[str]
    singly: set[str]  # of them, those of which each report is asked for, and not what they come to
    until: float
    account: Account
    ids: set[tuple[str, str]] = field(default_factory=set)
    rows: dict[str, list[tuple[int, float, float, int]]] = field(default_factory=dict)
    end: float = -np.inf

    def add(self, outcome: Outcome, place: int | None, is_excluded: bool) -> None:
        account, times = self.account, outcome.times
        account.outcomes += times
        if outcome.report_id:
            known = outcome.name, outcome.report_id
            if known in self.ids:
                account.repeated_reports += times
                return
            self.ids.add(known)
        if outcome.name not in self.names:
            account.of_other_names += times
        elif outcome.at > self.until:
            account.after_end += times
        elif place is not None:
            self.end = max(self.end, outcome.at)
            self.rows.setdefault(outcome.name, []).append((place, outcome.value, outcome.at, times))
        elif is_excluded:
            account.of_excluded_units += times
        else:
            account.without_exposure += times

    def split(self, exposed: Floats, window: float | None) -> tuple[dict[str, Reports], dict[str, Floats]]:
        """Reports that count, and the past, by outcome."""
        reports, past = {}, {}
        for name in self.names:
            table = np.array(self.rows.get(name, []), np.float64).reshape(-1, 4)
            if name in self.singly:
                table = np.repeat(table, table[:, 3].astype(np.int64), axis=0)
                table[:, 3] = 1.0
            unit, value, at, times = (
                table[:, 0].astype(np.int64),
                table[:, 1],
                table[:, 2],
                table[:, 3].astype(np.int64),
            )
            is_past = at < exposed[unit]
            in_time = ~is_past if window is None else ~is_past & (at <= exposed[unit] + window)
            self.account.before_exposure += int(times[is_past].sum())
            self.account.after_window += int(times[~is_past & ~in_time].sum())
            reports[name] = Reports(unit[in_time], value[in_time], at[in_time], times[in_time])
            past[name] = per_unit(unit[is_past], value[is_past], times[is_past], exposed.size)[0]
        return reports, past

    def dated(self, exposed: Floats, end: float) -> dict[str, tuple[int, int]]:
        """As `Units.dated`."""
        found = {}
        for name, rows in self.rows.items():
            table = np.array(rows, np.float64)
            came = exposed[table[:, 0].astype(np.int64)]
            apart, times = table[:, 2] - came, np.where(came <= end - _DAY, table[:, 3], 0.0)
            before, after = (apart > -_DAY) & (apart < 0.0), (apart >= 0.0) & (apart < _DAY)
            found[name] = int(times[before].sum()), int(times[after].sum())
        return found


def per_unit(unit: Ints, value: Floats, times: Ints, units: int) -> tuple[Floats, Floats, Ints]:
    """The mean (NaN without a report), the sum, and the number of the values of each unit.

    times: as how many each counts. They are not written out: a day of calls would not fit into memory.
    """
    counts = np.bincount(unit, weights=times, minlength=units)
    sums: Floats = np.bincount(unit, weights=value * times, minlength=units).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Floats = np.where(counts > 0, sums / counts, np.nan)
    return mean, sums, counts.astype(np.int64)


def any_hit(unit: Ints, value: Floats, units: int) -> Bools:
    """Whether a unit has a value above 0."""
    return np.asarray(np.bincount(unit[value > 0.0], minlength=units) > 0)
