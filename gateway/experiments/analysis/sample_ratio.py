"""Sample ratio: do as many units come to each arm as the plan says? A test that may be watched all the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln, logsumexp, xlogy

from gateway.experiments.analysis.mixture import Floats

_VAGUE = 2.0  # units' worth of prior per arm: finds at once what is grossly wrong

_TILTS = np.concatenate([sign * np.geomspace(0.01, 10.0, 24) for sign in (-1.0, 1.0)])  # logarithms of odds
_ODDS = np.expm1(_TILTS)


def p_value(counts: Sequence[float], shares: Sequence[float], expected: float) -> float:
    """At most x with probability x at most, whenever one looks, while units come as planned."""
    log_e = float(log_e_value(np.array(counts, np.float64), np.array(shares, np.float64), expected))
    return math.exp(min(0.0, -log_e))


def p_value_of_epochs(counts: Floats, shares: Floats) -> float:
    """The same where shares changed on the way. As `log_e_value_of_epochs`."""
    return math.exp(min(0.0, -log_e_value_of_epochs(counts, shares)))


def log_e_value_of_epochs(counts: Floats, shares: Floats) -> float:
    """The logarithm of the evidence against the shares that each epoch had, as a bandit's; valid at any time.

    counts, shares: a row for each epoch, with an element for each arm. The shares are above 0.

    What is looked for is that some arm gets more or less than it should by one factor of its odds in all epochs: it
    loses units, or has them twice. The likelihood ratio of each arm and factor is a martingale in whatever order units
    come, while their shares are true, and so is the average over arms and factors.
    """
    arms = shares.shape[1]
    each = [
        float(counts[:, arm].sum()) * _TILTS - (counts.sum(axis=1) @ np.log1p(np.outer(shares[:, arm], _ODDS)))
        for arm in range(arms)
    ]
    return float(logsumexp(np.concatenate(each)) - math.log(arms * _TILTS.size))


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
