"""What an endpoint knows of itself: calls in flight, and what failures say of it."""

from __future__ import annotations

import asyncio

import pytest
from scripted import ScriptedConnection

from gateway.status import Code, Origin, Verdict, classify
from gateway.upstream.endpoint import Endpoint, FailedCall, State
from gateway.upstream.known import MOST_KNOWN

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
UNREACHABLE = classify(Code.UNAVAILABLE, "no connection", Origin.CONNECTION)
DRAINING = classify(Code.UNAVAILABLE, STOPPING)
OVERLOADED = classify(Code.UNAVAILABLE, "Exceeds maximum queue size")
MODEL_GONE = classify(Code.NOT_FOUND, "Request for unknown model: 'm' is not found", model="m")
UNCLEAR = classify(Code.UNAVAILABLE, "the feature store is gone")
CALLERS = classify(Code.INVALID_ARGUMENT, "bad")


@pytest.fixture
def endpoint() -> Endpoint:
    made = Endpoint("main", "a:1", ScriptedConnection())
    made.state = State.READY
    made.models = {("m", ""): True, ("n", "3"): True}
    return made


async def test_waiting_for_idle_ends_with_the_last_call(endpoint: Endpoint) -> None:
    await endpoint.wait_idle()  # nothing is in flight
    endpoint.in_flight += 1
    endpoint.in_flight += 1
    waits = [asyncio.ensure_future(endpoint.wait_idle()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    endpoint.in_flight -= 1
    await asyncio.sleep(0.1)
    assert not any(wait.done() for wait in waits[1:])
    endpoint.in_flight -= 1
    await asyncio.wait_for(asyncio.gather(*waits[1:]), 60)


FAILURES = {  # the verdict; the state after it; can `m` still be served; is a probe to come soon
    "unreachable": (UNREACHABLE, State.SUSPECT, True, True),
    "draining": (DRAINING, State.READY, True, True),  # a model may say so in the words of a caller
    "model gone": (MODEL_GONE, State.READY, True, True),
    "unclear": (UNCLEAR, State.READY, True, True),
    "overloaded": (OVERLOADED, State.READY, True, False),
    "the caller's": (CALLERS, State.READY, True, False),
}


@pytest.mark.parametrize(("verdict", "state", "serves", "probes"), FAILURES.values(), ids=FAILURES)
def test_a_failure_says_of_its_endpoint(
    endpoint: Endpoint, verdict: Verdict, state: State, serves: bool, probes: bool
) -> None:
    """It never keeps other calls away by itself: only a probe does."""
    suspicions: list[bool] = []
    endpoint.on_suspicion = lambda: suspicions.append(True)
    endpoint.failed(("m", ""), verdict, "text")
    assert (endpoint.state, endpoint.can_serve("m", ""), bool(suspicions)) == (state, serves, probes)
    assert endpoint.can_serve("n", "3") is (state is not State.DOWN)


def test_a_version_that_a_caller_invented_says_nothing_of_the_model(endpoint: Endpoint) -> None:
    endpoint.failed(("m", "99"), MODEL_GONE, "text")
    assert endpoint.can_serve("m", "")


def test_a_model_that_nobody_watches_may_be_there(endpoint: Endpoint) -> None:
    assert endpoint.can_serve("other", "")


def test_a_down_endpoint_is_not_brought_back_by_another_failure(endpoint: Endpoint) -> None:
    endpoint.state, endpoint.reason = State.DOWN, "stopping"
    endpoint.failed(("m", ""), UNREACHABLE, "refused")
    assert (endpoint.state, endpoint.reason) == (State.DOWN, "stopping")


def test_how_calls_went_is_kept_of_so_many_models_and_no_more() -> None:
    endpoint = Endpoint("u", "a:1", ScriptedConnection())
    endpoint.eject("first", "", 1.0)
    for number in range(MOST_KNOWN + 100):
        endpoint.succeeded(f"m{number}", "", 1.0)
    assert len(endpoint.records) <= MOST_KNOWN
    assert not endpoint.is_ejected("first", "")


def test_the_calls_that_end_with_a_server_s_death_are_one_failure(endpoint: Endpoint) -> None:
    lost = classify(Code.UNAVAILABLE, "gone", Origin.LOST)
    for _ in range(50):
        endpoint.counts_against(FailedCall("m", "", lost, 1.0))
        endpoint.failed(("m", ""), lost, "gone")
    assert endpoint.record("m", "").counts(1.0) == (1, 1)


def test_a_server_that_was_started_again_is_judged_anew(endpoint: Endpoint) -> None:
    for _ in range(9):
        endpoint.counts_against(FailedCall("m", "", classify(Code.INTERNAL, "CUDA error"), 1.0))
    endpoint.pardon(2.0)
    assert endpoint.record("m", "").counts(2.0) == (0, 0)
    assert not endpoint.record("m", "").is_doubtful
