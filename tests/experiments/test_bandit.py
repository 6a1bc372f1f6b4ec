"""A bandit finds the best arm and keeps units where they are, and its data says what a fair split's would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import simulated
from numpy.typing import NDArray

from gateway.experiments.analysis import means, mixture, weighted
from gateway.experiments.bandit import Tally, probabilities_of_best, shares
from gateway.experiments.epochs import Epoch, Epochs
from gateway.experiments.plan import BanditPlan, Better, Kind, OutcomeSpec
from gateway.routing.arms import Arms

FLOOR = 0.05
EXPERIMENTS = 1_000 if simulated.IS_LONG else 200
ARMS = ("a", "b")

Array = NDArray[np.float64]
Reward = Callable[[np.random.Generator, int, NDArray[np.int64]], Array]  # of an epoch's units, by their arm


def plan_of(arms: tuple[str, ...] = ARMS, *, better: Better = Better.HIGHER, slices: int = 20) -> BanditPlan:
    return BanditPlan(arms, OutcomeSpec("smiled", Kind.NUMERIC, better), FLOOR, slices, epoch=3_600.0)


@dataclass(frozen=True, slots=True)
class Run:
    """A bandit that has gone through all of its epochs. Arrays have an element for each unit, in order."""

    epochs: tuple[Epoch, ...]
    arm: NDArray[np.int64]
    value: Array
    propensities: Array  # a row for each unit, with an element for each arm


def run(plan: BanditPlan, units: int, reward: Reward, rng: np.random.Generator) -> Run:
    """units: in each epoch."""
    epochs, seen = list[Epoch](), list[Mapping[str, Tally]]()
    arms, values, propensities = [], [], []
    for number in range(plan.slices):
        epoch = Epoch(shares(plan, epochs, seen), number * plan.epoch)
        epochs.append(epoch)
        share = np.array([epoch.shares[arm] for arm in plan.arms])
        arm = rng.choice(len(plan.arms), units, p=share / share.sum())
        value = reward(rng, number, arm)
        seen.append({name: tally(value[arm == place]) for place, name in enumerate(plan.arms)})
        arms.append(arm)
        values.append(value)
        propensities.append(np.tile(share, (units, 1)))
    return Run(tuple(epochs), np.concatenate(arms), np.concatenate(values), np.concatenate(propensities))


def tally(values: Array) -> Tally:
    return Tally(values.size, float(values.sum()), float((values * values).sum()))


def hits(*rates: float) -> Reward:
    """A binary reward."""
    return lambda rng, _, arm: (rng.random(arm.size) < np.array(rates)[arm]).astype(np.float64)


def in_the_evening(*rates: float) -> Reward:
    """Likewise, and all arms gain 0.4 in the later half of the epochs."""
    return lambda rng, number, arm: (rng.random(arm.size) < np.array(rates)[arm] + 0.4 * (number >= 10)).astype(float)


@pytest.mark.parametrize("rates", [(0.10, 0.15), (0.15, 0.10), (0.10, 0.10, 0.15, 0.05)])
def test_it_regrets_less_than_half_of_what_an_even_split_does(rates: tuple[float, ...]) -> None:
    rng = np.random.default_rng(1)
    plan = plan_of(tuple("abcd"[: len(rates)]))
    lost = np.max(rates) - np.array(rates)  # by arm, of one unit
    regret = np.mean([lost[run(plan, 1_000, hits(*rates), rng).arm].sum() for _ in range(30)])
    even = lost.mean() * 20_000
    assert regret < 0.5 * even


def test_where_lower_is_better_the_lower_arm_gets_the_units() -> None:
    rng = np.random.default_rng(2)

    def latency(rng: np.random.Generator, _: int, arm: NDArray[np.int64]) -> Array:
        return rng.lognormal(np.log(np.array([0.050, 0.040]))[arm], 0.5)

    last = run(plan_of(better=Better.LOWER), 500, latency, rng).epochs[-1]
    assert last.shares["b"] == pytest.approx(1.0 - FLOOR)


@pytest.mark.parametrize("arms", [ARMS, ("a", "b", "c", "d")])
def test_each_arm_always_has_its_floor_and_all_shares_are_one(arms: tuple[str, ...]) -> None:
    rates = (0.9, 0.1, 0.1, 0.0)[: len(arms)]
    epochs = run(plan_of(arms), 2_000, hits(*rates), np.random.default_rng(3)).epochs
    for epoch in epochs:
        assert min(epoch.shares.values()) >= FLOOR - 1e-12
        assert sum(epoch.shares.values()) == pytest.approx(1.0)
    assert epochs[-1].shares["a"] == pytest.approx(1.0 - FLOOR * (len(arms) - 1))


def test_arms_that_do_not_differ_are_all_kept_in_play() -> None:
    """No arm is starved by luck alone in most of the runs: floors are for what is known to be worse."""
    rng = np.random.default_rng(4)
    least = [
        np.mean([min(epoch.shares.values()) for epoch in run(plan_of(), 200, hits(0.2, 0.2), rng).epochs])
        for _ in range(100)
    ]
    assert np.median(least) > 2 * FLOOR


@pytest.mark.parametrize(
    ("what", "a", "b"),
    [
        ("nothing is known of an arm", Tally(1_000, 500.0, 500.0), Tally()),
        ("an arm has too few units", Tally(1_000, 500.0, 500.0), Tally(means.FIRST_LOOK - 1, 0.0, 0.0)),
        ("all rewards are the same", Tally(500, 500.0, 500.0), Tally(500, 500.0, 500.0)),
        ("no unit has a hit", Tally(500), Tally(500)),
        ("a reward is too large to square", Tally(500, 1e200, float("inf")), Tally(500, 1.0, 1.0)),
        ("a reward is no number", Tally(500, float("nan"), float("nan")), Tally(500, 1.0, 1.0)),
    ],
)
def test_shares_stay_even_while(what: str, a: Tally, b: Tally) -> None:
    even = {"a": 0.5, "b": 0.5}
    assert shares(plan_of(), [Epoch(even, 0.0)], [{"a": a, "b": b}]) == pytest.approx(even), what


def test_an_arm_without_a_hit_is_not_given_up_for_an_arm_with_few() -> None:
    got = shares(plan_of(), [Epoch({"a": 0.5, "b": 0.5}, 0.0)], [{"a": Tally(100, 1.0, 1.0), "b": Tally(100)}])
    assert got["b"] > 3 * FLOOR


def test_no_arm_is_better_for_having_had_the_larger_share_while_all_were_good() -> None:
    """In the evening 'b' had nine tenths of the units: its mean is 0.52, that of 'a' 0.29. It was never better."""
    epochs = [Epoch({"a": 0.5, "b": 0.5}, 0.0), Epoch({"a": 0.1, "b": 0.9}, 1.0)]
    seen = [
        {"a": Tally(5_000, 1_050.0, 1_050.0), "b": Tally(5_000, 1_000.0, 1_000.0)},
        {"a": Tally(1_000, 710.0, 710.0), "b": Tally(9_000, 6_300.0, 6_300.0)},
    ]
    assert shares(plan_of(), epochs, seen)["a"] > 0.5


def test_the_probability_of_being_best_is_what_sampling_says() -> None:
    mean, spread = np.array([0.10, 0.11, 0.09, 0.105]), np.array([0.01, 0.02, 0.03, 0.0])
    drawn = np.random.default_rng(5).normal(mean, spread, (200_000, 4)).argmax(axis=1)
    assert probabilities_of_best(mean, spread) == pytest.approx(np.bincount(drawn) / drawn.size, abs=0.005)


# --- Who gets what


def arms_of(*shares_of_b: float, slices: int = 4) -> Arms:
    epochs = tuple({"a": 1.0 - share, "b": share} for share in shares_of_b)
    return Arms("greeting", {"a": 1.0, "b": 1.0}, "a", "of greeting", slices=slices, epochs=epochs)


def arm_of(arms: Arms, key: str) -> str:
    """As a worker chooses it, who has never seen the unit before."""
    assigned = arms.maybe_assign(key)
    assert assigned is not None
    return assigned[1]


KEYS = [f"user-{number}" for number in range(20_000)]


def test_a_unit_keeps_its_arm_whatever_later_epochs_do() -> None:
    early, late = arms_of(0.5, 0.7), arms_of(0.5, 0.7, 0.05, 0.95)
    taking_part = [key for key in KEYS if early.maybe_epoch(key) is not None]
    assert len(taking_part) / len(KEYS) == pytest.approx(0.5, abs=0.02)
    assert [arm_of(early, key) for key in taking_part] == [arm_of(late, key) for key in taking_part]


def test_units_of_slices_that_are_not_open_have_the_baseline_and_are_in_no_data() -> None:
    arms = arms_of(0.95)
    waiting = [key for key in KEYS if arms.maybe_epoch(key) is None]
    assert len(waiting) / len(KEYS) == pytest.approx(0.75, abs=0.02)
    assert {arms.maybe_assign(key) for key in waiting} == {("waiting:greeting", "a")}


def test_a_units_propensity_is_how_often_such_units_get_that_arm() -> None:
    arms = arms_of(0.5, 0.7, 0.05, 0.95)
    for number in range(4):
        own = [key for key in KEYS if arms.maybe_epoch(key) == number]
        share = sum(arm_of(arms, key) == "b" for key in own) / len(own)
        assert share == pytest.approx(arms.epochs[number]["b"], abs=0.03)
        assert {arms.maybe_propensity(key, "b") for key in own} == {(number, arms.epochs[number]["b"])}


def test_the_epoch_of_a_unit_says_nothing_of_its_arm_or_of_the_holdout() -> None:
    arms = replace(arms_of(0.5, 0.5, 0.5, 0.5), holdout=0.5)
    held = [key for key in KEYS if arms.maybe_assign(key) == ("holdout:greeting", "a")]
    counts = np.bincount([arms.maybe_epoch(key) or 0 for key in held])
    assert counts / len(held) == pytest.approx(0.25, abs=0.02)


def test_an_epoch_is_due_once_the_last_one_is_over_and_none_after_the_last_slice() -> None:
    def epochs(*since: float, slices: int = 4) -> Epochs:
        return Epochs("net", "a", slices, tuple(Epoch({"a": 0.5, "b": 0.5}, each) for each in since))

    plan = plan_of()
    assert epochs().overdue(plan, 0.0) == 0.0
    assert epochs(0.0).overdue(plan, 3_599.0) == -1.0
    assert epochs(0.0).overdue(plan, 3_600.0) == 0.0
    assert epochs(0.0, slices=1).overdue(plan, 1e9) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"arms": ("a",)},
        {"arms": ("a", "a")},
        {"floor": 0.0},
        {"floor": 0.5},
        {"floor": float("nan")},
        {"slices": 0},
        {"epoch": 0.0},
        {"epoch": float("nan")},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changed: dict[str, object]) -> None:
    given = {"arms": ARMS, "floor": FLOOR, "slices": 4, "epoch": 1.0} | changed
    with pytest.raises(ValueError, match=r"bandit has|floor of"):
        BanditPlan(reward=plan_of().reward, **given)  # type: ignore[arg-type]


# --- Its data


def difference_of(found: Run, expected: int = 4_000) -> weighted.Difference:
    rho2 = mixture.precision(simulated.ALPHA, expected)
    return weighted.difference(found.value, found.arm, found.propensities, simulated.ALPHA, rho2)


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.3, 0.4)])
def test_the_weighted_difference_is_unbiased_where_that_of_means_is_not(rates: tuple[float, float]) -> None:
    rng = np.random.default_rng(6)
    runs = [run(plan_of(), 200, in_the_evening(*rates), rng) for _ in range(200)]
    estimates = np.array([difference_of(each).estimate[-1] for each in runs])
    error = estimates.std(ddof=1) / np.sqrt(estimates.size)
    assert estimates.mean() == pytest.approx(rates[1] - rates[0], abs=3.5 * error)
    if rates[0] != rates[1]:
        naive = np.array([each.value[each.arm == 1].mean() - each.value[each.arm == 0].mean() for each in runs])
        assert abs(naive.mean() - (rates[1] - rates[0])) > 10.0 * naive.std(ddof=1) / np.sqrt(naive.size)


def latencies(factor: float) -> Reward:
    """Log-normal, in seconds; the second arm's are larger by that factor."""
    return lambda rng, _, arm: rng.lognormal(0.0, 1.0, arm.size) * np.where(arm == 1, factor, 1.0)


