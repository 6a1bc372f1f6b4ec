"""Many experiments at once, with a look after every unit: how often is a difference called, when, and is it covered?

The functions that are judged are the product's own; only what makes the data and walks the looks is here. Seeds are
fixed. `EXPERIMENTS` is 2,000 in `make soak`, and fewer in `make test` where that takes long.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gateway.experiments.analysis import means, mixture, proportions, quantiles, sample_ratio

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

ALPHA = 0.05
IS_LONG = "SOAK_SECONDS" in os.environ
EXPERIMENTS = 2_000 if IS_LONG else 500
_AT_ONCE = 100
_ONE_BY_ONE = EXPERIMENTS if IS_LONG else 60  # of those that walk their looks by themselves
NEVER = 10**9

LATENCIES: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(1.0, 1.0, shape),
    "log-normal, σ = 1": lambda rng, shape: rng.lognormal(0.0, 1.0, shape),
    "log-normal, σ = 1.5": lambda rng, shape: rng.lognormal(0.0, 1.5, shape),
    "Pareto, tail 2.5": lambda rng, shape: 1.0 + rng.pareto(2.5, shape),
}


def _assigned(rng: np.random.Generator, count: int, units: int, share: float) -> NDArray[np.bool_]:
    return rng.random((count, units)) < share


def _running(values: Array, chosen: NDArray[np.bool_]) -> means.Arm:
    """An arm's mean and variance after every unit."""
    units = np.cumsum(chosen, axis=1).astype(np.float64)
    total = np.cumsum(np.where(chosen, values, 0.0), axis=1)
    squares = np.cumsum(np.where(chosen, values * values, 0.0), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / units
        variance = np.maximum(squares - units * mean * mean, 0.0) / (units - 1.0)
    return means.Arm(units, mean, variance)


def first_call(called: NDArray[np.bool_]) -> NDArray[np.int64]:
    """After how many units each experiment was called; NEVER if it was not."""
    return np.where(called.any(axis=1), called.argmax(axis=1) + 1, NEVER)


def of_means(
    draw: Draw,
    *,
    units: int,
    share: float = 0.5,
    factor: float = 1.0,
    mean: float = 0.0,
    expected: int = 10_000,
    seed: int,
) -> tuple[NDArray[np.int64], float]:
    """When a difference is called, and how often the interval ever misses `mean · (factor - 1)`.

    factor: what the treatment multiplies an outcome by.
    """
    rng = np.random.default_rng(seed)
    rho2 = mixture.precision(ALPHA, expected)
    calls, missed = [], 0
    for _ in range(EXPERIMENTS // _AT_ONCE):
        treated = _assigned(rng, _AT_ONCE, units, share)
        values = draw(rng, (_AT_ONCE, units)) * np.where(treated, factor, 1.0)
        found = means.difference(_running(values, ~treated), _running(values, treated), ALPHA, rho2)
        calls.append(first_call((found.low > 0.0) | (found.high < 0.0)))
        true = mean * (factor - 1.0)
        missed += int(((found.low > true) | (found.high < true)).any(axis=1).sum())
    return np.concatenate(calls), missed / EXPERIMENTS


def of_ratios(*, units: int, lift: float = 0.0, seed: int, as_if_independent: bool = False) -> NDArray[np.int64]:
    """When a difference of an error rate is called. Users have from 1 to many requests, and each a rate of his own.

    as_if_independent: treat each request as a unit, which is the mistake.
    """
    rng = np.random.default_rng(seed)
    rho2 = mixture.precision(ALPHA, 1_000)
    calls = []
    for _ in range(EXPERIMENTS // _AT_ONCE):
        treated = _assigned(rng, _AT_ONCE, units, 0.5)
        requests = 1.0 + rng.geometric(0.1, treated.shape)
        rate = np.minimum(rng.beta(0.5, 4.5, treated.shape) + lift * treated, 1.0)
        errors = rng.binomial(requests.astype(np.int64), rate).astype(np.float64)
        arms = [_running_ratio(errors, requests, chosen, as_if_independent) for chosen in (~treated, treated)]
        found = means.difference(arms[0], arms[1], ALPHA, rho2)
        calls.append(first_call((found.low > 0.0) | (found.high < 0.0)))
    return np.concatenate(calls)


def _running_ratio(over: Array, under: Array, chosen: NDArray[np.bool_], as_if_independent: bool) -> means.Arm:
    def total(values: Array) -> Array:
        return np.cumsum(np.where(chosen, values, 0.0), axis=1)

    units = total(np.ones_like(over))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = total(over) / total(under)
        if as_if_independent:
            return means.Arm(total(under), ratio, ratio * (1.0 - ratio))
        squares = total(over * over) - 2.0 * ratio * total(over * under) + ratio * ratio * total(under * under)
        return means.Arm(units, ratio, squares / (units - 1.0) / (total(under) / units) ** 2)


def wealth_of_proportions(
    treated: NDArray[np.bool_], hits: NDArray[np.bool_], share: float, true: float, expected: int
) -> Array:
    """What is bet against "the difference is `true`", after every unit, as a logarithm; a row per experiment."""
    count, units = treated.shape
    rho2 = mixture.precision(ALPHA, expected)
    line = (np.full(count, true), np.ones(count))
    before = [[np.zeros(count), np.zeros(count)] for _ in range(2)]  # units and hits of each arm
    wealth, start, level = np.empty((count, units)), 0, np.zeros(count)
    for end in proportions.block_ends(units):
        counts = (proportions.Counts(*before[0]), proportions.Counts(*before[1]))
        staked = proportions.bets(counts, share, line, rho2)
        t, h = treated[:, start:end], hits[:, start:end]
        win = np.where(t, staked.win[1][:, None], staked.win[0][:, None])
        loss = np.where(t, staked.loss[1][:, None], staked.loss[0][:, None])
        wealth[:, start:end] = level[:, None] + np.cumsum(np.where(h, win, loss), axis=1)
        level = wealth[:, end - 1]
        for arm, chosen in enumerate((~t, t)):
            before[arm] = [before[arm][0] + chosen.sum(axis=1), before[arm][1] + (chosen & h).sum(axis=1)]
        start = end
    return wealth


def of_proportions(
    rates: tuple[float, float], *, units: int, share: float = 0.5, true: float = 0.0, expected: int = 10_000, seed: int
) -> NDArray[np.int64]:
    """When "the difference is `true`" is rejected."""
    rng = np.random.default_rng(seed)
    treated = _assigned(rng, EXPERIMENTS, units, share)
    hits = rng.random(treated.shape) < np.where(treated, rates[1], rates[0])
    return first_call(wealth_of_proportions(treated, hits, share, true, expected) >= np.log(1.0 / ALPHA))


def of_quantiles(level: float, *, units: int, shift: float = 0.0, share: float = 0.5, seed: int) -> NDArray[np.int64]:
    """When the pair of true quantiles is rejected, which an interval that misses the true difference implies.

    Values are uniform in [0, 1), which says nothing less than any other distribution: only ranks count.
    """
    rng = np.random.default_rng(seed)
    treated = _assigned(rng, EXPERIMENTS, units, share)
    below = rng.random(treated.shape) <= level
    wealth = np.zeros(treated.shape)
    for chosen, part in ((~treated, 1.0 - share), (treated, share)):
        rho2 = mixture.precision(ALPHA, 10_000 * part)
        seen = np.cumsum(chosen, axis=1).astype(np.float64)
        wealth += quantiles.log_wealth(np.cumsum(chosen & below, axis=1).astype(np.float64), seen, level, rho2)
    return first_call(wealth >= np.log(1.0 / ALPHA))


def of_clustered_quantiles(
    level: float, *, units: int, looks: int, seed: int, factor: float = 1.0
) -> NDArray[np.int64]:
    """At which look a difference of a quantile of all requests is called, each user being fast or slow by himself."""
    rng = np.random.default_rng(seed)
    calls = []
    for _ in range(_ONE_BY_ONE):
        treated = rng.random(units) < 0.5
        requests = rng.geometric(0.2, units)
        owner = np.repeat(np.arange(units), requests)
        values = np.exp(rng.normal(0.0, 0.5, units)[owner] + rng.normal(0.0, 0.5, owner.size))
        values *= np.where(treated[owner], factor, 1.0)
        called = NEVER
        for look in np.linspace(units / looks, units, looks).astype(int):
            sides = []
            for chosen in (~treated, treated):
                own = chosen[owner] & (owner < look)
                sides.append(quantiles.of_clusters(owner[own], values[own], level, mixture.precision(ALPHA, 500)))
            found = quantiles.difference(sides[0], sides[1], ALPHA)
            if found.low > 0.0 or found.high < 0.0:
                called = int(look)
                break
        calls.append(called)
    return np.array(calls)


def of_late_reports(kind: str, *, units: int, looks: int, seed: int) -> NDArray[np.int64]:
    """At which look a difference is called where reports keep coming long after their unit did, and no window is said.

    Units come evenly over the time; a report comes after a third of it on average, and each look has what there is.
    """
    rng = np.random.default_rng(seed)
    rho2 = mixture.precision(ALPHA, units)
    calls = []
    for _ in range(_ONE_BY_ONE):
        treated = rng.random(units) < 0.5
        came = np.sort(rng.random(units))
        owner = np.repeat(np.arange(units), rng.geometric(0.3, units))
        reported = came[owner] + rng.exponential(1 / 3, owner.size)
        values = rng.lognormal(0.0, 1.0, units)[owner] * rng.lognormal(0.0, 0.5, owner.size)
        called = NEVER
        for look in np.linspace(1 / looks, 1.0, looks):
            count, known = int(np.searchsorted(came, look)), reported <= look
            evidence = (
                _late_hits(
                    treated[:count], np.bincount(owner[known & (values > 3.0)], minlength=units)[:count] > 0, rho2
                )
                if kind == "proportion"
                else _late_means(treated, owner[known], values[known], rho2)
            )
            if evidence >= np.log(1.0 / ALPHA):
                called = count
                break
        calls.append(called)
    return np.array(calls)


def _late_hits(treated: NDArray[np.bool_], hits: NDArray[np.bool_], rho2: float) -> float:
    arms = proportions.in_blocks(treated, hits)
    return float(proportions.log_e_value(arms, 0.5, (np.zeros(1), np.ones(1)), rho2)[0])


def _late_means(treated: NDArray[np.bool_], owner: NDArray[np.int64], values: Array, rho2: float) -> float:
    counts = np.bincount(owner, minlength=treated.size)
    mean = np.bincount(owner, weights=values, minlength=treated.size) / np.maximum(counts, 1)
    arms = [means.arm_of_values(mean[(counts > 0) & (treated == arm)]) for arm in (False, True)]
    return float(means.difference(arms[0], arms[1], ALPHA, rho2).log_e)


def of_sample_ratio(
    actual: tuple[float, ...], planned: tuple[float, ...], *, units: int, seed: int
) -> NDArray[np.int64]:
    """When the alarm goes off, at level ALPHA."""
    rng = np.random.default_rng(seed)
    calls = []
    for _ in range(EXPERIMENTS // _AT_ONCE):
        arms = rng.choice(len(actual), size=(_AT_ONCE, units), p=actual)
        counts = np.cumsum(np.eye(len(actual))[arms], axis=1)
        evidence = sample_ratio.log_e_value(counts, np.array(planned), 10_000)
        calls.append(first_call(evidence >= np.log(1.0 / ALPHA)))
    return np.concatenate(calls)


def rate(calls: NDArray[np.int64]) -> float:
    """Which part of the experiments was ever called."""
    return float((calls < NEVER).mean())
