"""The formulas beside other ways to get the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simulated
from scipy import stats

from gateway.experiments.analysis import means, mixture, proportions, quantiles, sample_ratio
from gateway.experiments.analysis.experiment import analysed, looks
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, Missing, OutcomeSpec, PerUnit, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.units import Units, join
from gateway.experiments.verdict import Answer, Effect, Guard, Judgement, guarded

BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
SCORE = OutcomeSpec("score", Kind.NUMERIC, Better.HIGHER)
LATENCY = OutcomeSpec("latency", Kind.DURATION, Better.LOWER)
SMALL = Amount(0.02, is_relative=True)


def test_the_evidence_reaches_one_over_alpha_where_the_interval_ends() -> None:
    units, rho2 = np.array([10.0, 500.0, 1e6]), mixture.precision(0.05, 1_000)
    ends = mixture.standard_errors(units, 0.05, rho2)
    np.testing.assert_allclose(mixture.log_e_value(ends, units, rho2), math.log(20))


def test_the_boundary_is_narrowest_about_where_it_was_tuned() -> None:
    at = {
        units: float(mixture.standard_errors(np.float64(1e4), 0.05, mixture.precision(0.05, units)))
        for units in (1e3, 1e4, 1e5)
    }  # type: ignore[arg-type]
    assert min(at, key=lambda units: at[units]) == 1e4
    assert 3.0 < at[1e4] < 3.1


def test_the_ratio_of_sums_has_the_variance_of_the_delta_method() -> None:
    """Beside the spread of the ratio in a thousand samples."""
    rng = np.random.default_rng(1)
    under = rng.geometric(0.2, (1_000, 400)).astype(float)
    over = rng.binomial(under.astype(int), rng.beta(2, 8, under.shape)).astype(float)
    spread = (over.sum(axis=1) / under.sum(axis=1)).std()
    told = math.sqrt(float(means.arm_of_values(means.linearised(over[0], under[0])).variance) / 400)
    assert told == pytest.approx(spread, rel=0.15)


def test_the_past_narrows_the_interval_and_moves_nothing() -> None:
    rng = np.random.default_rng(2)
    past = rng.normal(size=4_000)
    arms = rng.integers(0, 2, 4_000)
    values = past + rng.normal(0.0, 0.5, 4_000) + 0.1 * arms
    adjusted = means.adjusted(values, np.where(rng.random(4_000) < 0.1, np.nan, past), arms)
    assert adjusted.var() < 0.5 * values.var()
    difference = adjusted[arms == 1].mean() - adjusted[arms == 0].mean()
    assert difference == pytest.approx(0.1, abs=3 * 2 * 0.65 / math.sqrt(4_000))
    assert means.adjusted(values, np.full(4_000, np.nan), arms) is values


def test_fieller_and_the_difference_agree_about_zero() -> None:
    rng = np.random.default_rng(3)
    for factor in np.linspace(1.0, 1.6, 25):
        a, b = (means.arm_of_values(rng.lognormal(0.0, 1.0, 1_500) * each) for each in (1.0, factor))
        found = means.difference(a, b, 0.05, mixture.precision(0.05, 3_000))
        assert (found.low > 0) == (found.relative_low > 0)
        assert (found.log_e > math.log(20)) == bool(found.low > 0 or found.high < 0)


def test_what_is_relative_to_a_baseline_below_zero_has_its_sign() -> None:
    rng = np.random.default_rng(4)
    a, b = (means.arm_of_values(rng.normal(mean, 1.0, 5_000)) for mean in (-5.0, -4.0))
    found = means.difference(a, b, 0.05, 0.001)
    assert 0.15 < found.relative_low < found.relative < found.relative_high < 0.25


def test_a_baseline_that_may_be_zero_has_no_relative_interval() -> None:
    rng = np.random.default_rng(4)
    a, b = (means.arm_of_values(rng.normal(0.0, 1.0, 500)) for _ in range(2))
    found = means.difference(a, b, 0.05, 0.01)
    assert (found.relative_low, found.relative_high) == (-math.inf, math.inf)


@pytest.mark.parametrize("true", [(0.2, 0.3), (0.9, 0.4), (0.02, 0.02)])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_bet_against_a_true_line_is_fair(true: tuple[float, float], share: float) -> None:
    """Its mean is 1 exactly, whatever was seen before: for the difference, and for the ratio."""
    rng = np.random.default_rng(5)
    for line in ((true[1] - true[0], 1.0), (0.0, true[1] / true[0])):
        seen = [proportions.Counts(np.array([50.0]), np.array([float(rng.integers(0, 51))])) for _ in range(2)]
        staked = proportions.bets((seen[0], seen[1]), share, (np.array([line[0]]), np.array([line[1]])), 0.01)
        mean = sum(
            part * (rate * np.exp(win[0]) + (1.0 - rate) * np.exp(loss[0]))
            for part, rate, win, loss in zip((1 - share, share), true, staked.win, staked.loss, strict=True)
        )
        assert mean == pytest.approx(1.0, abs=1e-9)


def test_the_interval_of_proportions_ends_where_the_bets_have_won() -> None:
    rng = np.random.default_rng(6)
    treated = rng.random(5_000) < 0.5
    hits = rng.random(5_000) < np.where(treated, 0.15, 0.1)
    arms, rho2 = proportions.in_blocks(treated, hits), mixture.precision(0.05, 5_000)
    found = proportions.difference(arms, 0.5, 0.05, rho2)
    assert found.low < 0.05 < found.high
    for end in (found.low, found.high):
        at_end = proportions.log_e_value(arms, 0.5, (np.array([end]), np.ones(1)), rho2)[0]
        assert at_end == pytest.approx(math.log(20), abs=0.01)
    assert (found.log_e >= math.log(20)) == (found.low > 0) == (found.relative_low > 0)


@pytest.mark.parametrize("hits", [(0, 0), (0, 100), (100, 100)], ids=str)
def test_proportions_of_nothing_and_all_have_intervals(hits: tuple[int, int]) -> None:
    treated = np.arange(200) % 2 == 1
    hit = np.where(treated, np.arange(200) // 2 < hits[1], np.arange(200) // 2 < hits[0])
    found = proportions.difference(proportions.in_blocks(treated, hit), 0.5, 0.05, 0.01)
    assert -1.0 <= found.low < (hits[1] - hits[0]) / 100 <= found.high <= 1.0


def test_a_quantile_of_one_value_per_unit_is_the_same_clustered_or_not() -> None:
    """Nearly: one is exact and the other asymptotic."""
    rng = np.random.default_rng(7)
    x, y = rng.lognormal(0.0, 1.0, 4_000), rng.lognormal(0.2, 1.0, 4_000)
    rho2, unit = mixture.precision(0.05, 4_000), np.arange(4_000)
    exact = quantiles.difference(quantiles.of_units(x, 0.5, rho2), quantiles.of_units(y, 0.5, rho2), 0.05)
    clustered = quantiles.difference(
        quantiles.of_clusters(unit, x, 0.5, rho2), quantiles.of_clusters(unit, y, 0.5, rho2), 0.05
    )
    assert clustered.low == pytest.approx(exact.low, abs=0.01)
    assert clustered.high == pytest.approx(exact.high, abs=0.01)
    assert exact.low < math.exp(0.2) - 1 < exact.high


def test_values_of_one_user_count_as_one_user() -> None:
    """Each value ten times over says nothing new."""
    rng = np.random.default_rng(8)
    sides = [rng.lognormal(0.0, 1.0, 1_000) for _ in range(2)]
    rho2, unit = mixture.precision(0.05, 1_000), np.arange(1_000)
    one = [quantiles.of_clusters(unit, each, 0.9, rho2) for each in sides]
    ten = [quantiles.of_clusters(np.repeat(unit, 10), np.repeat(each, 10), 0.9, rho2) for each in sides]
    once, tenfold = (quantiles.difference(each[0], each[1], 0.05) for each in (one, ten))
    assert tenfold.low == pytest.approx(once.low, abs=0.15)
    assert tenfold.high == pytest.approx(once.high, abs=0.15)


def test_equal_values_decide_nothing() -> None:
    rho2 = mixture.precision(0.05, 1_000)
    side = quantiles.of_units(np.repeat([1.0, 2.0], 500), 0.5, rho2)
    found = quantiles.difference(side, side, 0.05)
    assert found.low <= 0.0 <= found.high
    assert found.log_e <= 0.0


def test_the_sample_ratio_is_the_dirichlet_mixture() -> None:
    """Beside the likelihoods themselves, for one prior and both: scipy's own distribution of counts."""
    counts, shares = np.array([30.0, 50.0]), np.array([0.5, 0.5])
    likelihoods = [
        stats.dirichlet_multinomial.pmf(counts.astype(int), weight * shares, 80) for weight in (4.0, 10_000 / 11)
    ]
    true = stats.multinomial.pmf(counts.astype(int), 80, shares)
    told = math.exp(float(sample_ratio.log_e_value(counts, shares, 10_000)))
    assert told == pytest.approx(sum(likelihoods) / 2 / true)


