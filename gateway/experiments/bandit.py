"""A bandit: Thompson sampling on a reported reward, in epochs, of which each is for units that had no arm before it.

How units come to epochs, and why they stay there, is said in `epochs`. To share units out by the probability that an
arm is the best one is Thompson sampling: the unit's hash is the draw. That probability is integrated and not sampled,
so that the shares follow from what was seen and from nothing else.

The probability with which a unit got its arm, its propensity, is the arm's share in the unit's epoch. It depends on no
unit of that epoch or a later one, which is what makes the data fit for analysis (`analysis.weighted`). An arm's mean
would mislead, here as there: where rewards rise in the evening, whichever arm has the larger share by then looks good.

source: Thompson, "On the likelihood that one unknown probability exceeds another", Biometrika 25 (1933); in batches:
Chapelle and Li, "An empirical evaluation of Thompson sampling", NIPS 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.special import ndtr, ndtri

from gateway.experiments.analysis.means import FIRST_LOOK
from gateway.experiments.analysis.mixture import Floats
from gateway.experiments.epochs import Epoch
from gateway.experiments.plan import BanditPlan, Better

_POINTS: Final = 1_024  # of each arm's posterior; the shares are right within their reciprocal
_LEAST_SPREAD: Final = 1e-9  # of a posterior, beside the largest mean, so that nothing is divided by 0


@dataclass(frozen=True, slots=True)
class Tally:
    """The rewards of one arm's units in one epoch, one for each unit that counts."""

    units: int = 0
    total: float = 0.0
    squares: float = 0.0


def shares(plan: BanditPlan, epochs: Sequence[Epoch], seen: Sequence[Mapping[str, Tally]]) -> dict[str, float]:
    """What is best shared out by after these epochs and their rewards; even until enough is known of each arm.

    seen: rewards by epoch and arm, of units that have had their time to be rewarded, or the arm that is rewarded sooner
    looks better.
    """
    count = len(plan.arms)
    believed = _believed(plan, epochs, seen)
    best = np.full(count, 1.0 / count) if believed is None else probabilities_of_best(*believed)
    return {arm: plan.floor + (1.0 - count * plan.floor) * float(p) for arm, p in zip(plan.arms, best, strict=True)}


def _believed(
    plan: BanditPlan, epochs: Sequence[Epoch], seen: Sequence[Mapping[str, Tally]]
) -> tuple[Floats, Floats] | None:
    """The mean and the standard deviation of what is believed of each arm, higher being better; None if too little is.

    Each unit counts by its inverse propensity, so that all arms are judged by the same mixture of epochs, and by the
    central limit theorem what is believed is about normal (Hájek's estimator and its linearised variance). An arm that
    has not shown its spread, such as one without a hit, is taken to spread as all arms do together.
    """
    tallies = [[each.get(arm, Tally()) for arm in plan.arms] for each in seen]
    # By epoch and arm.
    propensity = np.array([[epoch.shares[arm] for arm in plan.arms] for epoch, _ in zip(epochs, seen, strict=True)])
    units = np.array([[tally.units for tally in row] for row in tallies], np.float64)
    total = np.array([[tally.total for tally in row] for row in tallies], np.float64)
    squares = np.array([[tally.squares for tally in row] for row in tallies], np.float64)
    if not seen or units.sum(axis=0).min() < FIRST_LOOK:
        return None
    weight = (units / propensity).sum(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (total / propensity).sum(axis=0) / weight
        residual = np.maximum(squares - 2.0 * mean * total + mean * mean * units, 0.0)  # squared, summed
        own = (residual / propensity**2).sum(axis=0)
        pooled = residual.sum() / units.sum() * (units / propensity**2).sum(axis=0)
        spread = np.sqrt(np.maximum(own, pooled)) / weight
    if not (np.isfinite(mean).all() and np.isfinite(spread).all()):
        return None
    return (mean if plan.reward.better is Better.HIGHER else -mean), spread


def probabilities_of_best(mean: Floats, spread: Floats) -> Floats:
    """The probability that each of some independent normal variables is the largest of them; the sum is 1."""
    spread = np.maximum(spread, _LEAST_SPREAD * (np.abs(mean).max() or 1.0))
    quantiles = ndtri((np.arange(_POINTS) + 0.5) / _POINTS)
    best = np.empty(mean.size)
    for arm in range(mean.size):
        others = np.arange(mean.size) != arm
        points = mean[arm] + spread[arm] * quantiles[:, None]
        best[arm] = ndtr((points - mean[others]) / spread[others]).prod(axis=1).mean()
    return np.asarray(best / best.sum())
