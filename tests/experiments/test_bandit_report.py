"""A report on a bandit's data: units count by the inverse of their propensity, and it says what is not known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import simulated

from gateway.experimentation.report_page import page
from gateway.experiments.analysis import mixture, sample_ratio, weighted
from gateway.experiments.analysis.distributions import distributions
from gateway.experiments.analysis.experiment import analysed, looks, rewards
from gateway.experiments.bandit import shares
from gateway.experiments.epochs import Epoch
from gateway.experiments.plan import Amount, BanditPlan, Better, Guardrail, Kind, OutcomeSpec, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.units import Units, join
from gateway.experiments.verdict import NOT_COMPARED, Answer

BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
SPENT = OutcomeSpec("spent", Kind.NUMERIC, Better.HIGHER)
ARMS = ("a", "b")
SLICES, HOUR = 8, 3_600.0


def plan_of(arms: tuple[str, ...] = ARMS, **more: object) -> Plan:
    given: dict[str, object] = {
        "primary": BOUGHT,
        "smallest_effect": Amount(0.05, is_relative=False),
        "units": 2_000,
        "window": 600.0,
        "bandit": BanditPlan(arms, BOUGHT, 0.05, SLICES, HOUR),
    }
    return Plan("spring", dict.fromkeys(arms, 1.0), arms[0], **(given | more))  # type: ignore[arg-type]


Rate = Callable[[int, int], float]  # of units that buy, by epoch and arm


def in_the_evening(number: int, arm: int) -> float:
    """Nobody is better, and all buy more in the later epochs."""
    return 0.2 + 0.4 * (number >= SLICES // 2)


def ran(rate: Rate, *, units: int = 400, seed: int = 1, plan: Plan | None = None) -> tuple[Units, list[Exposure]]:
    """A bandit that has gone through all epochs, as its store has it. units: in each epoch."""
    plan = plan_of() if plan is None else plan
    assert plan.bandit is not None
    rng, epochs = np.random.default_rng(seed), list[Epoch]()
    exposures, outcomes = list[Exposure](), list[Outcome]()
    for number in range(SLICES):
        now = 1.7e9 + number * HOUR
        joined = join(plan, exposures, outcomes, epochs)
        seen = rewards(plan, BOUGHT, joined, now) if epochs else []
        epochs.append(Epoch(shares(plan.bandit, epochs, seen), now))
        share = np.array([epochs[-1].shares[arm] for arm in plan.order])
        for place, arm in enumerate(rng.choice(len(plan.order), units, p=share / share.sum())):
            unit, at = f"{number}/{place}", now + HOUR * (place + 0.5) / units
            exposures.append(Exposure(plan.order[arm], unit, at, epoch=number, propensity=float(share[arm])))
            outcomes.append(Outcome("spent", 10.0 + 5.0 * number + rng.normal(), at + 60.0, unit))
            outcomes.append(Outcome("answers", 1.0, at + 60.0, unit))
            if rng.random() < rate(number, int(arm)):
                outcomes.append(Outcome("bought", 1.0, at + 60.0, unit))
    end = replace(join(plan, exposures, outcomes, epochs), end=1.7e9 + (SLICES + 1) * HOUR)
    return end, exposures


def test_the_report_says_that_it_is_a_bandit_and_by_which_shares_units_came() -> None:
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm])
    report = analysed(plan_of(), units)
    assert (report.answer, report.arm) == (Answer.TREATMENT, "b")
    first, last = report.epochs[0], report.epochs[-1]
    assert first.shares == {"a": 0.5, "b": 0.5}
    assert last.shares["b"] == pytest.approx(0.95, abs=0.001)
    assert sum(last.units.values()) == 400
    assert report.primary[0].low < 0.3 < report.primary[0].high
    assert not report.sample_ratio.is_mismatched
    text = "\n".join(report.lines())
    assert "A bandit after 8 epochs: shares followed the reward, from a 0.5, b 0.5 to a 0.05, b 0.95" in text
    assert "epoch 8 since 2023-11-15 05:13 UTC: a 0.05, b 0.95; units: a " in text
    assert report.as_json()["epochs"][0]["shares"] == {"a": 0.5, "b": 0.5}


def test_where_all_buy_more_in_the_evening_no_arm_is_called_better_for_it() -> None:
    """The arm that chance favoured has more of the evening's units. Its mean is higher, and it is no better."""
    called = 0
    for seed in range(60):
        units, _ = ran(in_the_evening, units=200, seed=seed)
        called += any(look.primary[0].judgement.value in ("better", "worse") for look in looks(plan_of(), units, 100))
    assert called <= 6  # 3 are expected at most, at alpha = 0.05