def seen(
    plan: Plan, count: int, rates: tuple[float, float] = (0.2, 0.2), seed: int = 1, arms: int = 2, **value: float
) -> Units:
    """Units a minute apart, each with its outcomes a second after it came."""
    rng = np.random.default_rng(seed)
    exposures, outcomes = [], []
    for place in range(count):
        arm = int(rng.integers(0, arms))
        at, unit = 60.0 * place, f"u{place}"
        exposures.append(Exposure(plan.order[arm], unit, at))
        outcomes.append(Outcome("bought", float(rng.random() < rates[arm]), at + 1.0, unit=unit))
        outcomes.append(Outcome("score", rng.normal(5.0, 1.0) + value.get("score", 0.0) * arm, at + 1.0, unit=unit))
        outcomes.append(
            Outcome("latency", rng.lognormal(-3, 0.5) * (1.0 + value.get("slower", 0.0) * arm), at + 1.0, unit=unit)
        )
    return join(plan, exposures, outcomes)


def plan(primary: OutcomeSpec = BOUGHT, **other: object) -> Plan:
    return Plan("spring", {"old": 1.0, "new": 1.0}, "old", primary, SMALL, **{"units": 2_000, **other})  # type: ignore[arg-type]


def test_every_look_says_what_the_simulation_says() -> None:
    """So that what the simulations hold of is what a user gets."""
    spring = plan()
    units = seen(spring, 400, (0.2, 0.5))
    hits = np.zeros(400, bool)
    hits[units.reports["bought"].unit] = units.reports["bought"].value > 0
    wealth = simulated.wealth_of_proportions((units.arm == 1)[None], hits[None], 0.5, 0.0, 2_000)[0]
    # Outcomes come a second after their unit, so at the look a minute later all but the newest unit's are known.
    reports = list(looks(plan(window=1.0), units, each=100))
    assert [report.units for report in reports] == [100, 200, 300, 400]
    told = [report.primary[0].p_value for report in reports]
    np.testing.assert_allclose(told, np.exp(np.minimum(0.0, -wealth[99::100])), rtol=1e-6)


