"""When an endpoint counts as worse than its peers, for how long, and what lets it back in."""

from __future__ import annotations

import math
import random

import pytest

from gateway.upstream.outlier import (
    FIRST_SECONDS,
    MOST_SECONDS,
    SURE,
    TRIAL_CALLS,
    TRIAL_GAP,
    Record,
    evidence,
    expected_share,
)


@pytest.mark.parametrize(("calls", "failed", "p"), [(20, 20, 0.3), (50, 30, 0.4), (10, 1, 0.05), (200, 40, 0.1)])
def test_the_bound_is_one(calls: int, failed: int, p: float) -> None:
    """Chance makes so many fail no more often than it says."""
    chance = random.Random(1)
    draws = 4000
    hits = sum(sum(chance.random() < p for _ in range(calls)) >= failed for _ in range(draws))
    assert hits / draws <= math.exp(-evidence(calls, failed, p)) + 0.02


def test_no_more_failures_than_expected_are_no_evidence() -> None:
    assert evidence(100, 10, 0.1) == 0.0
    assert evidence(100, 0, 0.1) == 0.0
    assert evidence(0, 0, 0.5) == 0.0


def test_what_is_expected_is_what_the_better_half_of_the_peers_does() -> None:
    assert expected_share([]) == 0.5
    assert expected_share([(98, 0)]) == 0.01
    assert expected_share([(98, 0), (500, 500)]) == 0.01
    assert expected_share([(48, 4), (50, 5), (70, 70)]) == 0.1
    assert expected_share([(0, 0)]) == 0.5


def test_a_run_of_failures_shows_soon_beside_a_good_peer_and_never_beside_one_that_fails_too() -> None:
    record, count = Record(), 0
    while not record.is_outlier(0.02, 1.0):
        record.failed(1.0)
        count += 1
    assert 3 <= count <= 6
    for _ in range(10_000):
        record.failed(1.0)
    assert not record.is_outlier(0.95, 1.0)


def test_a_fifth_of_failures_shows_within_a_hundred_calls() -> None:
    record = Record()
    for number in range(100):
        if number % 5:
            record.succeeded(1.0)
        else:
            record.failed(1.0)
    assert record.is_outlier(0.01, 1.0)
    assert not record.is_outlier(0.12, 1.0)  # a difference of less than a tenth is none that matters


def test_what_was_long_ago_does_not_count() -> None:
    record = Record()
    for _ in range(20):
        record.failed(1.0)
        record.succeeded(1.0)
    assert record.counts(5.0) == (40, 20)
    assert record.counts(20.0) == (0, 0)
    assert not record.is_outlier(0.01, 20.0)


def test_it_is_out_for_longer_each_time_until_it_was_well_for_long() -> None:
    record, now, lengths = Record(), 0.0, []
    for _ in range(9):
        lengths.append(record.eject(now))
        now += lengths[-1]
        assert record.may_try(now)
    assert lengths[:4] == [FIRST_SECONDS, 10.0, 20.0, 40.0]
    assert lengths[-1] == MOST_SECONDS
    assert record.eject(now + 3600) < 2 * FIRST_SECONDS


def test_on_trial_it_gets_single_calls_that_decide() -> None:
    record = Record()
    record.eject(0.0)
    assert not record.may_try(FIRST_SECONDS - 0.1)
    assert not record.succeeded(1.0)  # of a call begun before: no trial
    now = FIRST_SECONDS
    for number in range(TRIAL_CALLS):
        assert record.may_try(now)
        assert not record.may_try(now + TRIAL_GAP / 2)
        assert record.succeeded(now) is (number == TRIAL_CALLS - 1)
        now += TRIAL_GAP
    assert not record.is_ejected


def test_on_trial_few_failures_are_enough_unless_the_peers_fail_as_much() -> None:
    record = Record()
    record.eject(0.0)
    record.may_try(FIRST_SECONDS)
    record.failed(FIRST_SECONDS)
    assert record.is_outlier(0.02, FIRST_SECONDS)
    assert not record.is_outlier(0.5, FIRST_SECONDS)


def test_one_that_is_out_is_not_judged_by_calls_that_were_begun_before() -> None:
    record = Record()
    record.eject(0.0)
    for _ in range(100):
        record.failed(0.1)
    assert not record.is_outlier(0.01, 0.1)


def test_one_that_was_started_anew_is_tried_at_once() -> None:
    record = Record()
    record.eject(0.0)
    record.pardon(1.0)
    assert record.may_try(1.0)
    assert record.is_ejected


def test_the_evidence_that_is_asked_for_is_a_millionth() -> None:
    assert math.exp(-SURE) == pytest.approx(1e-6, rel=0.05)
