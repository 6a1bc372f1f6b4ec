"""Whether a model is usable where it is tried out by inferences."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from scripted import ScriptedConnection
from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code, Origin
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.health import Prober, ProbeSettings
from gateway.upstream.inference_probe import ProbeInference, zeros

KEY = ("m", "")
CUDA = CallFailed(Code.INTERNAL, "CUDA error: an illegal memory access was encountered")
FULL = CallFailed(Code.UNAVAILABLE, "Exceeds maximum queue size")
WRONG = CallFailed(Code.INVALID_ARGUMENT, "unexpected shape for input 'IN'")
LATE = CallFailed(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", origin=Origin.GIVEN_UP)


@dataclass
class Inferring(ScriptedConnection):
    """Infers too."""

    outcome: CallFailed | None = None
    inferred: list[bytes] = field(default_factory=list)

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        if path.endswith("ModelMetadata"):
            answer = pb.ModelMetadataResponse()
            answer.inputs.add(name="IN", datatype="FP32", shape=[-1, 3])
            return Answer(answer.SerializeToString(), (), ())
        if not path.endswith("ModelInfer"):
            return await super().unary(path, body, metadata, timeout)
        self.inferred.append(body)
        await asyncio.sleep(0)
        if self.outcome is not None:
            raise self.outcome
        return Answer(pb.ModelInferResponse().SerializeToString(), (), ())


class Tried:
    """An endpoint whose model is tried out again and again."""

    def __init__(self, outcome: CallFailed | None, settings: ProbeInference) -> None:
        self.connection = Inferring(outcome=outcome)
        self.endpoint = Endpoint("main", "a:1", self.connection)
        probe = ProbeSettings(interval=0.001, inferences={KEY: settings})
        self.prober = Prober(self.endpoint, [KEY], probe, lambda _: None)

    @property
    def is_usable(self) -> bool:
        return self.endpoint.state is State.READY and self.endpoint.can_serve(*KEY)

    async def until(self, holds: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not holds():  # noqa: ASYNC110  (the point is what nobody is told)
                await asyncio.sleep(0.001)

        await asyncio.wait_for(wait(), 60)

    async def more(self, count: int) -> None:
        """So many more inferences have ended, and a probe after them."""
        target = len(self.connection.inferred) + count
        await self.until(lambda: len(self.connection.inferred) >= target)
        probes = len(self.connection.asked)
        await self.until(lambda: len(self.connection.asked) >= probes + 4)


@contextlib.asynccontextmanager
async def tried(outcome: CallFailed | None = None, settings: ProbeInference | None = None) -> AsyncIterator[Tried]:
    made = Tried(outcome, settings or ProbeInference(interval=0.002))
    task = asyncio.ensure_future(made.prober.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        made.prober.close()


async def test_a_model_is_usable_once_an_inference_went_well_and_that_is_waited_for_at_the_start() -> None:
    async with tried(settings=ProbeInference(interval=3600)) as one:
        assert not one.endpoint.models.get(KEY)
        await one.prober.wait_first()
        assert one.is_usable
        assert one.endpoint.probed == {KEY: ""}
        (sent,) = one.connection.inferred
        request = pb.ModelInferRequest.FromString(sent)
        assert (request.model_name, list(request.inputs[0].shape)) == ("m", [1, 3])
        assert list(request.raw_input_contents) == [bytes(12)]


async def test_a_model_whose_inferences_fail_is_not_usable_until_one_goes_well() -> None:
    async with tried(CUDA) as one:
        await one.more(3)
        assert not one.is_usable
        assert "CUDA" in one.endpoint.probed[KEY]
        one.connection.outcome = None
        await one.until(lambda: one.is_usable)
        one.connection.outcome = CUDA
        await one.until(lambda: not one.is_usable)


async def test_health_alone_brings_nobody_back() -> None:
    async with tried() as one:
        await one.until(lambda: one.is_usable)
        one.connection.live = False
        await one.until(lambda: one.endpoint.state is State.DOWN)
        one.connection.outcome = CUDA
        one.connection.live = True
        await one.until(lambda: one.endpoint.state is State.READY)
        for _ in range(50):
            assert not one.is_usable
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("outcome", [FULL, WRONG], ids=["full", "wrong"])
async def test_what_says_nothing_of_the_server_changes_nothing(outcome: CallFailed) -> None:
    async with tried() as one:
        await one.until(lambda: one.is_usable)
        one.connection.outcome = outcome
        await one.more(5)
        assert one.is_usable


async def test_a_request_that_the_model_refuses_costs_it_no_server() -> None:
    async with tried(WRONG) as one:
        await one.until(lambda: one.is_usable)


async def test_late_once_is_chance_and_twice_is_not() -> None:
    async with tried() as one:
        await one.until(lambda: one.is_usable)
        one.connection.outcome = LATE
        await one.more(3)
        assert not one.is_usable


async def test_a_model_that_is_no_longer_tried_out_is_ready_as_triton_says() -> None:
    async with tried(CUDA) as one:
        await one.more(2)
        one.prober.follow([KEY], ProbeSettings(interval=0.001))
        await one.until(lambda: one.is_usable)
        assert one.endpoint.probed == {}


async def test_a_given_request_is_sent_under_the_model_s_name() -> None:
    given = pb.ModelInferRequest(model_name="other", id="7")
    async with tried(settings=ProbeInference(given.SerializeToString(), interval=3600)) as one:
        await one.until(lambda: one.is_usable)
        sent = pb.ModelInferRequest.FromString(one.connection.inferred[0])
        assert (sent.model_name, sent.id) == ("m", "7")


def test_texts_of_zeros_are_empty() -> None:
    metadata = pb.ModelMetadataResponse()
    metadata.inputs.add(name="T", datatype="BYTES", shape=[-1, 2])
    metadata.inputs.add(name="H", datatype="BF16", shape=[3])
    assert list(zeros(metadata).raw_input_contents) == [bytes(8), bytes(6)]
