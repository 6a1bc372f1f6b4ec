"""Which endpoint of a pool gets a call."""

from __future__ import annotations

from collections import Counter

import pytest
from scripted import ScriptedConnection

from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


def pool(*states: State) -> Pool:
    """Endpoints a, b, c … in these states."""
    endpoints = []
    for address, state in zip("abcdef", states, strict=False):
        endpoint = Endpoint("main", address, ScriptedConnection())
        endpoint.state = state
        endpoints.append(endpoint)
    return Pool("main", endpoints)


def picks(of: Pool, times: int) -> list[str]:
    return [endpoint.address if (endpoint := of.maybe_pick("m", "")) else "-" for _ in range(times)]


READY, UNPROBED, SUSPECT, DOWN = State.READY, State.UNPROBED, State.SUSPECT, State.DOWN


def test_an_idle_pool_is_used_evenly() -> None:
    assert set(Counter(picks(pool(READY, READY, READY), 300)).values()) == {100}


def test_the_least_loaded_endpoint_is_picked() -> None:
    loaded = pool(READY, READY, READY)
    for endpoint, calls in zip(loaded.endpoints, (2, 1, 3), strict=True):
        for _ in range(calls):
            endpoint.begin()
    assert set(picks(loaded, 6)) == {"b"}


PREFERENCE = {
    "ready": ((READY, UNPROBED, SUSPECT, DOWN), "a"),
    "unprobed": ((UNPROBED, SUSPECT, DOWN), "a"),
    "suspect": ((SUSPECT, DOWN), "a"),
    "none": ((DOWN, DOWN), "-"),
    "a single one that is down": ((DOWN,), "-"),
    "a single suspect": ((SUSPECT,), "a"),
}


@pytest.mark.parametrize(("states", "picked"), PREFERENCE.values(), ids=PREFERENCE)
def test_a_better_state_is_preferred_to_less_load(states: tuple[State, ...], picked: str) -> None:
    of = pool(*states)
    for _ in range(9):
        of.endpoints[0].begin()
    assert set(picks(of, 4)) == {picked}
    assert of.is_available("m", "") is (picked != "-")


def test_an_endpoint_without_the_model_or_already_tried_is_passed_over() -> None:
    of = pool(READY, READY, READY)
    of.endpoints[0].models = {("m", ""): False}
    tried = {of.endpoints[1]}
    assert {of.maybe_pick("m", "", tried) for _ in range(4)} == {of.endpoints[2]}
    assert of.maybe_pick("m", "", {*tried, of.endpoints[2]}) is None
    assert of.maybe_pick("other", "", tried) in (of.endpoints[0], of.endpoints[2])


def test_an_endpoint_is_found_by_its_address() -> None:
    of = pool(READY, DOWN)
    assert of.maybe_find("b") is of.endpoints[1]
    assert of.maybe_find("z") is None