def test_a_look_knows_only_the_epochs_of_its_time() -> None:
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], units=200)
    early = next(looks(plan_of(), units, 300))
    assert (early.units, len(early.epochs)) == (300, 2)
    assert sum(count for epoch in early.epochs for count in epoch.units.values()) >= 300


@pytest.mark.parametrize("better", [Better.HIGHER, Better.LOWER])
def test_a_mean_is_weighed_and_its_relative_interval_too(better: Better) -> None:
    plan = plan_of(secondary=(replace(SPENT, better=better),))
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], plan=plan)
    (spent,) = analysed(plan, units).secondary
    assert spent.method == "inverse propensity, asymptotic"
    assert spent.low < 0.0 < spent.high  # though 'b' has most of the late units, who spend more
    assert spent.relative_low == pytest.approx(spent.low / spent.baseline_value, rel=0.2)
    assert spent.relative_high == pytest.approx(spent.high / spent.baseline_value, rel=0.2)
    assert spent.baseline_value == pytest.approx(27.5, abs=1.0)


@pytest.mark.parametrize("kind", [Kind.RATIO, Kind.QUANTILE])
def test_what_weights_are_not_for_is_not_compared_and_says_so(kind: Kind) -> None:
    plan = plan_of(secondary=(OutcomeSpec("answers", kind, Better.LOWER, quantile=0.9),))
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], units=200, plan=plan)
    report = analysed(plan, units)
    (effect,) = report.secondary
    assert (effect.method, effect.p_value, effect.judgement.value) == (NOT_COMPARED, 1.0, "undecided")
    assert f"also: answers of 'b': {NOT_COMPARED}" in "\n".join(report.lines())


def test_units_whose_propensity_nobody_knows_are_left_out_and_told() -> None:
    plan = plan_of()
    units, exposures = ran(lambda _, arm: (0.2, 0.5)[arm], units=200)
    wrong = [
        *exposures[:-3],
        exposures[-3]._replace(epoch=None),
        exposures[-2]._replace(epoch=99),
        exposures[-1]._replace(propensity=0.123),
    ]
    report = analysed(plan, join(plan, wrong, [], units.epochs))
    assert (report.account["without_propensity"], report.account["units"]) == (3, len(exposures) - 3)
    assert any(doubt.startswith("3 exposures name no known epoch") for doubt in report.doubts)


def test_who_is_missing_more_in_one_arm_is_told() -> None:
    plan = plan_of(primary=SPENT, guardrails=(Guardrail(BOUGHT, Amount(0.1, is_relative=False)),))
    units, exposures = ran(lambda _, arm: (0.2, 0.5)[arm])
    reports = [
        Outcome("spent", 1.0 + number % 3, each.at + 1, each.unit)
        for number, each in enumerate(exposures)
        if each.arm == "a" or number % 3
    ]
    doubts = analysed(plan, join(plan, exposures, reports, units.epochs)).doubts
    assert any("'spent' is reported for" in doubt and "of 'b'" in doubt for doubt in doubts), doubts


def test_rewards_are_of_units_whose_window_has_passed() -> None:
    plan = plan_of()
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], units=60)
    at = 1.7e9 + 0.5 * HOUR  # half of the first epoch has come, and a sixth of an hour of it has no window yet
    first, *later = rewards(plan, BOUGHT, units, at)
    assert sum(tally.units for tally in first.values()) == 20
    assert not any(tally.units for each in later for tally in each.values())