def long_tailed_where_rare(factor: float, less: float) -> Reward:
    """Log-normal; the second arm, which soon has few units since it is worse, varies so many times as much."""

    def draw(rng: np.random.Generator, _: int, arm: NDArray[np.int64]) -> Array:
        spread = rng.lognormal(0.0, 1.0, arm.size) - np.exp(0.5)
        return spread * np.where(arm == 1, factor, 1.0) - less * arm

    return draw


@pytest.mark.parametrize(
    ("reward", "arms", "true"),
    [
        (in_the_evening(0.2, 0.2), 2, 0.0),
        (in_the_evening(0.2, 0.3), 2, 0.1),
        (hits(0.03, 0.03), 2, 0.0),
        (hits(0.2, 0.2, 0.2, 0.2), 4, 0.0),
        (latencies(1.3), 2, 0.3 * np.exp(0.5)),
        (long_tailed_where_rare(3.0, less=0.2), 2, -0.2),
    ],
    ids=["no difference", "a difference", "rare hits", "four arms", "latencies", "a long tail"],
)
def test_intervals_miss_the_difference_at_any_look_in_at_most_alpha(reward: Reward, arms: int, true: float) -> None:
    """A look after every unit, while shares follow what is seen."""
    rng = np.random.default_rng(7)
    plan = plan_of(tuple("abcd"[:arms]))
    missed = 0
    for _ in range(EXPERIMENTS):
        found = difference_of(run(plan, 200, reward, rng))
        missed += bool(((found.low > true) | (found.high < true)).any())
    assert missed / EXPERIMENTS <= simulated.ALPHA


