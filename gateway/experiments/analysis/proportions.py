"""Proportions: a confidence sequence by betting, exact from the first unit on, however rare what is counted.

A gambler who knows the shares of the arms bets on each unit's outcome before it is seen. Under "the rates of both arms
lie on this line" the bets are fair, so what the gambler owns is a martingale: that it grows from 1 to 1/alpha has
probability alpha at most, at whatever time (Ville's inequality). The interval is all lines on which it has not.

source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024), for the
betting; Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional
stopping", Journal of Statistical Planning and Inference 230 (2024), for two arms and the projection on a line.

A unit's value may also be any number in [0, 1], and the arms' means are compared. It counts as that part of a hit and
the rest of none: win ** x * loss ** (1 - x) is at most x * win + (1 - x) * loss, so the bets are fair or worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gateway.experiments.analysis.mixture import Bools, Floats

_GRID = 17
_ZOOMS = 5
_HALVINGS = 34  # so that a bet is unfair by 1e-10 at most
_ALMOST_ONE = 1.0 - 1e-9  # a line needs some room between 0 and 1
_PLANNED = 100.0  # units that a planned share is worth beside what was seen
_MOST_LOG_RATIO = 16.0  # of two rates: a larger or smaller one is none


@dataclass(frozen=True, slots=True)
class Counts:
    """What was seen in one arm, block after block of both arms' units."""

    units: Floats
    hits: Floats  # or sums of values in [0, 1]


