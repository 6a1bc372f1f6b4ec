"""Where the next attempt goes. Endpoints are real ones, whose connection nobody uses: `Attempts` only decides."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.forwarding.attempts import Attempts
from gateway.status import Code, Origin, classify
from gateway.types import Plan, Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
UNREACHABLE = classify(Code.UNAVAILABLE, "no connection", Origin.CONNECTION)
DRAINING = classify(Code.UNAVAILABLE, STOPPING)
OVERLOADED = classify(Code.UNAVAILABLE, "Exceeds maximum queue size")
MODEL_GONE = classify(Code.NOT_FOUND, "Request for unknown model: 'x' is not found", model="x")


def pool(name: str, *addresses: str) -> Pool:
    unused: Any = None
    endpoints = [Endpoint(name, address, unused) for address in addresses]
    for endpoint in endpoints:
        endpoint.state = State.READY
    return Pool(name, endpoints)


def variant(name: str, upstream: str) -> Variant:
    return Variant(name, upstream, f"model-{name}")


def trail(attempts: Attempts, verdict: Any) -> list[str]:
    """All attempts of a call of which each fails like this: variant@endpoint:why."""
    made = []
    while (attempt := attempts.maybe_next()) is not None:
        made.append(f"{attempt.variant.name}@{attempt.endpoint.address}:{attempt.why}")
        assert attempt.number == len(made) == attempts.made
        attempts.failed(attempt, verdict)
    return made


GPU, CPU = variant("gpu", "gpus"), variant("cpu", "cpus")
GPU_THEN_CPU = Plan((GPU, CPU), "split")


def test_a_variants_endpoints_come_before_the_next_variant() -> None:
    attempts = Attempts(GPU_THEN_CPU, {"gpus": pool("gpus", "a", "b"), "cpus": pool("cpus", "c")}, 5)
    first, second, third = trail(attempts, UNREACHABLE)
    assert {first, second} in ({"gpu@a:split", "gpu@b:retry"}, {"gpu@b:split", "gpu@a:retry"})
    assert third == "cpu@c:fallback"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_there_are_never_more_attempts_than_allowed(most: int) -> None:
    attempts = Attempts(Plan((GPU,), "only"), {"gpus": pool("gpus", "a", "b", "c", "d")}, most)
    assert len(trail(attempts, OVERLOADED)) == most


def test_the_last_attempt_is_kept_for_a_variant_not_tried_yet() -> None:
    attempts = Attempts(GPU_THEN_CPU, {"gpus": pool("gpus", "a", "b", "c"), "cpus": pool("cpus", "d")}, 2)
    assert [made.partition("@")[0] for made in trail(attempts, OVERLOADED)] == ["gpu", "cpu"]


def test_the_last_attempt_is_kept_for_a_variant_on_the_same_endpoint() -> None:
    """Overload is one model's: another one on the same endpoint may have room."""
    shared = pool("gpus", "a", "b")
    big, small = variant("big", "gpus"), variant("small", "gpus")
    shared.endpoints[0].models = {(big.model, ""): True, (small.model, ""): True}
    shared.endpoints[1].models = {(big.model, ""): True, (small.model, ""): False}
    shared.endpoints[1].in_flight += 1  # so that `big` begins at `a`
    attempts = Attempts(Plan((big, small), "split"), {"gpus": shared}, 2)
    assert trail(attempts, OVERLOADED) == ["big@a:split", "small@a:fallback"]


def test_an_attempt_is_not_kept_for_a_variant_that_nothing_serves() -> None:
    down = pool("cpus", "c")
    down.endpoints[0].state = State.DOWN
    attempts = Attempts(GPU_THEN_CPU, {"gpus": pool("gpus", "a", "b"), "cpus": down}, 2)
    assert [made.partition("@")[0] for made in trail(attempts, OVERLOADED)] == ["gpu", "gpu"]


@pytest.mark.parametrize("verdict", [UNREACHABLE, DRAINING], ids=["unreachable", "draining"])
def test_an_endpoint_that_is_bad_is_bad_for_every_variant(verdict: Any) -> None:
    shared = pool("gpus", "a")
    attempts = Attempts(Plan((variant("x", "gpus"), variant("y", "gpus")), "split"), {"gpus": shared}, 5)
    assert trail(attempts, verdict) == ["x@a:split"]


@pytest.mark.parametrize("verdict", [OVERLOADED, MODEL_GONE], ids=["overloaded", "model gone"])
def test_an_endpoint_that_fails_one_model_may_serve_another(verdict: Any) -> None:
    shared = pool("gpus", "a")
    attempts = Attempts(Plan((variant("x", "gpus"), variant("y", "gpus")), "split"), {"gpus": shared}, 5)
    assert trail(attempts, verdict) == ["x@a:split", "y@a:fallback"]


def test_a_first_attempt_on_another_variant_says_that_it_is_a_fallback() -> None:
    down = pool("gpus", "a")
    down.endpoints[0].state = State.DOWN
    attempts = Attempts(GPU_THEN_CPU, {"gpus": down, "cpus": pool("cpus", "c")}, 3)
    assert trail(attempts, OVERLOADED) == ["cpu@c:fallback"]


def test_an_upstream_that_is_not_there_is_passed_over() -> None:
    assert trail(Attempts(GPU_THEN_CPU, {"cpus": pool("cpus", "c")}, 3), OVERLOADED) == ["cpu@c:fallback"]
    assert trail(Attempts(GPU_THEN_CPU, {}, 3), OVERLOADED) == []


def test_without_budget_for_retries_the_next_variant_is_tried() -> None:
    attempts = Attempts(GPU_THEN_CPU, {"gpus": pool("gpus", "a", "b"), "cpus": pool("cpus", "c")}, 5)
    assert attempts.maybe_next() is not None
    fallback = attempts.maybe_next(may_retry=False)
    assert fallback is not None
    assert fallback.variant is CPU
    assert attempts.maybe_next(may_retry=False) is None


def test_endpoints_that_are_ejected_are_asked_when_no_variant_has_others() -> None:
    pools = {"gpus": pool("gpus", "a", "b"), "cpus": pool("cpus", "c")}
    for endpoint in pools["gpus"].endpoints:
        endpoint.eject(GPU.model, "", time.monotonic())
    first = Attempts(GPU_THEN_CPU, pools, 5).maybe_next()
    assert first is not None
    assert first.variant is CPU
    pools["cpus"].endpoints[0].state = State.DOWN
    attempts = Attempts(GPU_THEN_CPU, pools, 5)
    panic = attempts.maybe_next()
    assert panic is not None
    assert panic.variant is GPU


def test_a_variant_that_is_put_off_comes_after_all_others() -> None:
    attempts = Attempts(GPU_THEN_CPU, {"gpus": pool("gpus", "a"), "cpus": pool("cpus", "c")}, 5)
    attempts.put_off_first()
    assert trail(attempts, OVERLOADED) == ["cpu@c:fallback", "gpu@a:fallback"]
