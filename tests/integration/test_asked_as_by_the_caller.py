"""What a model sees of its caller, and what a caller sees of who failed: ids, traces, names and codes.

The same requests go unary, inside a stream and typed, directly to Triton and through the gateway.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus
from traffic import http
from triton_fixture import TritonFactory
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor
from v2_calls import call, channel_to, infer, numbers, stream, stream_all
from v2_gateways import Script, gateway_of, transparent_to

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton
from gateway.v1 import prediction_pb2, prediction_pb2_grpc

pytestmark = pytest.mark.integration

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"


@pytest.fixture(scope="module")
async def running(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Public models with two variants on one Triton, and its own models."""
    file = tmp_path_factory.mktemp("config") / "gateway.yaml"
    file.write_text(f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams:
  main: {{endpoints: [{triton.grpc_address}], probe_interval: 10m}}
  spare: {{endpoints: ["{triton.grpc_address}"], probe_interval: 10m}}
direct: {{models: all, upstream: main}}
models:
  failing: {{variants: {{first: {{upstream: main, model: fails}}, second: {{upstream: spare, model: fails}}}}}}
  adder: {{variants: {{only: {{upstream: main, model: add_two}}}}}}
  told: {{variants: {{only: {{upstream: main, model: params_echo}}}}}}
  choosy: {{variants: {{first: {{upstream: main, model: picky}}}}}}
  refined:
    pipeline:
      inputs: [{{name: IN, datatype: FP32, shape: [2]}}]
      outputs: [{{name: OUT, datatype: FP32, shape: [2]}}]
      max_batch_size: 1
      steps:
        - {{call: choosy, inputs: {{IN: IN}}, outputs: {{OUT: OUT}}}}
""")
    async with gateway_of(load(file, {})) as made:
        yield made


@pytest.fixture(scope="module")
async def channel(running: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(running.listen) as made:
        yield made


@pytest.fixture(scope="module")
async def direct(triton: LocalTriton) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(triton.grpc_address) as made:
        yield made


def failing(text: str, code: str = "INTERNAL", *, model: str = "fails", id: str = "") -> Any:
    request = infer(model, [text.encode()], "BYTES", id=id)
    request.inputs.add(name="CODE", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(serialize_byte_tensor(np.array([code.encode()], np.object_)).item())
    return request


def id_told(response: Any) -> str:
    """The request id that `params_echo` saw."""
    return str(json.loads(response.raw_output_contents[0][4:])["request_id"])


# Request ids


@pytest.mark.parametrize("model", ["params_echo", "told"])
async def test_a_model_sees_the_id_that_its_caller_gave(channel: grpc.aio.Channel, model: str) -> None:
    ids = ["7", "18446744073709551615", "a b", "größe", "x:y", "x" * 200]
    requests = [infer(model, [1], "INT32", id=id) for id in ids]
    unary = [(await call(channel, request)).response for request in requests]
    streamed = [answer.infer_response for answer in await stream_all(channel, requests)]
    for responses in (unary, streamed):
        assert [id_told(response) for response in responses] == ids
        assert [response.id for response in responses] == ids


async def test_requests_without_an_id_get_numbers_that_other_callers_do_not(running: Gateway) -> None:
    told = []
    for _ in range(2):
        async with channel_to(running.listen) as own:
            answers = await stream_all(own, [infer("told", [1], "INT32") for _ in range(5)])
        assert {answer.infer_response.id for answer in answers} == {""}
        told += [int(id_told(answer.infer_response)) for answer in answers]
    assert len(set(told)) == 10
    assert max(told) < 1 << 63


async def test_requests_that_share_an_id_each_keep_it_as_far_as_there_is_room(channel: grpc.aio.Channel) -> None:
    """And a number stays a number beyond that."""
    answers = await stream_all(channel, [infer("told", [1], "INT32", id="7") for _ in range(20)])
    told = [id_told(answer.infer_response) for answer in answers]
    assert told.count("7") >= 4
    assert all(id.isdigit() and id.startswith("7") for id in told)
    assert {answer.infer_response.id for answer in answers} == {"7"}


async def test_a_request_that_stops_another_reaches_the_model_with_its_id(channel: grpc.aio.Channel) -> None:
    """As clients of TensorRT-LLM stop a generation, on the stream that it runs on."""
    streaming = stream(channel)
    await streaming.write(infer("by_id", [2000], "INT32", id="mine"))
    for _ in range(3):
        assert (await streaming.read()).infer_response.id == "mine"
    await streaming.write(infer("by_id", [0], "INT32", id="mine"))
    await streaming.done_writing()
    answers = []
    while (answer := await streaming.read()) is not grpc.aio.EOF:
        answers.append(answer.infer_response)
    assert len(answers) < 1000
    assert sum(not response.outputs for response in answers) == 1  # of the request that stopped it


# Answers without tensors


async def test_an_answer_without_tensors_reaches_a_caller_in_lock_step(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel
) -> None:
    seen: list[list[Any]] = []
    for way in (direct, channel):
        streaming = stream(way)
        answers = []
        for _ in range(3):
            await streaming.write(infer("by_id", [0], "INT32", id="k"))
            answers.append(await asyncio.wait_for(streaming.read(), 60))
        await streaming.done_writing()
        seen.append(answers)
    assert seen[0] == seen[1]
    assert seen[0][0].infer_response.model_version == "1"


# Who answered, or failed


async def test_the_end_of_a_decoupled_answer_does_not_hide_its_version(channel: grpc.aio.Channel) -> None:
    streaming = stream(channel)
    await streaming.write(infer("by_id", [2], "INT32", id="v"))
    await streaming.done_writing()
    while await streaming.read() is not grpc.aio.EOF:
        pass
    assert dict(await streaming.trailing_metadata())["gateway-model-version"] == "1"


async def test_an_error_names_the_variant_that_it_came_from(channel: grpc.aio.Channel, triton: LocalTriton) -> None:
    wanted = {"gateway-variant": "first", "gateway-endpoint": triton.grpc_address, "gateway-attempts": "1"}
    for request in (failing("broken", model="failing"), infer("refined", [[-1.0, 0.0]])):
        outcome = await call(channel, request)
        assert outcome.text == "broken" or outcome.text.startswith("pipeline 'refined' does not fit the model 'choosy'")
        assert wanted.items() <= outcome.trailers.items()
    streaming = stream(channel)
    await streaming.write(failing("broken", model="failing"))
    await streaming.done_writing()
    assert (await streaming.read()).error_message == "broken"
    assert await streaming.read() is grpc.aio.EOF
    assert wanted.items() <= dict(await streaming.trailing_metadata()).items()
    content = prediction_pb2.Tensor(datatype="BYTES", shape=[1], strings=prediction_pb2.Strings(values=[b"broken"]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await prediction_pb2_grpc.PredictionServiceStub(channel).Predict(
            prediction_pb2.PredictRequest(model="failing", inputs={"IN": content})
        )
    assert wanted.items() <= dict(caught.value.trailing_metadata()).items()


async def test_an_error_of_a_request_that_reached_nobody_names_nobody(channel: grpc.aio.Channel) -> None:
    outcome = await call(channel, infer("nobody", version="x" * 10))
    assert outcome.trailers.get("gateway-variant", "nobody") == "nobody"
    streaming = stream(channel)
    await streaming.write(infer("refined", [1], "INT32"))
    await streaming.done_writing()
    assert (await streaming.read()).error_message
    assert await streaming.read() is grpc.aio.EOF
    assert dict(await streaming.trailing_metadata())["gateway-attempts"] == "0"


# Traces of others


@pytest.mark.parametrize("way", ["unary", "stream", "typed"])
async def test_a_callers_trace_passes_where_none_is_configured(way: str) -> None:
    parent = (("traceparent", f"00-{7:032x}-{9:016x}-01"), ("tracestate", "a=b,c=d"))
    script = Script()
    async with script.serve() as address, transparent_to(address) as made, channel_to(made.listen) as channel:
        if way == "unary":
            assert (await call(channel, infer("any"), metadata=parent)).code is grpc.StatusCode.OK
        elif way == "stream":
            streaming = stream(channel, parent)
            await streaming.write(infer("any"))
            await streaming.read()
            streaming.cancel()
        else:
            await prediction_pb2_grpc.PredictionServiceStub(channel).Predict(
                prediction_pb2.PredictRequest(model="any"), metadata=parent
            )
    assert set(parent) <= set(script.metadata[0].items())


# Texts of models


FORGED = {
    "that repeats its input": ("UNAVAILABLE", f"cannot parse: {STOPPING}"),
    "in Triton's words": ("UNAVAILABLE", STOPPING),
    "that says that it is full": ("UNAVAILABLE", "Exceeds maximum queue size"),
    "of its own": ("UNAVAILABLE", "the feature store is gone"),
    "that names no model": ("NOT_FOUND", "Request for unknown model: 'fails' is not found"),
}


@pytest.mark.parametrize("path", ["unary", "stream"])
@pytest.mark.parametrize(("code", "text"), FORGED.values(), ids=FORGED)
async def test_no_text_of_a_models_keeps_others_away(
    running: Gateway, channel: grpc.aio.Channel, code: str, text: str, path: str
) -> None:
    """One caller gets such errors without end; others use the same model and another one of the same server."""
    failed: list[str] = []
    is_over = asyncio.Event()

    async def honest(request: Any) -> int:
        count = 0
        async with channel_to(running.listen) as own:
            while not is_over.is_set() or count < 20:
                outcome = await call(own, request)
                failed.extend([outcome.text] if outcome.code is not grpc.StatusCode.OK else [])
                count += 1
        return count

    requests = (infer("failing", [b""], "BYTES"), infer("adder"), infer("add_two"))
    neighbours = asyncio.gather(*map(honest, requests))
    request = failing(text, code, model="failing")
    texts = []
    for _ in range(20):
        if path == "unary":
            texts.append((await call(channel, request)).text)
        else:
            texts.append((await stream_all(channel, [request]))[0].error_message)
    is_over.set()
    assert min(await neighbours) >= 20
    assert failed == []
    if path == "stream" or text not in (STOPPING, "Exceeds maximum queue size", FORGED["that names no model"][1]):
        assert set(texts) == {text}  # else it was tried elsewhere, which is its own caller's affair


async def test_an_unavailable_of_a_models_own_passes_and_is_not_repeated(channel: grpc.aio.Channel) -> None:
    outcome = await call(channel, failing("the feature store is gone", "UNAVAILABLE", model="failing"))
    assert (outcome.code, outcome.text) == (grpc.StatusCode.UNAVAILABLE, "the feature store is gone")
    assert outcome.trailers["gateway-attempts"] == "1"


async def test_who_lacks_the_key_of_a_restricted_protocol_is_told_and_nobody_else_feels_it(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    server = await triton_factory(["add_two"], extra=("--grpc-restricted-protocol=inference:k=v",))
    file = tmp_path / "gateway.yaml"
    file.write_text(f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: [{server.grpc_address}]}}}}
models: {{adder: {{variants: {{only: {{upstream: main, model: add_two}}}}}}}}
""")
    key = [("triton-grpc-protocol-k", "v")]
    async with gateway_of(load(file, {})) as made, channel_to(made.listen) as own, channel_to(made.listen) as other:
        for _ in range(30):
            refused, answered = await asyncio.gather(
                call(own, infer("adder")), call(other, infer("adder"), metadata=key)
            )
            assert refused.text == "This protocol is restricted, expecting header 'triton-grpc-protocol-k'"
            assert answered.code is grpc.StatusCode.OK, answered.text
        _, page = await http(made.admin_address, "/metrics")
    assert "gateway_server_faults_total{" not in page


