"""A bandit: Thompson sampling on a reported reward, in epochs, of which each is for units that had no arm before it.

Units are cut into slices by their hash. An epoch opens one slice, with shares that are fixed from then on, so a unit
keeps its arm for good, and whoever knows the epochs knows the arm without having seen the unit. Units of slices that
are not open yet have the baseline, and are in no data. With the last slice all are in, and nothing moves any more.
What that costs: a unit that comes late may fall into an early slice, and is shared out by what little was known then.

To share units out by the probability that an arm is the best one is Thompson sampling: the unit's hash is the draw.
That probability is integrated and not sampled, so that the shares follow from what was seen and from nothing else.

The probability with which a unit got its arm, its propensity, is the arm's share in the unit's epoch. It depends on no
unit of that epoch or a later one, which is what makes the data fit for analysis (`analysis.weighted`). An arm's mean
would mislead, here as there: where rewards rise in the evening, whichever arm has the larger share by then looks good.

How epochs are kept, and how shares come into force, is for others. An epoch is written once and never again.

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
from gateway.experiments.plan import Better

_POINTS: Final = 1_024  # of each arm's posterior; the shares are right within their reciprocal
_LEAST_SPREAD: Final = 1e-9  # of a posterior, beside the largest mean, so that nothing is divided by 0


@dataclass(frozen=True, slots=True)
class BanditPlan:
    """A bandit as one plans it.

    :raises ValueError: if there are not two arms, the baseline is none, or floors leave nothing to move
    """

    name: str
    arms: tuple[str, ...]
    baseline: str  # what units of slices that are not open have
    better: Better  # in which direction the reward is better
    floor: float  # the least share of each arm, above 0: what is never tried is never known
    slices: int  # of equal size, an epoch each
    epoch: float  # least seconds of each

    def __post_init__(self) -> None:
        if len(set(self.arms)) != len(self.arms) or len(self.arms) < 2 or self.baseline not in self.arms:
            raise ValueError("a bandit has at least two arms, each once, and one of them is the baseline")
        if not 0.0 < self.floor < 1.0 / len(self.arms):
            raise ValueError(f"the floor of {len(self.arms)} arms is above 0 and below {1.0 / len(self.arms):.4g}")
        if self.slices < 1 or not self.epoch > 0.0:
            raise ValueError("a bandit has at least one slice, and epochs of more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Epoch:
    """A slice of the units, and what they are shared out by. Never changed."""

    shares: Mapping[str, float]  # by arm; the sum is 1
    since: float  # Unix time


@dataclass(frozen=True, slots=True)
class Tally:
    """The rewards of one arm's units in one epoch, one for each unit that counts."""

    units: int = 0
    total: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True, slots=True)
class Bandit:
    """A plan and the epochs so far, the oldest first.

    Of two that know another number of epochs both say the same of each unit that both know to be in.
    """

    plan: BanditPlan
    epochs: tuple[Epoch, ...] = ()

    def maybe_epoch(self, place: float) -> int | None:
        """In which epoch a unit came in, from 0; None while its slice is not open.

        place: of the unit, from a hash of its key that chooses nothing else; uniform in [0, 1)
        """
        number = int(place * self.plan.slices)
        return number if number < len(self.epochs) else None

    def propensity(self, place: float, arm: str) -> float:
        """The probability with which a unit gets that arm."""
        number = self.maybe_epoch(place)
        if number is None:
            return 1.0 if arm == self.plan.baseline else 0.0
        return self.epochs[number].shares[arm]

    def is_due(self, now: float) -> bool:
        """Is it time for another epoch? Clocks that differ make an epoch longer or shorter, and nothing else."""
        if len(self.epochs) >= self.plan.slices:
            return False
        return not self.epochs or now - self.epochs[-1].since >= self.plan.epoch

    def following(self, seen: Sequence[Mapping[str, Tally]], now: float) -> Epoch:
        """The next epoch. seen: rewards by epoch, the oldest first, and by arm.

        They are of units that have had their time to be rewarded, or the arm that is rewarded sooner looks better.
        """
        return Epoch(shares(self.plan, self.epochs, seen), now)


def shares(plan: BanditPlan, epochs: Sequence[Epoch], seen: Sequence[Mapping[str, Tally]]) -> dict[str, float]:
    """What is best shared out by after these epochs and their rewards; even until enough is known of each arm."""
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
    return (mean if plan.better is Better.HIGHER else -mean), spread


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