def test_with_even_shares_it_says_what_means_say() -> None:
    rng = np.random.default_rng(9)
    arm = rng.integers(0, 2, 4_000)
    value = rng.normal(5.0 + 0.2 * arm, 1.0)
    rho2 = mixture.precision(0.05, 4_000)
    found = weighted.difference(value, arm, np.full((arm.size, 2), 0.5), 0.05, rho2)
    plain = means.difference(means.arm_of_values(value[arm == 0]), means.arm_of_values(value[arm == 1]), 0.05, rho2)
    assert found.estimate[-1] == pytest.approx(float(plain.estimate), abs=0.01)
    assert found.high[-1] - found.low[-1] == pytest.approx(float(plain.high - plain.low), rel=0.05)
    assert found.log_e[-1] == pytest.approx(float(plain.log_e), rel=0.2)


def test_where_the_scale_begins_does_not_matter() -> None:
    found = run(plan_of(), 200, latencies(1.3), np.random.default_rng(11))
    here, far = difference_of(found), difference_of(replace(found, value=found.value + 1e6))
    assert far.estimate[-1] == pytest.approx(here.estimate[-1])
    assert far.low[-1] == pytest.approx(here.low[-1])


def test_nothing_is_said_before_each_arm_has_its_units() -> None:
    arm = np.array([0] * 500 + [1] * (means.FIRST_LOOK - 1) + [1])
    value = np.random.default_rng(10).normal(size=arm.size)
    found = weighted.difference(value, arm, np.full((arm.size, 2), 0.5), 0.05, 0.01)
    assert list(np.flatnonzero(found.is_ready)) == [arm.size - 1]
    assert np.isinf(found.high[:-1]).all()
