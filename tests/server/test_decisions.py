"""What the forwarded path keeps from one request for the next, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forward.channel import WireChannel
from gateway.hooks import NoHooks
from gateway.infer.attempts import Attempt
from gateway.infer.inference import Inference
from gateway.infer.models import Models
from gateway.infer.sequences import Sequences
from gateway.infer.topology import Topology
from gateway.merge import MergeSettings
from gateway.routing import Route, Routes, Split
from gateway.server.calls import CallLimits
from gateway.server.merging import maybe_merge_point
from gateway.server.relay import Relay, _read
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint

UNUSED: Any = None


def routes(model: str) -> Routes:
    return Routes([Route("m", (Variant("only", "u", model),), Split.all_to("only"))])


@pytest.fixture
def relay() -> Relay:
    inference = Inference(Topology(routes("first"), {}), NoHooks(), Sequences(idle=1, most=1))
    return Relay(Models(inference), CallLimits())


def request(id: str = "", note: str = "") -> bytes:
    message = pb.ModelInferRequest(model_name="m", id=id, raw_input_contents=[b"x"])
    if note:
        message.parameters["note"].string_param = note
    return bytes(message.SerializeToString())


def test_a_decision_is_shared_by_requests_with_one_head(relay: Relay) -> None:
    said = _read(())
    first, second = (relay.decision(said, relay.requests.peek(request())) for _ in range(2))
    assert second is first
    assert relay.decision(_read(()), relay.requests.peek(request())) is not first


def test_nothing_is_kept_of_requests_that_have_no_likes(relay: Relay) -> None:
    """Else callers could make the gateway keep what they like, and as much of it."""
    said = _read(())
    for body in (request(id="7"), request(note="n" * 100_000)):
        relay.decision(said, relay.requests.peek(body))
    assert not relay._decisions


def test_only_so_many_decisions_are_kept(relay: Relay) -> None:
    head = relay.requests.peek(request())
    for _ in range(3000):
        relay.decision(_read(()), head)
    assert len(relay._decisions) <= 1024


def test_a_reload_ends_all_decisions(relay: Relay) -> None:
    said, head = _read(()), relay.requests.peek(request())
    before = relay.decision(said, head)
    relay.inference.topology = replace(relay.inference.topology, routes=routes("second"))
    after = relay.decision(said, head)
    assert [each.plan.targets[0].model for each in (before, after) if each.plan] == ["first", "second"]
    assert len(relay._decisions) == 1


async def test_public_models_before_one_triton_model_are_merged_by_their_own_settings() -> None:
    endpoint = Endpoint("u", "t:1", UNUSED)
    attempt = Attempt(Variant("only", "u", "net"), endpoint, 1, "only", "")
    few, many = MergeSettings(rows=4), MergeSettings(rows=64)
    channel = WireChannel("t:1")
    points = [
        maybe_merge_point(*each, "") for each in (("a", attempt, channel, few), ("b", attempt, channel, many)) * 2
    ]
    assert points[0] is points[2]
    assert points[1] is points[3]
    assert points[0] is not points[1]
    assert maybe_merge_point("a", attempt, channel, many, "") is not points[0]  # reloaded


async def test_a_version_that_the_server_is_not_known_to_have_is_merged_with_nothing() -> None:
    """Else callers could make the gateway remember as many as they invent."""
    endpoint = Endpoint("u", "t:1", UNUSED)
    attempt = Attempt(Variant("only", "u", "net"), endpoint, 1, "only", "")
    for version in range(1000):
        assert maybe_merge_point("a", attempt, WireChannel("t:1"), MergeSettings(), str(version)) is None
    assert len(endpoint.remembered) == 1