def test_the_page_draws_the_shares_and_no_spread_that_mixes_times() -> None:
    plan = plan_of(secondary=(SPENT,))
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], plan=plan)
    report = analysed(plan, units)
    drawn = page(plan, report, list(looks(plan, units, 400)), list(distributions(plan, units)))
    assert 'aria-label="Shares of arms by epoch"' in drawn
    assert "b, 95.0% now" in drawn
    assert "is spread in each arm" not in drawn


@pytest.mark.parametrize("level", [2.0, -2.0])
def test_relative_intervals_miss_at_any_look_in_at_most_alpha(level: float) -> None:
    rng, missed, experiments = np.random.default_rng(3), 0, 200
    rho2 = mixture.precision(simulated.ALPHA, 2_000)
    for _ in range(experiments):
        share = np.repeat(rng.uniform(0.1, 0.9, 10), 200)
        arm = (rng.random(share.size) < share).astype(np.int64)
        value = level * (1.0 + 0.1 * arm) + rng.normal(size=arm.size)
        found = weighted.difference(value, arm, np.stack([1.0 - share, share], axis=1), simulated.ALPHA, rho2)
        true = 0.1 * np.sign(level)  # relative to the baseline's size
        missed += bool(((found.relative_low > true) | (found.relative_high < true)).any())
        assert (found.relative_low <= found.estimate / np.abs(found.baseline))[found.is_ready].all()
    assert missed / experiments <= simulated.ALPHA


# --- Sample ratio


def test_shares_that_move_are_no_alarm_and_units_that_one_arm_loses_are() -> None:
    """By the plan's even shares the first one would be an alarm at once."""
    units, _ = ran(lambda _, arm: (0.2, 0.5)[arm], units=1_000)
    plan = plan_of()
    report = analysed(plan, units)
    assert not report.sample_ratio.is_mismatched
    assert report.sample_ratio.units["b"] == pytest.approx(report.sample_ratio.expected["b"], rel=0.02)
    rng = np.random.default_rng(4)
    lost = replace(units, arm=np.where((units.arm == 1) & (rng.random(units.arm.size) < 0.15), 0, units.arm))
    broken = analysed(plan, lost)
    assert (broken.sample_ratio.is_mismatched, broken.answer) == (True, Answer.INVALID)


@pytest.mark.parametrize("arms", [2, 4])
def test_the_alarm_of_epochs_is_false_at_any_look_in_at_most_alpha(arms: int) -> None:
    rng, false, experiments = np.random.default_rng(5), 0, 400
    for _ in range(experiments):
        shares_of = rng.dirichlet(np.full(arms, 2.0), 10) * (1.0 - 0.05 * arms) + 0.05
        counts = np.zeros((10, arms))
        for epoch in range(10):
            for _ in range(10):  # looks of 20 units, and now and then a late one of an epoch before
                counts[epoch] += rng.multinomial(18, shares_of[epoch])
                late = rng.integers(0, epoch + 1)
                counts[late] += rng.multinomial(2, shares_of[late])
                if sample_ratio.p_value_of_epochs(counts, shares_of) <= 0.05:
                    false += 1
                    break
            else:
                continue
            break
    assert false / experiments <= 0.05


def test_the_alarm_of_epochs_finds_what_a_fair_test_of_one_epoch_would_not() -> None:
    """A tenth of the units of one arm is lost in each of twenty epochs of 1,000 units."""
    shares_of = np.stack([np.linspace(0.5, 0.1, 20), 1.0 - np.linspace(0.5, 0.1, 20)], axis=1)
    counts = np.round(1_000 * shares_of * np.array([1.0, 0.90]))
    assert sample_ratio.p_value_of_epochs(counts[:1], shares_of[:1]) > 0.05
    assert sample_ratio.p_value_of_epochs(counts, shares_of) < 0.01
