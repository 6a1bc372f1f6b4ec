"""Means of units that came to arms with probabilities that changed on the way, such as a bandit's.

An arm's mean is biased then, and compares units of other times. Each unit counts by the inverse of its propensity, the
probability with which it got its arm. That must have been fixed by what was seen of units that came before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gateway.experiments.analysis.means import FIRST_LOOK, fieller
from gateway.experiments.analysis.mixture import Bools, Floats, Ints, log_e_value, standard_errors

BASELINE, TREATMENT = 0, 1


@dataclass(frozen=True, slots=True)
class Difference:
    """Treatment less baseline, had all units come to either; an element for each unit, after which one may look."""

    baseline: Floats
    treatment: Floats
    estimate: Floats
    low: Floats
    high: Floats
    relative_low: Floats  # to the size of the baseline; -inf and inf where that may be 0
    relative_high: Floats
    log_e: Floats  # of the evidence against "no difference"
    is_ready: Bools


def difference(values: Floats, arms: Ints, propensities: Floats, alpha: float, rho2: float) -> Difference:
    """The interval around a difference of means, which holds at all looks at once, asymptotically.

    values: one per unit, in the order in which units came. arms: `BASELINE`, `TREATMENT` or another number, of units in
    neither, who belong to those that are spoken of. propensities: a row per unit, with the probabilities above 0 with
    which it was to get the baseline and the treatment. rho2: for all of these units.

    From each value the mean of its arm's earlier units is taken off before the weight and put back after it. That
    keeps the estimate unbiased and takes most of the weights' variance (Robins, Rotnitzky and Zhao 1994; Hadad 2021).

    source: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic
    confidence sequences", Annals of Statistics 52 (2024), theorem 2.5, for sums whose parts vary by what was before;
    Hadad, Hirshberg, Zhan, Wager and Athey, "Confidence intervals for policy evaluation in adaptive experiments", PNAS
    118 (2021), section 2. Relative: Fieller (1954), as in `means`.
    """
    units = np.arange(1.0, values.size + 1.0)
    zero = values[:1]  # or of an outcome that is far from 0 each arm's first unit would outweigh all others
    before, after = _Scores(values - zero, arms == BASELINE), _Scores(values - zero, arms == TREATMENT)
    m0 = np.cumsum(before.weighted(propensities[:, BASELINE])) / units + zero
    m1 = np.cumsum(after.weighted(propensities[:, TREATMENT])) / units + zero
    estimate = m1 - m0
    guesses = [(v0 / units**2, v1 / units**2) for v0, v1 in _variances(before, after, propensities)]
    error = np.sqrt(np.maximum(*(v0 + v1 for v0, v1 in guesses)))
    fewest = np.minimum(np.cumsum(arms == BASELINE), np.cumsum(arms == TREATMENT))
    ready = (fewest >= FIRST_LOOK) & (error > 0.0)
    boundary = standard_errors(units, alpha, rho2)
    width = np.where(ready, boundary * error, np.inf)
    z = np.divide(estimate, error, out=np.zeros_like(estimate), where=ready)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [fieller(m0, m1, boundary**2 * v0, boundary**2 * v1) for v0, v1 in guesses]
    least = np.minimum(*(low for low, _ in ratios)) - 1.0
    most = np.maximum(*(high for _, high in ratios)) - 1.0
    below_zero = m0 < 0.0
    return Difference(
        m0,
        m1,
        estimate,
        estimate - width,
        estimate + width,
        np.where(ready, np.where(below_zero, -most, least), -np.inf),
        np.where(ready, np.where(below_zero, -least, most), np.inf),
        np.where(ready, log_e_value(z, units, rho2), -np.inf),
        ready,
    )


def _variances(before: _Scores, after: _Scores, propensities: Floats) -> list[tuple[Floats, Floats]]:
    """Of the sums of both arms' parts until each unit, as weights let expect: Σ v₀/p₀ and Σ v₁/p₁, where values vary
    by v.

    What the parts themselves showed is less: an arm with a small share has few units that show how large its weight is.
    By that, a difference was called in 8 to 10 of 100 bandits without one. Here the larger of two guesses counts: that
    each arm varies as its units have so far, or that both vary alike, but not always as much. For the latter each unit
    of either arm stands for all, by the probability p₀ + p₁ that it is in one of them: v·(1/p₀ + 1/p₁) / (p₀ + p₁).
    """
    p0, p1 = propensities[:, BASELINE], propensities[:, TREATMENT]
    alike = (before.residual + after.residual) ** 2 / (p0 + p1)
    return [
        (before.variance() * np.cumsum(1.0 / p0), after.variance() * np.cumsum(1.0 / p1)),
        (np.cumsum(alike / p0), np.cumsum(alike / p1)),
    ]


class _Scores:
    """What an arm's own units had beyond the mean of those before them, and what it would have had of each unit."""

    def __init__(self, values: Floats, is_own: Bools) -> None:
        own = np.where(is_own, values, 0.0)
        self._units = np.cumsum(is_own, dtype=np.float64)
        self._before = (np.cumsum(own) - own) / np.maximum(self._units - is_own, 1.0)
        self.residual: Floats = np.where(is_own, values - self._before, 0.0)

    def weighted(self, propensity: Floats) -> Floats:
        """One value per unit. Given all units before, its mean is what the arm would have of this one."""
        return np.asarray(self._before + self.residual / propensity)

    def variance(self) -> Floats:
        """Of the arm's values, as its units until each unit showed."""
        return np.asarray(np.cumsum(self.residual**2) / np.maximum(self._units, 1.0))
