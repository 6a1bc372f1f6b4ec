"""Error rates, power and coverage of what docs/experiments.md promises, in simulation with a look after every unit."""

from __future__ import annotations

import numpy as np
import pytest
import simulated
from numpy.typing import NDArray
from simulated import ALPHA, EXPERIMENTS, LATENCIES

from gateway.experiments.analysis import mixture
from gateway.experiments.analysis.experiment import looks
from gateway.experiments.plan import Amount, Better, Kind, OutcomeSpec, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.units import join
from gateway.experiments.verdict import Judgement

pytestmark = pytest.mark.timeout(1_800)  # of the long version


def rate(calls: NDArray[np.int64]) -> float:
    """Also printed: `make soak` shows what the page tells."""
    found = simulated.rate(calls)
    print(f"{found:.2%} of {calls.size} experiments")
    return found


@pytest.mark.parametrize("share", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("chance", [0.5, 0.1, 0.01, 0.001])
def test_equal_proportions_are_called_different_in_at_most_alpha_of_experiments(chance: float, share: float) -> None:
    calls = simulated.of_proportions((chance, chance), units=3_000, share=share, expected=1_000, seed=1)
    assert rate(calls) <= ALPHA


@pytest.mark.parametrize("share", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("distribution", LATENCIES)
def test_equal_means_of_heavy_tailed_latencies_are_called_different_in_at_most_alpha(
    distribution: str, share: float
) -> None:
    calls, missed = simulated.of_means(LATENCIES[distribution], units=2_000, share=share, expected=1_000, seed=2)
    assert rate(calls) <= ALPHA
    assert missed <= ALPHA


@pytest.mark.parametrize("factor", [1.5, 0.7])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_true_effect_on_heavy_tailed_latencies_is_covered_at_every_look(share: float, factor: float) -> None:
    """Also if the arm with fewer units is the one that varies more."""
    draw = LATENCIES["log-normal, σ = 1"]
    mean = float(np.exp(0.5))
    _, missed = simulated.of_means(draw, units=2_000, share=share, factor=factor, mean=mean, expected=1_000, seed=13)
    assert missed <= ALPHA


def test_equal_ratios_of_correlated_requests_are_called_different_in_at_most_alpha() -> None:
    assert rate(simulated.of_ratios(units=2_000, seed=3)) <= ALPHA


def test_requests_taken_for_units_would_be_called_different_far_more_often() -> None:
    """The simulation has the mistake in it that the analysis per unit protects from."""
    assert rate(simulated.of_ratios(units=2_000, seed=3, as_if_independent=True)) > 5 * ALPHA


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_true_quantiles_are_rejected_in_at_most_alpha_of_experiments(level: float, share: float) -> None:
    """Which bounds both false calls and intervals that miss, at whatever time."""
    assert rate(simulated.of_quantiles(level, units=3_000, share=share, seed=4)) <= ALPHA


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_equal_quantiles_of_all_requests_are_called_different_in_at_most_alpha(level: float) -> None:
    assert rate(simulated.of_clustered_quantiles(level, units=1_000, looks=10, seed=5)) <= ALPHA


@pytest.mark.parametrize("kind", ["proportion", "mean"])
def test_reports_that_come_late_call_a_difference_in_at_most_alpha(kind: str) -> None:
    assert rate(simulated.of_late_reports(kind, units=1_000, looks=25, seed=12)) <= ALPHA


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.5, 0.3, 0.2)])
def test_a_true_sample_ratio_raises_the_alarm_in_at_most_alpha(shares: tuple[float, ...]) -> None:
    assert rate(simulated.of_sample_ratio(shares, shares, units=2_000, seed=6)) <= ALPHA


def test_a_wrong_sample_ratio_raises_the_alarm() -> None:
    """53 to 47 in half the experiments within 3,000 units; an arm that gets nothing within 20."""
    assert np.median(simulated.of_sample_ratio((0.53, 0.47), (0.5, 0.5), units=3_000, seed=7)) <= 3_000
    assert simulated.of_sample_ratio((1.0, 0.0), (0.5, 0.5), units=100, seed=8).max() <= 20