def test_a_better_arm_is_named_with_its_interval() -> None:
    report = analysed(plan(), seen(plan(), 3_000, (0.2, 0.3)))
    [effect] = report.primary
    assert (report.answer, report.arm, effect.judgement) == (Answer.TREATMENT, "new", Judgement.BETTER)
    assert 0 < effect.low < 0.1 < effect.high
    assert 0 < effect.relative_low < 0.5 < effect.relative_high
    assert effect.p_value <= 0.05
    assert "Move traffic to 'new'" in report.advice


def test_a_worse_arm_leaves_the_baseline() -> None:
    report = analysed(plan(), seen(plan(), 3_000, (0.3, 0.2)))
    assert (report.answer, report.arm) == (Answer.BASELINE, "old")


def test_arms_that_differ_by_less_than_is_worth_knowing_are_equivalent() -> None:
    spring = plan(SCORE)
    assert analysed(spring, seen(spring, 6_000)).answer is Answer.EQUIVALENT


def test_a_report_says_what_the_past_took_away_and_of_how_many_units() -> None:
    """Half of the units have one, and all that varies in their values is in it: half of the variance goes."""
    spring, rng = plan(SCORE, secondary=(BOUGHT,)), np.random.default_rng(9)
    exposures, outcomes = [], []
    for place in range(2_000):
        unit, at, usual = str(place), 100.0 + place, float(rng.normal())
        exposures.append(Exposure(spring.order[place % 2], unit, at))
        outcomes.append(Outcome("score", 5.0 + usual, at + 1.0, unit=unit))
        if place % 4 < 2:
            outcomes.append(Outcome("score", 9.0 + usual, at - 1.0, unit=unit))
    report = analysed(spring, join(spring, exposures, outcomes))
    [effect], [secondary] = report.primary, report.secondary
    assert effect.past is not None
    assert effect.past.units == 1_000
    assert effect.past.removed == pytest.approx(0.5, abs=0.05)
    percent = f"{100 * effect.past.removed:.3g}"
    told = [line for line in report.lines() if "; the past" in line]
    assert [line.partition("; the ")[2] for line in told] == [
        f"past of 1000 of 2000 units takes {percent} % of the variance away (CUPED)"
    ]
    assert report.as_json()["primary"][0]["past"] == {"units": 1_000, "removed": effect.past.removed}
    assert secondary.past is None
    alone = [each for each in outcomes if each.at > 100.0 + float(each.unit)]
    without = analysed(spring, join(spring, exposures, alone))
    assert without.primary[0].past is None
    assert not any("CUPED" in line for line in without.lines())
    assert without.as_json()["primary"][0]["past"] is None