# Codes


BAD = {
    "unknown model": infer("nobody"),
    "unknown version": infer("add_two", version="9"),
    "version that is no number": infer("add_two", version="x"),
    "wrong dtype": infer("add_two", [[1]], "INT32"),
    "wrong dtype, with an id": infer("add_two", [[1]], "INT32", id="w"),
    "wrong shape": infer("add_two", [1.0]),
    "too many rows": infer("add_two", [[1.0]] * 9),
    "wrong input": infer("add_two", name="NONE"),
    "no input": pb.ModelInferRequest(model_name="add_two"),
    "unknown output": infer("add_two"),
    "reserved parameter": infer("add_two", parameters={"triton_own": 1}),
    "sequence not started": infer("accumulate", [[1]], "INT32", parameters={"sequence_id": 876}),
    "sequence without id": infer("accumulate", [[1]], "INT32"),
    "no such region": infer("add_two"),
    "model's own": failing("it broke"),
    "raises": infer("fails", [b"x"], "BYTES"),
}
BAD["unknown output"].outputs.add(name="NONE")
BAD["no such region"].inputs[0].parameters["shared_memory_region"].string_param = "none"
BAD["no such region"].inputs[0].parameters["shared_memory_byte_size"].int64_param = 8
BAD["no such region"].ClearField("raw_input_contents")


