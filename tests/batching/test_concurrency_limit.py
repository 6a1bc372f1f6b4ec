"""How many merged requests are in flight: as many as throughput is best with, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from gateway.forwarding.batching import ConcurrencyLimit


def run_batches(limit: ConcurrencyLimit, rate_of: Callable[[int], float], seconds: float, start: float = 0.0) -> float:
    """Let time pass with batches of 10 rows at the throughput that a number in flight gives."""
    now = start
    while now < start + seconds:
        now += 10 / rate_of(limit.allowed)
        limit.ended(10, True, now)
    return now


def test_the_window_grows_while_throughput_does() -> None:
    limit = ConcurrencyLimit(8, 0.0)
    run_batches(limit, lambda allowed: 1000 * min(allowed, 3), 60)
    assert limit.allowed in (3, 4)  # 3 is best, and 4 may be on trial just now


def test_the_window_stays_at_one_where_more_gains_nothing() -> None:
    limit = ConcurrencyLimit(8, 0.0)
    now = run_batches(limit, lambda allowed: 1000.0, 1)
    ones = sum(limit.allowed == 1 for _ in range(200) if (now := run_batches(limit, lambda _: 1000.0, 0.3, now)))
    assert ones > 180


def test_the_window_shrinks_again_when_the_model_gets_cheaper() -> None:
    limit = ConcurrencyLimit(8, 0.0)
    now = run_batches(limit, lambda allowed: 1000 * min(allowed, 4), 60)
    run_batches(limit, lambda allowed: 1000.0, 120, now)
    assert limit.allowed <= 2


def test_a_trial_that_fails_is_short_and_the_next_is_later_each_time() -> None:
    limit, now = ConcurrencyLimit(8, 0.0), 0.0
    trials: list[float] = []
    while now < 150:
        before = limit.allowed
        now = run_batches(limit, lambda allowed: 1000.0 / allowed, 0.05, now)
        if before == 1 and limit.allowed == 2 and (not trials or now - trials[-1] > 5):
            trials.append(now)
    gaps = [after - before for before, after in pairwise(trials)]
    assert [round(gap / 15) for gap in gaps] == [1, 2, 4]


def test_a_pause_of_the_callers_decides_nothing() -> None:
    limit = ConcurrencyLimit(8, 0.0)
    now = run_batches(limit, lambda allowed: 1000.0 * allowed, 0.6)
    for _ in range(12):
        limit.ended(10, False, now)
        now = run_batches(limit, lambda allowed: 1000.0 * min(allowed, 3), 1.0, now + 5.0)
    assert limit.allowed in (3, 4)


@pytest.mark.parametrize(("rate_of", "best"), [(lambda n: 1000 / n**0.2, 1), (lambda n: 1000 * min(n, 3), 3)])
def test_the_window_finds_its_place_although_rates_move_by_a_third(rate_of: Callable[[int], float], best: int) -> None:
    chance = Random(7)  # of callers that come and go, and of a machine that does other things
    limit = ConcurrencyLimit(4, 0.0)
    now, at_best = 0.0, 0
    for _ in range(2400):  # ten minutes
        factor = chance.uniform(0.7, 1.3)
        now = run_batches(limit, lambda allowed, factor=factor: factor * rate_of(allowed), 0.25, now)
        at_best += abs(limit.allowed - best) < (1 if best == 1 else 2)
    assert at_best > 0.75 * 2400
