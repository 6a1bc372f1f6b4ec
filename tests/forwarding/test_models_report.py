"""However a request ends, it is reported once, with the status that its caller gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from reports import Reports
from tritonclient.grpc import service_pb2 as pb

from gateway.deadline import Deadline
from gateway.errors import BadInput, BadRequest, Bug, MalformedMessage, NoTarget, UnknownModel
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.inference import Inference
from gateway.forwarding.messages import build_request, build_response
from gateway.forwarding.models import Models
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import CallObserver
from gateway.routing import Routes
from gateway.status import Code
from gateway.steps import PipelineSpec, build_pipeline
from gateway.types import Served

NOW = 100.0
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1]}


class World:
    """A pipeline, `same`, that calls a model which ends as told."""

    def __init__(self, threads: Threads) -> None:
        self.error: BaseException | None = None
        self.reports = Reports()
        spec = PipelineSpec.model_validate({"inputs": [TENSOR], "outputs": [TENSOR], "steps": [{"call": "m"}]})
        pipeline = build_pipeline("same", spec, lambda _: b"")
        model = PipelineModel(pipeline, threads, self.call, lambda _: True)
        topology = Topology(Routes(), {}, {"same": model})
        inference = Inference(CurrentTopology(topology), self.reports, Sequences(idle=1, most=1), clock=lambda: NOW)
        self.models = Models(inference)

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        if self.error is not None:
            raise self.error
        body = build_response("m", "3", "", {"x": ("FP32", np.ones((1, 1), np.float32))})
        return Reply(body, (), (), Served("m", "v", "3", "a:1", 2))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with Threads(1, 1) as threads:
        yield World(threads)


def request(model: str = "same", **fields: Any) -> Request:
    body = build_request(model, {"x": np.ones((1, 1), np.float32)}, id="r-1")
    return Request(body, metadata_from_pairs([("x-user", " me ")]), peer="ipv4:127.0.0.1:5", **fields)


async def test_a_good_call_is_reported_with_what_is_known_of_it(world: World) -> None:
    asked = request()
    reply = await world.models.infer(asked)
    (started,), (ended,) = world.reports.started, world.reports.ended
    assert (started.method, started.model, started.known, started.request_id) == ("ModelInfer", "same", True, "r-1")
    assert (started.peer, started.at, started.facts.metadata) == ("ipv4:127.0.0.1:5", NOW, {"x-user": "me"})
    assert (ended.code, ended.served) == (Code.OK, Served("same", "v", "3", "a:1", 2))
    assert (ended.request_bytes, ended.response_bytes) == (len(asked.body), len(reply.body))


async def test_an_error_is_reported_as_the_caller_gets_it(world: World) -> None:
    world.error = NoTarget("nobody")
    with pytest.raises(NoTarget):
        await world.models.infer(request())
    assert [(end.code, end.text, end.served) for end in world.reports.ended] == [(Code.UNAVAILABLE, "nobody", None)]


async def test_a_bug_is_logged_and_its_text_stays_here(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.error = ZeroDivisionError("secret")
    with pytest.raises(Bug) as caught:
        await world.models.infer(request())
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text
    assert [end.code for end in world.reports.ended] == [Code.INTERNAL]


@pytest.mark.parametrize(
    ("deadline", "code"),
    [(None, Code.CANCELLED), (Deadline(NOW + 1), Code.CANCELLED), (Deadline(NOW), Code.DEADLINE_EXCEEDED)],
    ids=["no deadline", "time left", "no time left"],
)
async def test_a_caller_whose_time_is_up_did_not_just_go_away(
    world: World, deadline: Deadline | None, code: Code
) -> None:
    world.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await world.models.infer(request(deadline=deadline))
    assert [end.code for end in world.reports.ended] == [code]


async def test_an_invented_name_is_told_as_unknown(world: World) -> None:
    with pytest.raises(UnknownModel):
        await world.models.infer(request("cats"))
    assert [(start.model, start.known) for start in world.reports.started] == [("cats", False)]
    assert [end.code for end in world.reports.ended] == [Code.NOT_FOUND]


async def test_what_is_refused_before_it_is_a_request_is_reported_too(world: World) -> None:
    def refuse() -> None:
        with world.models.refusals(request(method="Classify"), "same"):
            raise BadInput("item is missing")

    with pytest.raises(BadInput):
        refuse()
    assert [(start.method, start.model, start.known) for start in world.reports.started] == [("Classify", "same", True)]
    assert [(end.code, end.text) for end in world.reports.ended] == [(Code.INVALID_ARGUMENT, "item is missing")]


async def test_a_parameter_that_cannot_be_read_is_reported_once_and_its_callers_fault(world: World) -> None:
    for model in ("same", "m"):
        body = pb.ModelInferRequest(model_name=model).SerializeToString() + b"\x22\x03\x0a\x01\xff"
        with pytest.raises(BadRequest, match=r"A parameter of the request cannot be read: .* UTF-8"):
            await world.models.infer(Request(body))
    assert [start.model for start in world.reports.started] == ["same", "m"]
    assert [end.code for end in world.reports.ended] == [Code.INVALID_ARGUMENT] * 2


async def test_bytes_that_are_no_request_are_reported_without_a_model(world: World) -> None:
    with pytest.raises(MalformedMessage):
        await world.models.infer(Request(b"\xff"))
    assert [(start.model, start.known) for start in world.reports.started] == [("", False)]
    assert [end.code for end in world.reports.ended] == [Code.INTERNAL]
