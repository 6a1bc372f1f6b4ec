"""Identical requests cost a real Triton one execution, and every caller gets what Triton would have told him."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import ask_until
from triton_fixture import TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{endpoint}"], probe_interval: 250ms}}}}
models:
  numbers: {{variants: {{only: {{upstream: main, model: identity_fp32}}}}, share: {{cache: 64MiB}}}}
  labels: {{variants: {{only: {{upstream: main, model: classifier}}}}, share: {{cache: 1MiB}}}}
  waiter: {{variants: {{only: {{upstream: main, model: slow}}}}, share: {{}}}}
  adder: {{variants: {{only: {{upstream: main, model: add_one_b}}}}, share: {{cache: 1MiB}}}}
  best-label:
    pipeline:
      inputs: [{{name: scores, datatype: FP32, shape: [4]}}]
      outputs: [{{name: label, datatype: BYTES, shape: [1]}}]
      max_batch_size: 8
      steps:
        - {{call: labels, inputs: {{IN: scores}}, outputs: {{OUT: scores}}}}
        - {{step: top_k, with: {{k: 1}}}}
"""


def sharing(folder: Path, endpoint: str) -> Gateway:
    file = folder / "gateway.yaml"
    file.write_text(CONFIG.format(endpoint=endpoint))
    return gateway_of(load(file, {}))


@pytest.fixture
async def gateway(tmp_path: Path, triton: LocalTriton) -> AsyncIterator[Gateway]:
    """One that has probed the models, so that answers are remembered."""
    async with sharing(tmp_path, triton.grpc_address) as running, channel_to(running.listen) as channel:
        for model, array in (("numbers", np.zeros((1, 1), np.float32)), ("labels", np.zeros((1, 4), np.float32))):
            await _remembered(channel, request(model, array, classes=1 if model == "labels" else 0))
        yield running


def request(model: str, array: Any, id: str = "", classes: int = 0) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, id=id)
    datatype = "INT32" if array.dtype == np.int32 else "FP32"
    message.inputs.add(name="IN", datatype=datatype, shape=array.shape)
    message.raw_input_contents.append(array.tobytes())
    if classes:
        message.outputs.add(name="OUT").parameters["classification"].int64_param = classes
    return message


def renamed(message: pb.ModelInferRequest, model: str) -> pb.ModelInferRequest:
    """The same, for Triton itself."""
    other = pb.ModelInferRequest()
    other.CopyFrom(message)
    other.model_name = model
    return other


async def executions(channel: grpc.aio.Channel, model: str) -> int:
    """Of a model, as Triton counts them."""
    answer = await call(channel, pb.ModelStatisticsRequest(name=model), "ModelStatistics")
    [statistics] = pb.ModelStatisticsResponse.FromString(answer.body).model_stats
    return int(statistics.execution_count)


@pytest.mark.parametrize("size", [3, 150_528, 1_000_000])
async def test_a_remembered_answer_is_tritons_own_to_the_byte(gateway: Gateway, triton: LocalTriton, size: int) -> None:
    """Also of a tensor that would be passed on as it arrives."""
    array = np.arange(size, dtype=np.float32).reshape(1, -1)
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        own = await call(direct, renamed(request("numbers", array, "mine"), "identity_fp32"))
        before = await executions(direct, "identity_fp32")
        answers = [await call(through, request("numbers", array, id)) for id in ("mine", "mine", "")]
        assert await executions(direct, "identity_fp32") == before + 1
    public = own.response
    public.model_name = "numbers"
    assert answers[0].body == answers[1].body == public.SerializeToString()
    public.id = ""
    assert answers[2].body == public.SerializeToString()
    assert [answer.trailers.get("gateway-cache") for answer in answers] == [None, "hit", "hit"]
    assert {answer.trailers["gateway-endpoint"] for answer in answers} == {triton.grpc_address}


async def test_a_herd_of_identical_requests_costs_one_execution(gateway: Gateway, triton: LocalTriton) -> None:
    herd = 40
    async with (
        channel_to(gateway.listen) as one,
        channel_to(gateway.listen) as two,
        channel_to(triton.grpc_address) as direct,
    ):
        before = await executions(direct, "slow")
        asked = request("waiter", np.array([[300]], np.int32))
        impatient = call(one, asked, timeout=0.1)
        calls = [impatient, *(call((one, two)[number % 2], asked) for number in range(herd))]
        first, *others = await asyncio.gather(*calls)
        assert first.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert {(each.code, each.body) for each in others} == {(grpc.StatusCode.OK, others[0].body)}
        assert await executions(direct, "slow") <= before + 2  # who came after the impatient one's end shares, too


