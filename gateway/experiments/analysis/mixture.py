"""The boundary that a sum of independent values crosses at any time with probability alpha at most, and its tuning.

A normal distribution over the possible effects is laid on the likelihood ratio (Robbins 1970). How wide it is says when
the boundary is at its narrowest, and has no influence on whether it holds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def precision(alpha: float, units: float) -> float:
    """The ρ² with which the boundary is about narrowest after so many units.

    It must be fixed before the experiment begins.

    source: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic
    confidence sequences", Annals of Statistics 52 (2024), appendix on the choice of ρ.
    """
    log = -2.0 * math.log(alpha)
    return (log + math.log(log + 1.0)) / units


def standard_errors(units: Floats, alpha: float, rho2: float) -> Floats:
    """Half the width of the confidence sequence, in standard errors of the estimate from so many units.

    Where a single look would take 1.96 at alpha = 0.05, this is about 3 around the units that it is tuned for.

    source: Waudby-Smith et al. (2024), theorem 2.2, divided by σ/√t.
    """
    seen = units * rho2
    with np.errstate(divide="ignore"):
        return np.sqrt(2.0 * (1.0 + 1.0 / seen) * np.log(np.sqrt(seen + 1.0) / alpha))


def log_e_value(z: Floats, units: Floats, rho2: float) -> Floats:
    """The logarithm of the evidence against "no effect" from an estimate that is `z` standard errors away from it.

    It reaches log(1/alpha) exactly where `standard_errors` reaches z.

    source: Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of Mathematical
    Statistics 41 (1970); Waudby-Smith et al. (2024), appendix on time-uniform p-values.
    """
    seen = units * rho2
    return 0.5 * z * z * seen / (seen + 1.0) - 0.5 * np.log1p(seen)


def units_until(per_unit: float, effect: float, alpha: float, rho2: float, power: float = 0.5) -> float:
    """After how many units an experiment with this effect has been called, with this probability; inf if never.

    per_unit: variance of the estimate times units, which stays about the same as units come.

    A lower bound of the power: it counts only who is beyond the boundary at that look, and not who was before.
    """
    if not effect or not math.isfinite(per_unit):
        return math.inf
    if per_unit <= 0.0:
        return 1.0
    z = float(ndtri(power))
    low, high = 1.0, 1.0

    def is_enough(units: float) -> bool:
        needed = float(standard_errors(np.float64(units), alpha, rho2)) + z  # type: ignore[arg-type]
        return abs(effect) >= needed * math.sqrt(per_unit / units)

    while not is_enough(high):
        low, high = high, high * 2.0
        if high > 1e15:
            return math.inf
    while high - low > 0.5 and high / low > 1.0005:
        middle = (low + high) / 2.0
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
