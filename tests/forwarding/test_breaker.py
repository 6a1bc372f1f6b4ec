"""How a variant loses its calls and gets them back."""

from __future__ import annotations

import random

from gateway.forwarding.breaker import CALM_SECONDS, Breaker, BreakerState


def share(breaker: Breaker, now: float) -> float:
    return sum(breaker.admits(now, number / 1000, True) for number in range(1000)) / 1000


def test_a_variant_that_nothing_can_serve_gets_no_call() -> None:
    breaker = Breaker()
    assert share(breaker, 1.0) == 1.0
    assert not breaker.admits(1.0, 0.0, False)
    assert breaker.state is BreakerState.TRIPPED


def test_it_gets_a_tenth_until_some_calls_went_well_and_then_more_and_more() -> None:
    breaker = Breaker()
    breaker.trip(100.0)
    assert share(breaker, 200.0) == 0.1
    assert breaker.state is BreakerState.PROBING
    assert share(breaker, 300.0) == 0.1
    for _ in range(3):
        breaker.succeeded()
    breaker.trip(300.0)
    assert share(breaker, 400.0) == 0.1  # anew
    for _ in range(3):
        breaker.succeeded()
    shares = [share(breaker, 400.0 + seconds) for seconds in (1, 3, 5, 9, 11)]
    assert shares == sorted(shares)
    assert shares[0] < 0.25
    assert shares[-1] == 1.0
    assert breaker.state is BreakerState.ADMITTING


def test_one_that_is_back_at_once_gets_at_most_half_until_things_were_calm() -> None:
    breaker = Breaker()
    breaker.trip(100.0)
    breaker.admits(101.0, 0.99, True)
    for _ in range(3):
        breaker.succeeded()
    assert share(breaker, 100.0 + CALM_SECONDS - 1) == 0.5
    assert share(breaker, 100.0 + CALM_SECONDS + 1) == 1.0


def test_however_a_server_comes_and_goes_callers_see_two_changes_in_half_a_minute_at_most() -> None:
    chance = random.Random(5)
    for mean in (0.5, 3.0, 12.0, 40.0):
        breaker, now, is_open, until = Breaker(), 0.0, True, 0.0
        had_most, changes = True, []
        while now < 2000:
            if now >= until:
                is_open, until = not is_open, now + chance.expovariate(1 / mean)
            if breaker.admits(now, chance.random(), is_open):
                breaker.succeeded()
            has_most = breaker.share(now) > 0.5
            if has_most is not had_most:
                changes.append(now)
                had_most = has_most
            now += 0.05
        assert all(third - first >= CALM_SECONDS for first, third in zip(changes, changes[2:], strict=False))
        assert changes