async def test_what_differs_is_answered_as_triton_answers_it(gateway: Gateway, triton: LocalTriton) -> None:
    scores = np.array([[0.1, 0.9, 0.3, 0.2]], np.float32)
    asked = [
        request("labels", scores),
        request("labels", scores, classes=1),
        request("labels", scores, classes=2),
        request("labels", scores[:, ::-1].copy(), classes=2),
        request("labels", scores.reshape(4, 1)),  # refused
        request("labels", scores, id="x"),
    ]
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        for _ in range(2):
            for message in asked:
                got, own = await call(through, message), await call(direct, renamed(message, "classifier"))
                assert (got.code, got.text.replace("'labels'", "'classifier'")) == (own.code, own.text)
                if own.body:
                    expected = own.response
                    expected.model_name = "labels"
                    assert got.body == expected.SerializeToString()


async def test_a_pipelines_calls_share_with_others(gateway: Gateway, triton: LocalTriton) -> None:
    scores = np.array([[0.25, 0.5, 0.125, 1.0]], np.float32)
    asked = request("best-label", scores)
    asked.inputs[0].name = "scores"
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        before = await executions(direct, "classifier")
        answers = [await call(through, asked) for _ in range(3)]
        assert len({answer.body for answer in answers}) == 1
        assert answers[0].code is grpc.StatusCode.OK
        assert await executions(direct, "classifier") == before + 1


@pytest.mark.parametrize("by", ["gateway", "triton", "restart"])
async def test_a_model_that_is_loaded_anew_is_asked_anew(
    tmp_path: Path, triton_factory: TritonFactory, by: str
) -> None:
    """Its file may be another one. At Triton itself it is the next probe that finds out."""
    server = await triton_factory(["add_one_b"], extra=["--model-control-mode=explicit", "--load-model=add_one_b"])
    asked = request("adder", np.zeros((1, 2), np.float32))
    async with sharing(tmp_path, server.grpc_address) as gateway, channel_to(gateway.listen) as through:
        await _remembered(through, asked)
        if by == "restart":
            await server.kill()
            await server.start()
        else:
            where = gateway.listen if by == "gateway" else server.grpc_address
            async with channel_to(where) as channel:
                (server.repository / "add_one_b" / "2" / "model.onnx").touch()  # else Triton sees no reason to
                load_it = pb.RepositoryModelLoadRequest(model_name="add_one_b")
                assert (await call(channel, load_it, "RepositoryModelLoad")).code is grpc.StatusCode.OK
        if by == "gateway":
            assert (await call(through, asked)).trailers.get("gateway-cache") is None
        else:
            await _answered_anew(through, asked)


async def _remembered(channel: grpc.aio.Channel, asked: pb.ModelInferRequest) -> Outcome:
    """Ask until the answer is remembered: the model must have been probed first."""
    return await _asked_until(channel, asked, lambda answer: answer.trailers.get("gateway-cache") == "hit")


async def _answered_anew(channel: grpc.aio.Channel, asked: pb.ModelInferRequest) -> Outcome:
    return await _asked_until(channel, asked, lambda answer: "gateway-cache" not in answer.trailers)


async def _asked_until(
    channel: grpc.aio.Channel, asked: pb.ModelInferRequest, is_so: Callable[[Outcome], bool]
) -> Outcome:
    return await ask_until(
        lambda: call(channel, asked), lambda answer: answer.code is grpc.StatusCode.OK and is_so(answer)
    )


async def test_the_metrics_tell_what_was_shared(gateway: Gateway) -> None:
    asked = request("labels", np.array([[4.0, 3.0, 2.0, 1.0]], np.float32))
    async with channel_to(gateway.listen) as through:
        for _ in range(3):
            await call(through, asked)
    body, _ = gateway._telemetry.scrape.render("text/plain")
    text = body.decode()
    assert 'gateway_shared_requests_total{how="coalesced",model="labels"} 0.0' in text
    assert 'gateway_shared_requests_total{how="hit",model="labels"}' in text
    assert 'gateway_cache_answers{model="labels"} 2.0' in text
