"""What callers and operators see of a gateway whose memory gets scarce, and that it passes."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from runbook import as_the_page_says
from traffic import config, gateway, http, until, write
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from upstreams import FakeTriton

from gateway.app import Gateway
from gateway.process.container import Memory
from gateway.v1 import prediction_pb2, prediction_pb2_grpc

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
BATCH = (("x-priority", "batch"),)
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def asked() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", id="4")
    request.inputs.add(name="IN", datatype="UINT8", shape=[4])
    request.raw_input_contents.append(bytes(4))
    return request


def predicted() -> prediction_pb2.PredictRequest:
    request = prediction_pb2.PredictRequest(model="m")
    request.inputs["IN"].raw = bytes(4)
    request.inputs["IN"].datatype = "UINT8"
    request.inputs["IN"].shape.append(4)
    return request


async def at(running: Gateway, percent: int, step: int) -> None:
    running._memory._read = lambda: Memory(percent, 100)
    await until(lambda: running.shown.state()["memory"]["step"] == step, 10, f"step {step}")


async def ending(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        said = "" if has_retry_info(error.trailing_metadata()) else "without RetryInfo: "
        return error.code(), f"{said}{error.details()}"
    return grpc.StatusCode.OK, ""


def has_retry_info(trailing: grpc.aio.Metadata | None) -> bool:
    return b"google.rpc.RetryInfo" in dict(trailing or ()).get("grpc-status-details-bin", b"")


async def test_the_batch_class_and_new_connections_wait_until_there_is_memory_again(tmp_path: Path) -> None:
    with FakeTriton().served() as port:
        models = {"m": {"variants": {"only": {"upstream": "main", "model": "m"}}}}
        more = {"admission": {"priority": "x-priority"}, "direct": {"models": "none"}}
        file = write(tmp_path / "g.yaml", config({"main": f"127.0.0.1:{port}"}, models, **more))
        async with gateway(file) as running, grpc.aio.insecure_channel(running.listen) as channel:
            triton = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            predictions = prediction_pb2_grpc.PredictionServiceStub(channel)

            async def batch() -> set[tuple[grpc.StatusCode, str]]:
                return {
                    await ending(triton.ModelInfer(asked(), metadata=BATCH, timeout=20)),
                    await ending(predictions.Predict(predicted(), metadata=BATCH, timeout=20)),
                }

            assert await batch() == {(grpc.StatusCode.OK, "")}
            await at(running, 87, 1)
            await as_the_page_says("memory-scarce", running.admin_address, tmp_path, {})
            await at(running, 93, 2)
            text = "The gateway's memory is nearly used up: calls of the batch class are refused until there is more."
            assert await batch() == {(EXHAUSTED, text)}
            streaming = triton.ModelStreamInfer(metadata=BATCH, timeout=20)
            assert (await streaming.code(), await streaming.details()) == (EXHAUSTED, text)
            assert has_retry_info(await streaming.trailing_metadata())
            assert (await ending(triton.ModelInfer(asked(), timeout=20)))[0] is grpc.StatusCode.OK
            checked = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
            async with grpc.aio.insecure_channel(running.listen, OWN_CONNECTION) as new:
                checked = await health_pb2_grpc.HealthStub(new).Check(health_pb2.HealthCheckRequest(), timeout=20)
                assert checked.status == health_pb2.HealthCheckResponse.SERVING
                live = service_pb2_grpc.GRPCInferenceServiceStub(new)
                assert (await live.ServerLive(pb.ServerLiveRequest(), timeout=20)).live
                code, said = await ending(live.ModelInfer(asked(), timeout=20))
                assert code is grpc.StatusCode.UNAVAILABLE, said
            metrics = str((await http(running.admin_address, "/metrics"))[1])
            assert "gateway_memory_step 2.0" in metrics
            assert re.search(r'^gateway_connections_refused_total{reason="memory"} [1-9]', metrics, re.MULTILINE)
            told = (await http(running.admin_address, "/state"))[1]["attention"]
            assert [each["text"] for each in told if each["kind"] == "gateway"] == [
                "93% of the memory is in use: also new connections, and calls of the batch class, are refused"
            ]
            await at(running, 50, 0)
            assert await batch() == {(grpc.StatusCode.OK, "")}