def block_ends(units: int) -> list[int]:
    """After which units the gambler thinks again: each 8, then each tenth more. Fixed, so that no look chooses it."""
    ends = []
    end = 0
    while end < units:
        end = min(units, end + max(8, end // 10))
        ends.append(end)
    return ends


def in_blocks(is_treated: Bools, hits: Bools | Floats) -> tuple[Counts, Counts]:
    """Baseline's and treatment's counts of units in the order of their exposure. hits: or values in [0, 1]."""
    ends = block_ends(is_treated.size)

    def count(chosen: Bools | Floats) -> Floats:
        upto = np.concatenate(([0.0], np.cumsum(chosen, dtype=np.float64)))[[0, *ends]]
        return np.asarray(np.diff(upto))

    return (
        Counts(count(~is_treated), count(~is_treated * hits)),
        Counts(count(is_treated), count(is_treated * hits)),
    )


def expected_shares(arms: tuple[Counts, Counts], planned: float) -> Floats:
    """The treatment's share in each block, as the plan and the blocks before it tell.

    For outcomes that only some units have, and in one arm perhaps more of them than in the other.
    """
    before, treated = _before(arms[0].units), _before(arms[1].units)
    return np.asarray((treated + _PLANNED * planned) / (before + treated + _PLANNED))[:, None]


@dataclass(frozen=True, slots=True)
class Bets:
    """What the gambler stakes in one block: logarithms of the factors of a hit and of none, by arm."""

    win: tuple[Floats, Floats]
    loss: tuple[Floats, Floats]


def bets(before: tuple[Counts, Counts], share: float | Floats, line: tuple[Floats, Floats], rho2: float) -> Bets:
    """Bets against "the treatment's rate is intercept + slope · the baseline's", from what was seen before.

    before: sums of all earlier blocks. share: of the treatment, in (0, 1), or by block. line: intercepts and slopes.

    With c the point of the line that is nearest to the rates seen so far (Kullback-Leibler, weighted by shares), a
    unit of arm a that hits multiplies by 1 + λa·(1 - ca), and another by 1 - λa·ca, where the λ are so that
    Σ shareₐ·λa·slopeₐ = 0. The true rates, being on the line, are cₐ + h·slopeₐ for some h, so the factor's mean is
    1 + h·Σ shareₐ·λa·slopeₐ = 1, whichever h is true. Little is staked while little is known: by the share of the
    evidence that the normal mixture would have, so that both need about as many units.
    """
    shares = (1.0 - share, share)
    intercept, slope = line
    seen = before[0].units + before[1].units
    pooled = (before[0].hits + before[1].hits + 0.5) / (seen + 1.0)
    rates = [(arm.hits + pooled) / (arm.units + 1.0) for arm in before]
    trust = seen * rho2 / (seen * rho2 + 1.0)
    nearest = _nearest((rates[0], rates[1]), shares, intercept, slope)
    win, loss = [], []
    for rate, on_line in zip(rates, nearest, strict=True):
        believed = on_line + trust * (rate - on_line)
        win.append(np.log(believed / on_line))
        loss.append(np.log((1.0 - believed) / (1.0 - on_line)))
    return Bets((win[0], win[1]), (loss[0], loss[1]))


def _nearest(
    rates: tuple[Floats, Floats], shares: tuple[float | Floats, float | Floats], intercept: Floats, slope: Floats
) -> tuple[Floats, Floats]:
    """The point of the line that minimises Σ shareₐ·KL(rateₐ ‖ cₐ), by halving; the derivative rises along the line."""
    low = np.maximum(0.0, -intercept / slope) + np.zeros_like(rates[0])
    high = np.minimum(1.0, (1.0 - intercept) / slope) + np.zeros_like(rates[0])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        other = intercept + slope * middle
        rises = (
            shares[0] * (middle - rates[0]) / (middle * (1.0 - middle))
            + shares[1] * slope * (other - rates[1]) / (other * (1.0 - other))
        ) > 0.0
        high, low = np.where(rises, middle, high), np.where(rises, low, middle)
    middle = (low + high) / 2.0
    return middle, intercept + slope * middle


def log_e_value(arms: tuple[Counts, Counts], share: float | Floats, line: tuple[Floats, Floats], rho2: float) -> Floats:
    """The logarithm of what the gambler owns at the end, for each line."""
    earlier = [Counts(_before(arm.units)[:, None], _before(arm.hits)[:, None]) for arm in arms]
    with np.errstate(divide="ignore", invalid="ignore"):
        staked = bets((earlier[0], earlier[1]), share, line, rho2)
    total = np.zeros_like(line[0] + line[1])
    for arm, win, loss in zip(arms, staked.win, staked.loss, strict=True):
        total = total + arm.hits @ np.nan_to_num(win, nan=0.0) + (arm.units - arm.hits) @ np.nan_to_num(loss, nan=0.0)
    return total


def _before(counts: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(counts)[:-1]))


@dataclass(frozen=True, slots=True)
class Rates:
    """Treatment and baseline, and what lies between them."""

    baseline: float
    treatment: float
    low: float  # of the difference
    high: float
    relative_low: float
    relative_high: float
    log_e: float  # of the evidence against "no difference"


def difference(arms: tuple[Counts, Counts], share: float | Floats, alpha: float, rho2: float) -> Rates:
    """The intervals of the difference and of the ratio less 1, which hold at all looks at once.

    arms: baseline and treatment, by blocks (`in_blocks`). share: of the treatment, as
    planned, or by block as `expected_shares` says; not as it turned out.
    """
    rates = [float(arm.hits.sum() / arm.units.sum()) if arm.units.sum() else math.nan for arm in arms]
    if not all(math.isfinite(rate) for rate in rates):
        return Rates(rates[0], rates[1], -1.0, 1.0, -1.0, math.inf, 0.0)
    smoothed = [float((arm.hits.sum() + 0.5) / (arm.units.sum() + 1.0)) for arm in arms]
    starts = np.array([smoothed[1] - smoothed[0]] * 2 + [math.log(smoothed[1] / smoothed[0])] * 2)
    low, high, below, above = _edges(arms, share, alpha, rho2, starts)
    return Rates(
        rates[0],
        rates[1],
        low if low > -_ALMOST_ONE else -1.0,
        high if high < _ALMOST_ONE else 1.0,
        math.exp(below) - 1.0 if below > -_MOST_LOG_RATIO else -1.0,
        math.exp(above) - 1.0 if above < _MOST_LOG_RATIO else math.inf,
        float(log_e_value(arms, share, (np.zeros(1), np.ones(1)), rho2)[0]),
    )


def _edges(
    arms: tuple[Counts, Counts], share: float | Floats, alpha: float, rho2: float, starts: Floats
) -> list[float]:
    """Where what the gambler owns reaches 1/alpha: below and above, in the difference and in the ratio's logarithm.

    Each is looked for from the estimate outwards, in ever smaller parts, and put at the outer end of the last.
    """
    far = np.array([-_ALMOST_ONE, _ALMOST_ONE, -_MOST_LOG_RATIO, _MOST_LOG_RATIO])
    near, outer = np.clip(starts, np.minimum(far, -far), np.maximum(far, -far)), far.copy()
    is_ratio = np.array([False, False, True, True])[:, None]
    for zoom in range(_ZOOMS):
        # The first parts are smaller near the estimate, where the edge usually is.
        steps = np.linspace(0.0, 1.0, _GRID) ** (3 if zoom == 0 else 1)
        grid = near[:, None] + (outer - near)[:, None] * steps
        lines = np.where(is_ratio, 0.0, grid).ravel(), np.exp(np.where(is_ratio, grid, 0.0)).ravel()
        is_inside = (log_e_value(arms, share, lines, rho2) < math.log(1.0 / alpha)).reshape(grid.shape)
        last = np.where(is_inside.any(axis=1), _GRID - 1 - is_inside[:, ::-1].argmax(axis=1), 0)
        rows, following = np.arange(far.size), np.minimum(last + 1, _GRID - 1)
        near, outer = grid[rows, last], grid[rows, following]
    return [float(each) for each in outer]
