"""Sample ratio: do as many units come to each arm as the plan says? A test that may be watched all the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln, xlogy

from gateway.experiments.analysis.mixture import Floats

_VAGUE = 2.0  # units' worth of prior per arm: finds at once what is grossly wrong


def p_value(counts: Sequence[float], shares: Sequence[float], expected: float) -> float:
    """At most x with probability x at most, whenever one looks, while units come as planned."""
    log_e = float(log_e_value(np.array(counts, np.float64), np.array(shares, np.float64), expected))
    return math.exp(min(0.0, -log_e))


def log_e_value(counts: Floats, shares: Floats, expected: float) -> Floats:
    """The logarithm of the evidence against the shares; log(1/alpha) or more is an alarm with error rate alpha.

    counts: units by arm, on the last axis; any axes before it. shares: of the plan, each above 0; their sum is 1.
    expected: units that the plan expects, for which a second, narrow prior finds small deviations.

    Exact at every size: the average of two Dirichlet mixtures of the multinomial likelihood ratio, each of which is a
    martingale while the shares are true.

    source: Lindon and Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022, equation 5.
    """
    arms = shares.size
    return np.asarray(
        np.logaddexp(
            _of_prior(counts, shares, _VAGUE * arms * shares),
            _of_prior(counts, shares, max(arms, expected / 11) * shares),
        )
        - np.log(2.0)
    )


def _of_prior(counts: Floats, shares: Floats, prior: Floats) -> Floats:
    return np.asarray(
        gammaln(prior.sum())
        - gammaln(prior.sum() + counts.sum(axis=-1))
        + (gammaln(prior + counts) - gammaln(prior) - xlogy(counts, shares)).sum(axis=-1)
    )
