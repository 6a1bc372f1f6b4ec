"""What is kept from one request for the next, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.attempts import Attempt, Attempts
from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.batching.merge_point import maybe_merge_point
from gateway.forwarding.caller import CallerMetadata, metadata_from_pairs, metadata_of
from gateway.forwarding.exposures import Running
from gateway.forwarding.inference import Inference
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.forwarding.work import Work
from gateway.hooks import NoHooks, NoObserver
from gateway.routing import Arms, Direct, Key, Route, Routes, Split, Sticky
from gateway.rpc.requests import RequestHead
from gateway.status import Code
from gateway.types import Facts, Plan, Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

UNUSED: Any = None


def routes(model: str) -> Routes:
    return Routes([Route("m", (Variant("only", "u", model),), Split.all_to("only"))])


@pytest.fixture
def current() -> CurrentTopology:
    return CurrentTopology(Topology(routes("first"), {}))


@pytest.fixture
def inference(current: CurrentTopology) -> Inference:
    return Inference(current, NoHooks(), Sequences(idle=1, most=1))


def said() -> CallerMetadata:
    """What a header list says that calls share."""
    return metadata_of(RequestHead(b"/", (), b"", b"", None))


def request(id: str = "", note: str = "") -> bytes:
    message = pb.ModelInferRequest(model_name="m", id=id, raw_input_contents=[b"x"])
    if note:
        message.parameters["note"].string_param = note
    return bytes(message.SerializeToString())


def test_a_decision_is_shared_by_requests_with_one_head(inference: Inference) -> None:
    one = said()
    first, second = (inference.decision(one, inference.requests.peek(request())) for _ in range(2))
    assert second is first
    assert inference.decision(said(), inference.requests.peek(request())) is not first


def test_what_a_unit_of_an_experiment_met_is_looked_up_once_for_a_decision(
    inference: Inference, current: CurrentTopology
) -> None:
    variants = tuple(Variant(name, "u", name) for name in "ab")
    arms, sticky = Arms("spring", {"a": 1.0, "b": 1.0}, "a", "l"), Sticky((Key("metadata", "x-user"),), "salt")
    current.now = Topology(Routes([Route("m", variants, Split.all_to("a"), sticky, experiments=(arms,))]), {})
    running = Running("spring", "m", arms.reason, frozenset("ab"), (("errors", "error"),))
    inference.exposures.apply([running])
    anna = metadata_of(RequestHead(b"/", ((b"x-user", b"anna"),), b"", b"", None))

    def call() -> None:
        decision = inference.decision(anna, inference.requests.peek(request()))
        exposed = inference.exposed(inference.begin(decision, NoObserver(), ""), decision)
        assert exposed is not None
        inference.exposures.ended(exposed, Code.OK, None, False, 10)

    for _ in range(3):
        call()
    assert [each.unit for each in inference.exposures.take().exposures] == ["anna"]
    assert [each.tallies["anna"].values for each in inference.exposures.take_measured()] == [{(0, 0.0): 3}]
    inference.exposures.forget()
    call()
    assert [each.unit for each in inference.exposures.take().exposures] == ["anna"]


def test_routing_is_asked_once_about_a_request_that_has_no_likes(
    current: CurrentTopology, inference: Inference
) -> None:
    """Its draw is part of the decision; of those that are alike each has its own."""
    variants = (Variant("a", "u", "m"), Variant("b", "u", "m"))
    route = Route("m", variants, Split((("a", 0.5), ("b", 0.5))))
    current.now = Topology(Routes([route]), {})
    alone, alike = (inference.decision(said(), inference.requests.peek(request(id))).plan for id in ("7", ""))
    assert alone is not None
    assert alone.reason == "split"
    assert alike is None


def test_nothing_is_kept_of_requests_that_have_no_likes(inference: Inference) -> None:
    """Else callers could make the gateway keep what they like, and as much of it."""
    one = said()
    for body in (request(id="7"), request(note="n" * 100_000)):
        inference.decision(one, inference.requests.peek(body))
    assert not inference._decisions


def test_nothing_is_kept_of_metadata_that_no_other_call_shares(inference: Inference) -> None:
    head = inference.requests.peek(request())
    inference.decision(metadata_from_pairs(()), head)
    assert not inference._decisions


def test_only_so_many_decisions_are_kept(inference: Inference) -> None:
    head = inference.requests.peek(request())
    for _ in range(3000):
        inference.decision(said(), head)
    assert len(inference._decisions) <= 1024


def test_a_reload_ends_all_decisions(current: CurrentTopology, inference: Inference) -> None:
    one, head = said(), inference.requests.peek(request())
    before = inference.decision(one, head)
    current.now = replace(current.now, routes=routes("second"))
    after = inference.decision(one, head)
    assert [each.plan.targets[0].model for each in (before, after) if each.plan] == ["first", "second"]
    assert len(inference._decisions) == 1


def test_names_that_a_caller_makes_up_give_no_model_a_new_budget_for_retries(
    inference: Inference, current: CurrentTopology
) -> None:
    """Else whoever spoils it would have it anew, and its servers would get more retries than they should."""
    endpoint = Endpoint("u", "t:1", UNUSED)
    endpoint.state = State.READY
    known = [Route("m", (Variant("only", "u", "net"),), Split.all_to("only"))]
    current.now = Topology(Routes(known, direct=Direct.ALL, default_upstream="u"), {"u": Pool("u", [endpoint])})
    inference.clock, metadata = lambda: 1000.0, said()

    def call(model: str) -> None:
        body = bytes(pb.ModelInferRequest(model_name=model).SerializeToString())
        work = inference.begin(inference.decision(metadata, inference.requests.peek(body)), NoObserver(), "")
        attempt = inference.maybe_next(work)
        assert attempt is not None
        inference.attempt_started(work, attempt)

    for _ in range(1000):
        call("m")
    before = inference.retries_left()
    for number in range(3000):
        call(f"no {number}")
    assert inference.retries_left() == before == {"m": 300}


async def test_public_models_before_one_triton_model_are_merged_by_their_own_settings() -> None:
    endpoint = Endpoint("u", "t:1", UNUSED)
    attempt = Attempt(Variant("only", "u", "net"), endpoint, 1, "only", "")
    few, many = MergeSettings(rows=4), MergeSettings(rows=64)
    points = [maybe_merge_point(*each, "") for each in (("a", attempt, few), ("b", attempt, many)) * 2]
    assert points[0] is points[2]
    assert points[1] is points[3]
    assert points[0] is not points[1]
    assert maybe_merge_point("a", attempt, many, "") is not points[0]  # reloaded


async def test_a_version_that_the_server_is_not_known_to_have_is_merged_with_nothing() -> None:
    """Else callers could make the gateway remember as many as they invent."""
    endpoint = Endpoint("u", "t:1", UNUSED)
    attempt = Attempt(Variant("only", "u", "net"), endpoint, 1, "only", "")
    for version in range(1000):
        assert maybe_merge_point("a", attempt, MergeSettings(), str(version)) is None
    assert len(endpoint.remembered) == 1


def test_a_call_that_wants_its_variant_and_no_other_gets_it_whatever_the_breaker_says() -> None:
    gpu, cpu = Variant("gpu", "gpu", "net"), Variant("cpu", "cpu", "net")
    endpoints = {name: Endpoint(name, f"{name}:1", UNUSED) for name in ("gpu", "cpu")}
    pools = {name: Pool(name, [endpoint]) for name, endpoint in endpoints.items()}
    route = Route("m", (gpu, cpu), split=Split.all_to("gpu"))
    current = CurrentTopology(Topology(Routes([route]), pools))
    inference = Inference(current, NoHooks(), Sequences(idle=1, most=1), clock=lambda: 100.0, draw=lambda: 0.99)

    def first(*targets: Variant) -> str:
        work = Work(
            route, inference.requests.peek(request()), Facts(), Attempts(Plan(targets, "split"), pools, 3), NoObserver()
        )
        attempt = inference.maybe_next(work)
        return attempt.variant.name if attempt is not None else "none"

    endpoints["gpu"].state = State.DOWN
    assert first(gpu, cpu) == "cpu"
    assert inference.circuits.breaker_state("m", "gpu") == "tripped"
    assert first(gpu) == "none"
    endpoints["gpu"].state = State.READY
    assert first(gpu, cpu) == "cpu"  # it is probing, and this call was not drawn
    assert inference.circuits.breaker_state("m", "gpu") == "probing"
    assert first(gpu) == "gpu"
    endpoints["cpu"].state = State.DOWN
    assert first(gpu, cpu) == "gpu"
