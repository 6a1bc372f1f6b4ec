"""The fast lane tells a broken variant from an outage that both have, whatever their shares."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.experiments.fast_lane import FastLane
from gateway.experiments.rollout import Calls

WELL, BROKEN = 0.01, 1.0  # chances that a call is bad


def calls(rng: np.random.Generator, rate: float, broken: float) -> Calls:
    """Of one look. broken: the part of it, at its end or its beginning, in which all calls are bad."""
    made = rng.poisson(rate)
    bad = int(rng.binomial(made, broken + (1.0 - broken) * WELL))
    return Calls(good=int(made) - bad, errors=bad)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rate", [3.0, 30.0, 1_000.0])
def test_an_outage_of_both_is_no_fault_of_the_new_one(share: float, rate: float) -> None:
    """Hundreds of outages of any length, which begin and end anywhere between two looks."""
    rng = np.random.default_rng(7)
    believed = 0
    for _ in range(100):
        lane = FastLane()
        length = int(rng.integers(1, 40))
        parts = [0.0] * 5 + [rng.random()] + [1.0] * length + [rng.random()] + [0.0] * 20
        was = False
        for part in parts:
            lane.add(calls(rng, rate * (1.0 - share), part), calls(rng, rate * share, part))
            was |= lane.is_believed
        believed += was
    # Of an old variant that has no call in seconds nothing can be known; then all go back, which is the safe side.
    assert believed <= (100 if rate * (1.0 - share) < 1.0 else 2), believed


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rate", [3.0, 30.0, 1_000.0])
def test_a_new_variant_that_breaks_is_found_soon(share: float, rate: float) -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        lane, looks, bad = FastLane(), 0, 0
        while not lane.is_believed:
            new = calls(rng, rate * share, BROKEN)
            lane.add(calls(rng, rate * (1.0 - share), 0.0), new)
            looks += 1
            bad += new.bad
            assert looks < 10_000
        each = max(rate * share, 1.0)  # of a look
        assert bad <= 24 + 8 * each


def test_variants_that_are_well_are_left_alone() -> None:
    rng = np.random.default_rng(9)
    lane = FastLane()
    for _ in range(20_000):
        lane.add(calls(rng, 20.0, 0.0), calls(rng, 20.0, 0.1))
        assert not lane.is_believed


def test_a_variant_that_stays_broken_after_both_were_is_found() -> None:
    lane = FastLane()
    for _ in range(600):
        lane.add(Calls(errors=50), Calls(errors=50))
    assert (lane.is_believed, *(each.is_raised for each in lane.evidence)) == (False, True, True)
    for _ in range(2):
        lane.add(Calls(good=50), Calls(errors=50))
    assert lane.is_believed