def test_an_open_experiment_says_how_long_it_will_take() -> None:
    report = analysed(plan(), seen(plan(), 600))
    assert report.answer is Answer.UNDECIDED
    assert report.units_left is not None
    assert report.seconds_left == pytest.approx(report.units_left * 60, rel=0.01)
    assert "Go on" in report.advice


def test_a_breached_guardrail_outweighs_a_better_primary_outcome() -> None:
    spring = plan(guardrails=(Guardrail(LATENCY, Amount(0.1, is_relative=True)),))
    report = analysed(spring, seen(spring, 3_000, (0.2, 0.3), slower=0.5))
    assert [each.state for each in report.guardrails] == [Guard.BREACHED]
    assert (report.answer, report.arm) == (Answer.BASELINE, "old")
    assert "a guardrail is breached" in report.advice
    fine = analysed(spring, seen(spring, 3_000, (0.2, 0.3)))
    assert [each.state for each in fine.guardrails] == [Guard.HELD]
    assert fine.answer is Answer.TREATMENT


def test_units_that_do_not_come_as_planned_void_every_answer() -> None:
    planned = Plan("spring", {"old": 2.0, "new": 1.0}, "old", BOUGHT, SMALL)
    report = analysed(planned, seen(planned, 2_000, (0.2, 0.9)))
    assert report.sample_ratio.is_mismatched
    assert report.answer is Answer.INVALID
    assert "No answer" in next(report.lines())


def test_several_arms_and_outcomes_share_their_error_rates() -> None:
    three = Plan("spring", {"a": 1.0, "b": 1.0, "c": 1.0}, "a", SCORE, SMALL, secondary=(BOUGHT, LATENCY), units=2_000)
    report = analysed(three, seen(three, 900, (0.2, 0.2, 0.2), arms=3))  # type: ignore[arg-type]
    assert [(each.arm, each.alpha) for each in report.primary] == [("b", 0.025), ("c", 0.025)]
    assert [each.alpha for each in report.secondary] == [0.0125] * 4
    assert any("Bonferroni" in line for line in report.lines())


def test_of_several_better_arms_it_says_that_they_were_not_compared() -> None:
    three = Plan("spring", {"a": 1.0, "b": 1.0, "c": 1.0}, "a", SCORE, SMALL, units=2_000)
    report = analysed(three, seen(three, 1_500, (0.2, 0.2, 0.2), arms=3, score=0.5))  # type: ignore[arg-type]
    assert (report.answer, report.arm) == (Answer.TREATMENT, "c")
    assert any("'b', 'c' are better than the baseline; which" in each for each in report.doubts)


