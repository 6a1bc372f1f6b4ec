"""Many gateways, each of which chooses alone, over many endpoints."""

from __future__ import annotations

import random
from collections import Counter

from scripted import ScriptedConnection

from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


def test_a_thousand_gateways_spread_their_calls_over_ten_thousand_endpoints() -> None:
    """None knows what the others do. Twenty calls an endpoint: the busiest gets little more than by chance alone."""
    endpoints = [Endpoint("main", str(number), ScriptedConnection()) for number in range(10_000)]
    for endpoint in endpoints:
        endpoint.state = State.READY
    pool, calls = Pool("main", endpoints), Counter[str]()
    for _ in range(1000):
        mine = []
        for _ in range(200):  # as many in flight at each gateway
            picked = pool.maybe_pick("m", "")
            assert picked is not None
            picked.in_flight += 1
            mine.append(picked)
        for picked in mine:
            calls[picked.address] += 1
            picked.in_flight -= 1
    by_chance = Counter(random.choices(range(10_000), k=200_000))
    assert max(calls.values()) <= max(by_chance.values()) + 5
    assert len(calls) == 10_000
