"""Joining exposures and outcomes: what counts, and that what does not is accounted for."""

from __future__ import annotations

import numpy as np

from gateway.experiments.plan import Amount, Better, Kind, OutcomeSpec, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.units import join, per_unit

BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)


def plan(window: float | None = None) -> Plan:
    return Plan("spring", {"a": 1.0, "b": 1.0}, "a", BOUGHT, Amount(0.02, is_relative=True), window=window)


def bought(unit: str, at: float, report: str = "", value: float = 1.0) -> Outcome:
    return Outcome("bought", value, at, unit=unit, report_id=report)


def test_units_come_in_the_order_of_their_first_exposure_whatever_the_order_of_records() -> None:
    units = join(plan(), [Exposure("b", "y", 5.0), Exposure("a", "x", 9.0), Exposure("a", "x", 3.0)], [])
    assert units.arm.tolist() == [0, 1]
    assert units.at.tolist() == [3.0, 5.0]
    assert (units.account.units, units.account.repeated_exposures) == (2, 1)


def test_a_unit_that_a_tester_forced_is_left_out_whole() -> None:
    exposures = [Exposure("a", "x", 1.0), Exposure("b", "x", 2.0, is_forced=True), Exposure("a", "y", 3.0)]
    units = join(plan(), exposures, [bought("x", 4.0), bought("y", 4.0)])
    assert units.at.tolist() == [3.0]
    assert (units.account.forced_units, units.account.of_excluded_units, units.account.without_exposure) == (1, 1, 0)


def test_a_unit_in_two_arms_is_left_out_and_counted() -> None:
    units = join(plan(), [Exposure("a", "x", 1.0), Exposure("b", "x", 2.0), Exposure("b", "y", 2.0)], [])
    assert units.arm.tolist() == [1]
    assert units.account.units_in_two_arms == 1


def test_a_report_counts_once_however_often_it_comes() -> None:
    outcomes = [
        bought("x", 2.0, "r1"),
        bought("x", 2.0, "r1"),
        bought("x", 3.0, "r2"),
        bought("x", 4.0),
        bought("x", 4.0),
    ]
    units = join(plan(), [Exposure("a", "x", 1.0)], outcomes)
    assert units.reports["bought"].at.tolist() == [2.0, 3.0, 4.0, 4.0]  # those without an id are not the same
    assert units.account.repeated_reports == 1


def test_a_report_of_a_request_is_of_its_unit() -> None:
    exposures = [Exposure("a", "x", 1.0, request_id="q7"), Exposure("b", "y", 1.5, request_id="q8")]
    units = join(
        plan(), exposures, [Outcome("bought", 1.0, 2.0, request_id="q8"), Outcome("bought", 1.0, 2.0, request_id="q9")]
    )
    assert units.reports["bought"].unit.tolist() == [1]
    assert units.account.without_exposure == 1


def test_what_many_calls_came_to_counts_as_they_would_singly_and_is_never_written_out() -> None:
    exposures = [Exposure("a", "x", 10.0), Exposure("b", "y", 11.0)]
    outcomes = [Outcome("bought", value, 12.0, "x", times=times) for value, times in ((1.0, 3), (0.25, 10**12))]
    units = join(plan(), exposures, [*outcomes, Outcome("bought", 0.5, 1.0, "y", times=7)])
    reports = units.reports["bought"]
    mean, total, counts = per_unit(reports.unit, reports.value, reports.times, 2)
    assert counts.tolist() == [10**12 + 3, 0]
    np.testing.assert_allclose([mean[0], total[0]], [0.25, 3.0 + 0.25 * 10**12])
    assert (reports.at.size, units.account.outcomes, units.account.before_exposure) == (2, 10**12 + 10, 7)


def test_of_a_quantile_each_call_counts() -> None:
    slow = OutcomeSpec("slow", Kind.QUANTILE, Better.LOWER, quantile=0.9)
    asked = Plan("spring", {"a": 1.0, "b": 1.0}, "a", slow, Amount(0.02, is_relative=True))
    units = join(asked, [Exposure("a", "x", 1.0)], [Outcome("slow", 0.5, 2.0, "x", times=3)])
    assert (units.reports["slow"].value.tolist(), units.reports["slow"].times.tolist()) == ([0.5] * 3, [1] * 3)