@pytest.mark.parametrize(
    ("primary", "doubt"),
    [(SCORE, "too few units"), (SCORE, "less than a week")],
)
def test_a_small_experiment_says_so(primary: OutcomeSpec, doubt: str) -> None:
    report = analysed(plan(primary), seen(plan(primary), 150))
    assert any(doubt in each for each in report.doubts)
    assert report.primary[0].judgement is Judgement.UNDECIDED


def test_an_effect_that_fades_is_told_of() -> None:
    spring = plan(SCORE)
    early, late = seen(spring, 3_000, score=1.0), seen(spring, 3_000, seed=2)
    exposures, outcomes = [], []
    for part, units in enumerate((early, late)):
        reports = units.reports["score"]
        for place, arm in enumerate(units.arm):
            exposures.append(Exposure(spring.order[arm], f"{part}-{place}", units.at[place] + part * 1e6))
        for place, value, at in zip(reports.unit, reports.value, reports.at, strict=True):
            outcomes.append(Outcome("score", value, at + part * 1e6, unit=f"{part}-{place}"))
    report = analysed(spring, join(spring, exposures, outcomes))
    assert any("novelty" in each for each in report.doubts)
    assert not any("novelty" in each for each in analysed(spring, early).doubts)


def test_reports_that_are_missing_in_one_arm_are_told_of() -> None:
    spring = plan(SCORE)
    units = seen(spring, 3_000)
    reports = units.reports["score"]
    exposures = [Exposure(spring.order[arm], str(place), units.at[place]) for place, arm in enumerate(units.arm)]
    kept = [
        Outcome("score", value, at, unit=str(place))
        for place, value, at in zip(reports.unit, reports.value, reports.at, strict=True)
        if units.arm[place] == 0 or place % 3
    ]
    report = analysed(spring, join(spring, exposures, kept))
    assert any("who reports may differ" in each for each in report.doubts)


def test_a_unit_without_a_report_is_nothing_or_zero_as_the_plan_says() -> None:
    exposures = [Exposure("old", str(place), float(place)) for place in range(4)]
    outcomes = [Outcome("score", 6.0, 9.0, unit="0"), Outcome("score", 2.0, 9.0, unit="1")]
    means_by = {}
    for missing in Missing:
        spring = plan(OutcomeSpec("score", Kind.NUMERIC, Better.HIGHER, missing=missing))
        means_by[missing] = analysed(spring, join(spring, exposures, outcomes)).primary[0].baseline_value
    assert means_by == {Missing.EXCLUDED: 4.0, Missing.ZERO: 2.0}


def test_no_report_of_anything_is_no_error() -> None:
    for kind in Kind:
        spring = plan(OutcomeSpec("score", kind, Better.HIGHER, quantile=0.5))
        report = analysed(spring, join(spring, [Exposure("old", "x", 1.0)], []))
        assert report.answer is Answer.UNDECIDED
        assert list(report.lines())


def test_what_nobody_reports_of_anybody_is_not_known_to_be_equal() -> None:
    """Such as where whatever reports it was never set up: a unit without a report is 0, but not all of them."""
    spring = plan(guardrails=(Guardrail(BOUGHT, Amount(0.05, is_relative=False)),))
    exposures = [Exposure(spring.order[place % 2], str(place), float(place)) for place in range(4_000)]
    report = analysed(spring, join(spring, exposures, []))
    assert (report.answer, report.guardrails[0].state) == (Answer.UNDECIDED, Guard.UNDECIDED)
    assert any("guards nothing" in each for each in report.doubts)
    assert any("bought of 'new': nothing reported" in line for line in report.lines())
    once = analysed(spring, join(spring, exposures, [Outcome("bought", 1.0, 9.0, "0")]))
    assert once.guardrails[0].state is Guard.HELD


