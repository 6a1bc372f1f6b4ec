"""Pipelines are compared with what their models are now: who is asked, and what is logged once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.contracts import Contracts
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Route, Routes, Split
from gateway.status import Code
from gateway.steps import PipelineSpec, build_pipeline
from gateway.types import Variant
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


class Triton:
    """Says what its model is; or fails, as told."""

    def __init__(self, datatype: str = "FP32") -> None:
        self.datatype = datatype
        self.fails = False
        self.asked: list[str] = []

    async def unary(self, path: str, body: bytes, metadata: Any, timeout: float | None) -> Answer:
        method = path.rpartition("/")[2]
        self.asked.append(method)
        if self.fails:
            raise CallFailed(Code.UNAVAILABLE, "gone")
        if method == "ModelConfig":
            config = pb.ModelConfigResponse()
            config.config.max_batch_size = 16
            return Answer(config.SerializeToString(), (), ())
        told = pb.ModelMetadataResponse(name="net")
        told.inputs.add(name="x", datatype=self.datatype, shape=[-1, 1])
        told.outputs.add(name="y", datatype="FP32", shape=[-1, 1])
        return Answer(told.SerializeToString(), (), ())


class World:
    """Pipeline `p` calls the public model `m`, whose variants are the `tritons`, one endpoint each."""

    def __init__(self, *tritons: Triton) -> None:
        x, y = ({"name": name, "datatype": "FP32", "shape": [1]} for name in "xy")
        spec = PipelineSpec.model_validate({"inputs": [x], "outputs": [y], "steps": [{"call": "m"}]})

        async def nobody(*_: Any) -> Any:
            raise AssertionError("no call is made")

        self.pipeline = PipelineModel(build_pipeline("p", spec, lambda _: b""), Threads(1, 1), nobody, lambda _: True)
        names = [f"v{n}" for n in range(len(tritons))]
        variants = tuple(Variant(name, name, "net") for name in names)
        routes = Routes([Route("m", variants, Split(tuple((name, 1) for name in names)))])
        self.endpoints = [Endpoint(name, "t:1", triton) for name, triton in zip(names, tritons, strict=True)]
        for endpoint in self.endpoints:
            endpoint.state = State.READY
        pools = {endpoint.upstream: Pool(endpoint.upstream, [endpoint]) for endpoint in self.endpoints}
        topology = Topology(routes, pools, {"p": self.pipeline})
        self.contracts = Contracts(CurrentTopology(topology))

    async def mismatches(self) -> tuple[str, ...]:
        await self.contracts.compare()
        return self.pipeline.mismatches


async def test_a_pipeline_that_fits_has_no_mismatch() -> None:
    assert await World(Triton()).mismatches() == ()


async def test_one_variant_that_differs_is_named() -> None:
    (mismatch,) = await World(Triton(), Triton("INT64")).mismatches()
    assert "variant 'v1'" in mismatch
    assert "INT64" in mismatch


async def test_a_mismatch_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    triton = Triton("INT64")
    world = World(triton)
    with caplog.at_level(logging.INFO):
        await world.mismatches()
        await world.mismatches()
        triton.datatype = "FP32"
        assert await world.mismatches() == ()
        await world.mismatches()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


async def test_who_is_not_ready_is_not_asked_and_who_does_not_answer_is_not_blamed() -> None:
    resting, failing = Triton("INT64"), Triton("INT64")
    failing.fails = True
    world = World(resting, failing)
    world.endpoints[0].state = State.DOWN
    assert await world.mismatches() == ()
    assert resting.asked == []
    assert failing.asked