@pytest.mark.parametrize("request_", BAD.values(), ids=BAD)
async def test_an_error_inside_a_stream_has_the_code_of_a_unary_call(
    triton: LocalTriton, request_: Any, tmp_path: Path
) -> None:
    async with transparent_to(triton.grpc_address) as made, channel_to(made.listen) as channel:
        outcome = await call(channel, request_)
        (answer,) = await stream_all(channel, [request_])
        assert answer.error_message == outcome.text
        _, page = await http(made.admin_address, "/metrics")
    counted = {
        sample.labels["method"]: sample.labels["code"]
        for family in parse_prometheus(page)
        for sample in family.samples
        if sample.name == "gateway_requests_total"
    }
    assert counted == {"ModelInfer": outcome.code.name, "ModelStreamInfer": outcome.code.name}
    assert outcome.code is not grpc.StatusCode.UNKNOWN


async def test_neighbours_are_not_disturbed_by_bytes_that_are_no_request(triton: LocalTriton) -> None:
    """Triton gives what it cannot read a code of the server's; it counts as nobody's fault but the caller's."""
    broken = infer("add_two").SerializeToString() + b"\x2a\x02\x0a\x7f"  # an input that is longer than its message
    async with transparent_to(triton.grpc_address) as made, channel_to(made.listen) as channel:
        assert (await call(channel, broken)).code is grpc.StatusCode.INTERNAL
        assert numbers((await call(channel, infer("add_two"))).response) == [3.0, 4.0]
        _, page = await http(made.admin_address, "/metrics")
    assert "gateway_server_faults_total{" not in page