@pytest.mark.parametrize("rates", [(0.1, 0.15), (0.5, 0.6), (0.02, 0.05)])
def test_a_difference_of_proportions_is_called_when_that_was_predicted(rates: tuple[float, float]) -> None:
    per_unit = 2 * sum(each * (1 - each) for each in rates)
    half, most = _predicted(per_unit, rates[1] - rates[0])
    calls = simulated.of_proportions(rates, units=round(1.2 * most), seed=9)
    assert 0.8 * half <= np.median(calls) <= 1.15 * half
    assert (calls <= most).mean() >= 0.88


@pytest.mark.parametrize(
    ("distribution", "mean", "variance"), [("normal", 1.0, 1.0), ("log-normal, σ = 1", 1.6487, 4.6708)]
)
def test_a_difference_of_means_is_called_when_that_was_predicted_and_covered(
    distribution: str, mean: float, variance: float
) -> None:
    factor = 1.2
    half, most = _predicted(2 * variance * (1 + factor * factor), mean * (factor - 1))
    calls, missed = simulated.of_means(
        LATENCIES[distribution], units=round(1.2 * most), factor=factor, mean=mean, seed=10
    )
    assert 0.8 * half <= np.median(calls) <= 1.15 * half
    assert (calls <= most).mean() >= 0.88
    assert missed <= ALPHA  # at no look before, at or after the call


def _predicted(per_unit: float, effect: float) -> tuple[float, float]:
    """Units until half of the experiments are called, and until nine tenths are."""
    rho2 = mixture.precision(ALPHA, 10_000)
    half, most = (mixture.units_until(per_unit, effect, ALPHA, rho2, power) for power in (0.5, 0.9))
    return half, most


@pytest.mark.parametrize(("rates", "share"), [((0.1, 0.15), 0.5), ((0.01, 0.03), 0.1), ((0.95, 0.9), 0.9)])
def test_the_true_difference_of_proportions_is_covered_at_every_look(rates: tuple[float, float], share: float) -> None:
    """So also at the look at which somebody stops."""
    true = rates[1] - rates[0]
    assert rate(simulated.of_proportions(rates, units=3_000, share=share, true=true, expected=1_000, seed=11)) <= ALPHA


def test_the_long_version_has_two_thousand_experiments() -> None:
    assert (2_000 if simulated.IS_LONG else 500) == EXPERIMENTS


@pytest.mark.parametrize(("effect", "most", "least"), [(0.0, ALPHA, 0.0), (1.0, 1.0, 0.9)])
def test_of_nine_secondary_outcomes_any_is_called_in_at_most_alpha_if_none_differs(
    effect: float, most: float, least: float
) -> None:
    """As the report shares their error rate. They are alike, as outcomes of the same units are. effect: of the last."""
    rng = np.random.default_rng(14)
    names = [f"s{place}" for place in range(10)]
    specs = tuple(OutcomeSpec(name, Kind.NUMERIC, Better.HIGHER) for name in names)
    worth = Amount(0.02, is_relative=True)
    plan = Plan("ten", {"old": 1.0, "new": 1.0}, "old", specs[0], worth, secondary=specs[1:], units=400)
    called = []
    for _ in range(60):
        arms = rng.integers(0, 2, 400)
        values = rng.normal(5.0, 1.0, (400, 1)) + rng.normal(0.0, 1.0, (400, 10))
        values[:, -1] += effect * arms
        exposures = [Exposure(plan.order[arm], str(unit), 60.0 * unit) for unit, arm in enumerate(arms)]
        outcomes = [
            Outcome(name, float(values[unit, place]), 60.0 * unit + 1.0, unit=str(unit))
            for unit in range(400)
            for place, name in enumerate(names)
        ]
        reports = looks(plan, join(plan, exposures, outcomes), each=20)
        told = {each.judgement for report in reports for each in report.secondary}
        called.append(bool(told & {Judgement.BETTER, Judgement.WORSE}))
    print(f"{np.mean(called):.2%} of {len(called)} experiments")
    assert least <= np.mean(called) <= most
