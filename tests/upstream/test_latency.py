"""How long an endpoint takes, as the choice weighs it."""

from __future__ import annotations

from gateway.upstream.latency import SLOWER, Latency


def of(*seconds: float, every: float = 1.0) -> Latency:
    latency = Latency()
    for number, each in enumerate(seconds):
        latency.observe(each, 100.0 + number * every)
    return latency


def test_one_that_became_slow_counts_as_slow_at_the_second_call() -> None:
    assert of(0.01, 0.01, 0.1).seconds == 0.01
    assert of(0.01, 0.01, 0.1, 0.1).seconds == 0.1


def test_one_large_request_makes_nobody_slow() -> None:
    assert of(0.01, 0.01, 5.0, 0.01, 0.01).seconds == 0.01


def test_it_falls_with_its_time_constant() -> None:
    before, after = of(0.1, 0.1, 0.01, every=5.0), of(0.1, 0.1, 0.01, 0.01, every=5.0)
    assert 0.04 < before.seconds < 0.05
    assert after.seconds < before.seconds


def test_what_differs_little_is_chance_and_what_is_unknown_is_no_reason() -> None:
    assert of(0.019, 0.019).slowness(of(0.01, 0.01)) == 1.0
    assert of(0.1, 0.1).slowness(of(0.1)) == 1.0
    assert of(0.1).slowness(of(0.1, 0.1)) == 1.0
    assert of(0.05, 0.05).slowness(of(0.01, 0.01)) == 5.0


def test_one_that_is_left_alone_is_less_slow_by_and_by() -> None:
    slow, peer = of(0.1, 0.1), of(0.01, 0.01)
    seen = []
    for now in range(102, 120, 3):
        peer.observe(0.01, float(now))
        seen.append(slow.slowness(peer))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 8
    assert seen[2] > SLOWER
    assert seen[3] == 1.0