def test_reports_that_have_stopped_are_told_of() -> None:
    spring = plan()
    units = seen(spring, 2_000)
    exposures = [Exposure(spring.order[arm], str(place), units.at[place]) for place, arm in enumerate(units.arm)]
    hits = [Outcome("bought", 1.0, at + 1.0, str(place)) for place, at in enumerate(units.at) if place % 5 == 0]
    report = analysed(spring, join(spring, exposures, hits))
    assert not any("stopped" in each for each in report.doubts)
    report = analysed(spring, join(spring, exposures, hits[:200]))
    [doubt] = [each for each in report.doubts if "stopped" in each]
    assert "no report of 'bought' is of after" in doubt
    assert "1004 units have come since" in doubt


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_reports_in_another_time_zone_than_exposures_are_told_of(shift: float) -> None:
    spring = plan(SCORE)
    exposures = [Exposure(spring.order[place % 2], str(place), 1_000.0 * place) for place in range(1_000)]
    delays = np.random.default_rng(13).exponential(3_600.0, 1_000)
    ats = [1_000.0 * place + float(delay) + 3_600.0 * shift for place, delay in enumerate(delays)]
    outcomes = [Outcome("score", 5.0, at, str(place)) for place, at in enumerate(ats)]
    outcomes += [Outcome("score", 5.0, at - 86_400.0 * (1 + place % 3), str(place)) for place, at in enumerate(ats)]
    doubts = analysed(spring, join(spring, exposures, outcomes)).doubts
    assert any("a wrong clock or time zone" in each for each in doubts) is (shift < 0.0)


def test_an_arm_that_was_renamed_is_told_of_and_voids_the_answer() -> None:
    """All who were there before come again: those of the arm that kept its name had twice the time to buy."""
    spring, rng = plan(), np.random.default_rng(11)
    exposures, outcomes = [], []
    for place in range(2_000):
        unit, arm = str(place), place % 2
        exposures.append(Exposure("old" if arm == 0 else "before", unit, float(place)))
        exposures.append(Exposure("old" if arm == 0 else "new", unit, 5_000.0 + place))
        outcomes += [Outcome("bought", 1.0, at, unit) for at in (place + 1.0, 5_001.0 + place) if rng.random() < 0.2]
    exposures += [Exposure(spring.order[place % 2], f"later {place}", 9_000.0 + place) for place in range(500)]
    report = analysed(spring, join(spring, exposures, outcomes))
    assert report.answer is Answer.INVALID
    assert any("arms that the plan does not have" in each for each in report.doubts)


def test_a_guardrail_of_which_one_arm_reports_less_is_told_of_too() -> None:
    spring = plan(guardrails=(Guardrail(LATENCY, Amount(0.1, is_relative=True)),))
    units = seen(spring, 3_000)
    exposures = [Exposure(spring.order[arm], str(place), units.at[place]) for place, arm in enumerate(units.arm)]
    reports = units.reports["latency"]
    kept = [
        Outcome("latency", value, at, unit=str(place))
        for place, value, at in zip(reports.unit, reports.value, reports.at, strict=True)
        if units.arm[place] == 0 or place % 3
    ]
    report = analysed(spring, join(spring, exposures, kept))
    assert any("'latency' is reported for" in each and "who reports may differ" in each for each in report.doubts)


def test_a_report_says_since_when_how_and_without_whom() -> None:
    spring = plan(SCORE, secondary=(BOUGHT,))
    exposures = [Exposure(spring.order[place % 2], str(place), 86_400.0 + place) for place in range(300)]
    exposures += [Exposure("new", "tester", 86_500.0, is_forced=True), Exposure("new", "0", 86_400.0)]
    outcomes = [Outcome("score", float(place), 90_000.0, str(place)) for place in range(300)]
    report = analysed(spring, join(spring, exposures, outcomes))
    lines = [line.strip() for line in report.lines()]
    assert "units came since 1970-01-02 00:00 UTC; as of 1970-01-02 01:00 UTC" in lines
    assert "methods: score: asymptotic; bought: betting (exact)" in lines
    left_out = "1 repeated exposures, 1 forced units, 1 units in two arms, 1 reports of units that are left out"
    assert f"left out: {left_out}" in lines
    assert report.as_json()["since"] == 86_401.0


