"""What a call holds is freed when the call ends, and not when Python next looks for cycles.

Bodies of megabytes are few objects, so the collector, which counts objects, may not look for hundreds of megabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer
from v2_gateways import Script, gateway_of

from gateway.config import load
from gateway.v1 import prediction_pb2, prediction_pb2_grpc

VALUES = np.zeros((1, 10_000), np.float32)

PIPELINE = """
inputs: [{name: IN, datatype: FP32, shape: [-1]}]
outputs: [{name: OUT, datatype: FP32, shape: [-1]}]
steps: [{call: MODEL, inputs: [IN], outputs: [OUT]}]
"""


async def echo(body: bytes, context: Any) -> bytes:
    """OUT = IN; a request of the model `fails` has an error, one of `hangs` no end."""
    request = pb.ModelInferRequest.FromString(body)
    if request.model_name == "fails":
        await context.abort(grpc.StatusCode.INTERNAL, "it fails")
    if request.model_name == "hangs":
        await asyncio.sleep(60)
    (tensor,) = request.inputs
    answer = pb.ModelInferResponse(model_name=request.model_name, model_version="1")
    answer.outputs.add(name="OUT", datatype=tensor.datatype, shape=tensor.shape)
    answer.raw_output_contents.append(request.raw_input_contents[0])
    return bytes(answer.SerializeToString())


def write_config(file: Path, triton: str) -> Path:
    names = ("echo", "fails", "hangs")
    models: dict[str, Any] = {name: {"variants": {"only": {"upstream": "main", "model": name}}} for name in names}
    models |= {f"piped-{name}": {"pipeline": yaml.safe_load(PIPELINE.replace("MODEL", name))} for name in names}
    settings = {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "upstreams": {"main": {"endpoints": [triton]}},
        "models": models,
        "telemetry": {"access_log": {"destination": "none"}},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@contextlib.contextmanager
def nothing_left_to_collect() -> Iterator[None]:
    """None of the gateway's objects that became unreachable in the block is in a cycle."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        found = gc.garbage[:]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert {type(each).__qualname__ for each in found if type(each).__module__.startswith("gateway.")} == set()


async def relayed(channel: Any, model: str) -> None:
    await call(channel, infer(model, VALUES))


async def compressed(channel: Any, model: str) -> None:
    await call(channel, infer(model, VALUES), compression=grpc.Compression.Gzip)


async def predicted(channel: Any, model: str) -> None:
    request = prediction_pb2.PredictRequest(model=model)
    request.inputs["IN"].CopyFrom(prediction_pb2.Tensor(datatype="FP32", shape=VALUES.shape, raw=VALUES.tobytes()))
    with contextlib.suppress(grpc.aio.AioRpcError):
        await prediction_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=20)


async def cancelled(channel: Any, model: str) -> None:
    task = asyncio.ensure_future(call(channel, infer(model, VALUES)))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def too_late(channel: Any, model: str) -> None:
    await call(channel, infer(model, VALUES), timeout=0.2)


WAYS: dict[str, tuple[Callable[[Any, str], Awaitable[None]], str]] = {
    "a call": (relayed, "echo"),
    "one that fails": (relayed, "fails"),
    "one of no model": (relayed, "nothing"),
    "one whose caller goes": (cancelled, "hangs"),
    "one whose deadline passes": (too_late, "hangs"),
    "a compressed one": (compressed, "echo"),
    "a pipeline": (relayed, "piped-echo"),
    "a pipeline that fails": (relayed, "piped-fails"),
    "a pipeline whose caller goes": (cancelled, "piped-hangs"),
    "a pipeline whose deadline passes": (too_late, "piped-hangs"),
    "a typed call": (predicted, "echo"),
    "a typed call that fails": (predicted, "fails"),
}


@pytest.fixture(scope="module")
async def channel(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    file = tmp_path_factory.mktemp("freed") / "gateway.yaml"
    async with (
        Script(infer=echo).serve() as address,
        gateway_of(load(write_config(file, address), {})) as gateway,
        channel_to(gateway.listen) as made,
    ):
        yield made


@pytest.mark.parametrize(("way", "model"), WAYS.values(), ids=WAYS)
async def test_what_a_call_held_is_freed_with_it(
    channel: Any, way: Callable[[Any, str], Awaitable[None]], model: str
) -> None:
    await way(channel, model)  # what is made once
    with nothing_left_to_collect():
        for _ in range(3):
            await way(channel, model)
        await asyncio.sleep(0.2)  # what ends after its answer
