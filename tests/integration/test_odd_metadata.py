"""Metadata that gRPC's own API would not send and every peer takes: the same through the gateway as directly."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from triton_fixture import FAST_START, for_the_whole_run
from v2_calls import Outcome, call, infer, read_all, stream
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.forward.channel import WireChannel
from gateway.triton import LocalTriton
from gateway.v1 import prediction_pb2, prediction_pb2_grpc

pytestmark = pytest.mark.integration

CITY = "São Paulo"

VALUES: dict[str, str | bytes] = {
    "ASCII": "Lima",
    "UTF-8": CITY,
    "Latin-1": b"S\xe3o Paulo",
    "neither": b"\xff\x80\xfe",
    "tab": "a\tb",
    "empty": "",
}


@pytest.fixture(scope="module")
async def forwarding(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """A Triton whose models see callers' metadata as parameters."""
    extra = (*FAST_START, "--grpc-header-forward-pattern=x-geo.*")
    models = ["params_echo", "classifier"]
    async with for_the_whole_run(LocalTriton(triton_repository, models=models, extra=extra)) as server:
        yield server


@pytest.fixture(scope="module")
async def brazil(forwarding: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Public models, a pipeline over one of them, and a rule that reads the odd value."""
    file = tmp_path_factory.mktemp("brazil") / "gateway.yaml"
    file.write_text(
        f"""
        listen: 127.0.0.1:0
        admin: {{listen: "127.0.0.1:0"}}
        telemetry: {{access_log: {{destination: none}}}}
        upstreams: {{main: {{endpoints: [{forwarding.grpc_address}]}}}}
        direct: {{models: all, upstream: main}}
        models:
          echo:
            variants:
              here: {{upstream: main, model: params_echo}}
              there: {{upstream: main, model: params_echo}}
            split: {{there: 1}}
            rules:
              - {{name: city, match: {{metadata: {{x-geo-city: "{CITY}"}}}}, variant: here}}
          labels: {{variants: {{only: {{upstream: main, model: classifier}}}}}}
          best:
            pipeline:
              inputs: [{{name: x, datatype: FP32, shape: [4]}}]
              outputs: [{{name: scores, datatype: FP32, shape: [4]}}]
              steps: [{{call: labels, inputs: {{IN: x}}, outputs: {{OUT: scores}}}}]
        """
    )
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.fixture(params=["direct", "transparent", "public"])
async def front(request: pytest.FixtureRequest, forwarding: LocalTriton, brazil: Gateway) -> AsyncIterator[Any]:
    """A channel and the model to call."""
    address = forwarding.grpc_address if request.param == "direct" else brazil.listen
    async with WireChannel(address) as channel:
        yield channel, "echo" if request.param == "public" else "params_echo"


@pytest.fixture(params=VALUES.values(), ids=VALUES)
def value(request: pytest.FixtureRequest) -> str | bytes:
    return request.param  # type: ignore[no-any-return]


def sent(value: str | bytes) -> list[tuple[str, str | bytes]]:
    """Models see the first key, and Python ones fail over what is not UTF-8."""
    return [("x-geo-city" if isinstance(value, str) else "x-raw", value)]


def told(response: Any) -> Any:
    """What the model saw."""
    return json.loads(response.raw_output_contents[0][4:])["parameters"]


async def test_the_value_reaches_the_model_as_it_was_sent(front: Any, value: str | bytes) -> None:
    channel, model = front
    outcome: Outcome = await call(channel, infer(model, [0], "INT32"), metadata=sent(value))
    assert outcome.text == ""
    if isinstance(value, str):
        assert told(outcome.response)["x-geo-city"] == value


async def test_the_value_passes_on_a_stream(front: Any, value: str | bytes) -> None:
    channel, model = front
    streaming = stream(channel, sent(value))
    await streaming.write(infer(model, [0], "INT32"))
    await streaming.done_writing()
    (answer,) = await read_all(streaming)
    assert answer.error_message == ""
    if isinstance(value, str):
        assert told(answer.infer_response)["x-geo-city"] == value


async def test_the_value_passes_on_other_rpcs(front: Any, value: str | bytes) -> None:
    channel, _ = front
    outcome = await call(channel, b"", "ServerLive", metadata=[("x-geo-city", value)])
    assert (outcome.text, outcome.body) == ("", b"\x08\x01")


async def test_pipelines_and_the_typed_api_take_the_value(brazil: Gateway, value: str | bytes) -> None:
    async with WireChannel(brazil.listen) as channel:
        outcome = await call(channel, infer("best", [[0.0] * 4], name="x"), metadata=sent(value))
        assert outcome.text == ""
        typed: Any = prediction_pb2_grpc.PredictionServiceStub(channel)  # type: ignore[no-untyped-call]
        tensor = prediction_pb2.Tensor(shape=[1], integers=prediction_pb2.Integers(values=[0]), datatype="INT32")
        request = prediction_pb2.PredictRequest(model="echo", inputs={"IN": tensor})
        answer = await typed.Predict(request, metadata=sent(value))
        assert answer.served.variant == ("here" if value == CITY else "there")


@pytest.mark.parametrize(("given", "variant"), [(CITY, "here"), ("Lima", "there")])
async def test_rules_read_the_value_as_text(brazil: Gateway, given: str, variant: str) -> None:
    async with WireChannel(brazil.listen) as channel:
        outcome = await call(channel, infer("echo", [0], "INT32"), metadata=sent(given))
    assert outcome.trailers["gateway-variant"] == variant