def test_a_difference_of_what_few_units_have_is_covered_at_every_look() -> None:
    """Of a hundred one buys, for amounts that vary: the first few amounts are mostly small, and so is their spread."""
    spent = OutcomeSpec("spent", Kind.NUMERIC, Better.HIGHER, per_unit=PerUnit.SUM, missing=Missing.ZERO)
    spring, rng, missed = plan(spent, window=1.0), np.random.default_rng(12), 0
    true = 0.005 * math.exp(1.5**2 / 2)
    for _ in range(60):
        buyers = [number for number in range(1_500) if rng.random() < 0.01]
        outcomes = [
            Outcome("spent", rng.lognormal(0.0, 1.5) * (1.0, 1.5)[number % 2], float(number), str(number))
            for number in buyers
        ]
        exposures = [Exposure(spring.order[number % 2], str(number), float(number)) for number in range(1_500)]
        found = [report.primary[0] for report in looks(spring, join(spring, exposures, outcomes), 100)]
        missed += any(not effect.low <= true <= effect.high for effect in found)
        assert "until 20 units" in found[0].method
        assert "until 20 units" not in found[-1].method or len(buyers) < 20
    assert missed <= 60 * 0.05


DIFFERS = OutcomeSpec("differs", Kind.NUMERIC, Better.LOWER, measure="disagreement")
AGREES = OutcomeSpec("agrees", Kind.NUMERIC, Better.HIGHER, measure="agreement")
ANY_DIFFERS = OutcomeSpec("differs", Kind.BINARY, Better.LOWER, measure="disagreement")


def compared(spec: OutcomeSpec, values: np.ndarray) -> Effect:
    """The effect of a guardrail; units come to arms in turn, and values are of their answers, NaN for none."""
    plan = Plan("p", {"a": 1, "b": 1}, "a", LATENCY, SMALL, (Guardrail(spec, Amount(0.05, False)),), units=values.size)
    exposures = [Exposure("ab"[n % 2], str(n), float(n)) for n in range(values.size)]
    outcomes = [Outcome(spec.name, float(x), float(n), unit=str(n)) for n, x in enumerate(values) if not np.isnan(x)]
    (guardrail,) = analysed(plan, join(plan, exposures, outcomes)).guardrails
    return guardrail.effect


@pytest.mark.parametrize("spec", [DIFFERS, ANY_DIFFERS, AGREES], ids=["mean", "any", "agreement"])
def test_answers_that_always_differ_from_those_that_never_do_are_told_apart(spec: OutcomeSpec) -> None:
    """Nothing varies within an arm, so that nothing asymptotic can be said."""
    effect = compared(spec, np.arange(200) % 2 if spec is not AGREES else 1.0 - np.arange(200) % 2)
    assert abs(effect.difference) == 1.0
    assert min(abs(effect.low), abs(effect.high)) > 0.5
    assert guarded(effect, Amount(0.05, False)) is Guard.BREACHED


def test_answers_that_never_differ_in_either_arm_hold_a_guardrail() -> None:
    assert guarded(compared(DIFFERS, np.zeros(2_000)), Amount(0.05, False)) is Guard.HELD


@pytest.mark.parametrize("spec", [DIFFERS, ANY_DIFFERS], ids=["mean", "any"])
def test_answers_that_nobody_compared_agree_with_nobody(spec: OutcomeSpec) -> None:
    """Of the reference itself each is: the other arm's copies are lost, such as with that variant down."""
    effect = compared(spec, np.where(np.arange(2_000) % 2, np.nan, 0.0))
    assert (effect.baseline_units, effect.units) == (1_000, 0)
    assert guarded(effect, Amount(0.05, False)) is Guard.UNDECIDED


def test_equal_shares_of_compared_answers_are_called_different_in_at_most_alpha() -> None:
    """Also where of one arm half as many are compared, whose share of the units is not as planned."""
    rng = np.random.default_rng(143)
    calls = 0
    for _ in range(100):
        values = rng.beta(0.5, 4.0, 1_500)
        values[(np.arange(values.size) % 2 == 1) & (rng.random(values.size) < 0.5)] = np.nan
        calls += any(compared(DIFFERS, values[:until]).p_value <= 0.05 for until in (200, 400, 800, 1_500))
    assert calls <= 5