def test_what_was_reported_before_the_exposure_is_the_past() -> None:
    units = join(
        plan(), [Exposure("a", "x", 10.0), Exposure("a", "y", 11.0)], [bought("x", 4.0), bought("x", 6.0, value=0.0)]
    )
    assert units.reports["bought"].unit.size == 0
    np.testing.assert_array_equal(units.past["bought"], [0.5, np.nan])
    assert units.account.before_exposure == 2


def test_with_a_window_late_reports_do_not_count_and_units_count_once_it_has_passed() -> None:
    exposures = [Exposure("a", "x", 10.0), Exposure("a", "y", 12.0)]
    units = join(plan(window=5.0), exposures, [bought("x", 15.0), bought("x", 15.1)])
    assert units.reports["bought"].at.tolist() == [15.0]
    assert units.account.after_window == 1
    assert [units.before(at, 5.0) for at in (14.9, 15.0, 17.0)] == [0, 1, 2]


def test_a_unit_that_had_an_arm_which_the_plan_no_longer_has_is_left_out() -> None:
    """As after an arm was renamed: it has met another variant before, and that would be its past."""
    exposures = [Exposure("c", "x", 1.0), Exposure("b", "x", 9.0), Exposure("a", "y", 2.0), Exposure("c", "z", 3.0)]
    units = join(plan(), exposures, [bought(unit, 4.0) for unit in "xyz"])
    assert units.at.tolist() == [2.0]
    account = units.account
    assert (account.unknown_arms, account.units_in_two_arms) == (2, 1)
    assert (account.of_excluded_units, account.without_exposure) == (2, 0)


def test_what_happened_after_the_end_is_of_no_arm() -> None:
    exposures = [Exposure("a", "x", 1.0), Exposure("b", "y", 2.0), Exposure("b", "z", 9.0)]
    units = join(plan(), exposures, [bought("x", 3.0), bought("y", 8.0)], until=5.0)
    assert units.at.tolist() == [1.0, 2.0]
    assert units.reports["bought"].unit.tolist() == [0]
    assert (units.account.after_end, units.end) == (1, 3.0)


def test_an_id_is_of_one_report_of_one_outcome() -> None:
    """As an order's that is bought, and later given back."""
    back = OutcomeSpec("back", Kind.BINARY, Better.LOWER)
    asked = Plan("spring", {"a": 1.0, "b": 1.0}, "a", BOUGHT, Amount(0.02, is_relative=True), secondary=(back,))
    reports = [Outcome(name, 1.0, 2.0, "x", report_id="order-1") for name in ("bought", "back", "back")]
    units = join(asked, [Exposure("a", "x", 1.0)], reports)
    assert [units.reports[name].unit.size for name in ("bought", "back")] == [1, 1]
    assert units.account.repeated_reports == 1


def test_units_of_one_moment_are_in_no_order_of_their_arms() -> None:
    """As in a file that has days, and is sorted by arm."""
    exposures = [Exposure("a" if number < 500 else "b", f"user {number}", 0.0) for number in range(1000)]
    units = join(plan(), exposures, [])
    assert 200 < units.arm[:500].sum() < 300
    assert join(plan(), exposures[::-1], []).arm.tolist() == units.arm.tolist()


def test_a_unit_that_had_an_arm_before_a_rule_sent_it_there_is_told_from_a_tester() -> None:
    forced = [Exposure("b", unit, 3.0, is_forced=True) for unit in "xy"]
    account = join(plan(), [Exposure("a", "x", 1.0), *forced], []).account
    assert (account.forced_units, account.drawn_and_forced) == (2, 1)


def test_other_names_and_other_arms_are_counted_and_left_out() -> None:
    units = join(plan(), [Exposure("a", "x", 1.0), Exposure("c", "y", 1.0)], [Outcome("clicked", 1.0, 2.0, unit="x")])
    assert units.account.of_other_names == 1
    assert units.account.unknown_arms == 1
    assert units.account.units == 1
