"""The fast lane tells a broken variant from an outage that both have, whatever their shares."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.experiments.crowd import KINDS, PLACES, Crowd
from gateway.experiments.fast_lane import FastLane
from gateway.experiments.rollout import Calls

WELL, BROKEN = 0.01, 1.0  # chances that a call is bad


def calls(rng: np.random.Generator, rate: float, broken: float) -> Crowd:
    """Of one look. broken: the part of it, at its end or its beginning, in which all calls are bad."""
    made = rng.poisson(rate)
    bad = int(rng.binomial(made, broken + (1.0 - broken) * WELL))
    return Crowd(Calls(good=int(made) - bad, errors=bad))


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
            bad += new.calls.bad
            assert looks < 10_000
        each = max(rate * share, 1.0)  # of a look
        assert bad <= 24 + 8 * each


def test_variants_that_are_well_are_left_alone() -> None:
    rng = np.random.default_rng(9)
    lane = FastLane()
    for _ in range(5_000):
        lane.add(calls(rng, 20.0, 0.0), calls(rng, 20.0, 0.1))
        assert not lane.is_believed


def test_a_variant_that_stays_broken_after_both_were_is_found() -> None:
    lane = FastLane()
    for _ in range(600):
        lane.add(Crowd(Calls(errors=50)), Crowd(Calls(errors=50)))
    assert (lane.is_believed, *(each.is_raised for each in lane.evidence)) == (False, True, True)
    for _ in range(2):
        lane.add(Crowd(Calls(good=50)), Crowd(Calls(errors=50)))
    assert lane.is_believed


def of(*calls_of: tuple[int, int, int]) -> Crowd:
    """What callers did in a look, each a place, and his good and bad calls. He is one unit."""
    good, bad = [0] * (KINDS * PLACES), [0] * (KINDS * PLACES)
    for who, well, badly in calls_of:
        for place in (who, PLACES + who):
            good[place] += well
            bad[place] += badly
    sums = Calls(good=sum(good) // KINDS, errors=sum(bad) // KINDS)
    return Crowd(sums, good, bad)


@pytest.mark.parametrize("rate", [0.5, 20.0])
@pytest.mark.parametrize("flood", [1, 1_000])
def test_one_caller_who_fails_nearly_all_calls_takes_nothing_back_from_the_others(rate: float, flood: int) -> None:
    """However much he calls: beside him three callers are well, with one failure in a hundred."""
    rng = np.random.default_rng(10)
    believed = 0
    for _ in range(10):
        lane = FastLane()
        for _ in range(500):
            met = rng.integers(1, 4, size=rng.poisson(rate))
            honest = [(int(who), 1, 0) if rng.random() > WELL else (int(who), 0, 1) for who in met]
            lane.add(of((5, 20, 0)), of((0, 0, flood), *honest))
            believed += lane.is_believed
        lane.add(of((5, 20, 0)), of((0, 0, flood), (1, 1, 0), (2, 1, 0), (3, 1, 0)))
        assert lane.after.log_e == 0.0  # nor does he hold the rollout up
    assert not believed


def test_one_caller_who_fails_at_the_old_variant_does_not_hide_that_the_new_one_is_broken() -> None:
    lane, looks = FastLane(), 0
    while not lane.is_believed:
        lane.add(of((0, 0, 500), (1, 3, 0), (2, 3, 0)), of((3, 0, 1), (4, 0, 1)))
        looks += 1
        assert looks < 20


@pytest.mark.parametrize("rate", [1, 50])
def test_one_caller_who_is_all_there_is_is_believed_within_seconds(rate: int) -> None:
    lane, looks = FastLane(), 0
    for _ in range(30):  # it was well before
        lane.add(of((0, 1, 0)), of((0, rate, 0)))
    while not lane.is_believed:
        lane.add(of((0, 1, 0)), of((0, 0, rate)))
        looks += 1
        assert looks < 20
    assert looks <= max(2, 14 // rate + 1)


def test_the_first_caller_of_a_broken_variant_is_believed_though_nobody_else_has_called_yet() -> None:
    lane, looks = FastLane(), 0
    while not lane.is_believed:
        lane.add(Crowd(Calls()), of((0, 0, 3)))
        looks += 1
        assert looks < 12


def test_whoever_is_the_only_one_at_the_new_variant_is_believed_after_half_a_minute() -> None:
    lane, looks = FastLane(), 0
    while not lane.is_believed:
        lane.add(of((1, 30, 0), (2, 30, 0)), of((0, 0, 3)))
        looks += 1
        assert looks < 40
    assert looks > 20


def test_two_callers_of_whom_one_calls_far_more_are_believed_when_both_fail() -> None:
    lane, looks = FastLane(), 0
    while not lane.is_believed:
        lane.add(of((3, 20, 0)), of((0, 0, 20), (1, 0, looks % 2)))
        looks += 1
        assert looks < 12


def test_one_caller_for_whose_failures_the_variant_is_left_alone_takes_nothing_back_either() -> None:
    """Another answers meanwhile in its place, whoever calls; a call on trial now and then fails, since it is his."""
    lane = FastLane()
    for look in range(600):
        tried = of((0, 0, int(look % 20 == 0)), *([(1, 3, 0)] if look < 20 else []))
        left = Crowd(tried.calls.plus(Calls(left_alone=30)), tried.good, tried.bad)
        lane.add(of((1, 9, 0), (2, 9, 0)), left)
        assert not lane.is_believed


def test_a_broken_variant_that_is_left_alone_is_found_by_what_it_did_before() -> None:
    lane = FastLane()
    lane.add(of((1, 9, 0), (2, 9, 0)), of((3, 0, 5), (4, 0, 4)))
    for _ in range(3):
        none = of((3, 0, 0))
        lane.add(of((1, 9, 0), (2, 9, 0)), Crowd(Calls(left_alone=5), none.good, none.bad))
    assert lane.is_believed
