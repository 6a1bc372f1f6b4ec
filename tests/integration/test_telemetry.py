"""What a whole gateway tells: ids of requests in answers and logs, captured requests that can be sent again, /state."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from command_line import command, free_address, run
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from receiver import receiving
from traffic import until_readyz
from v2_calls import call, channel_to, infer, numbers, stream
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

MODELS = {
    "adder": {"variants": {"only": {"upstream": "main", "model": "add_one_a"}}},
    "same": {
        "pipeline": {
            "inputs": [{"name": "IN", "datatype": "FP32", "shape": [4]}],
            "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [4]}],
            "steps": [{"call": "labels", "inputs": {"IN": "IN"}, "outputs": {"OUT": "OUT"}}],
        }
    },
    "labels": {"variants": {"only": {"upstream": "main", "model": "classifier"}}},
}
Start = Callable[..., AbstractAsyncContextManager[Gateway]]


@pytest.fixture
def start(triton: LocalTriton, tmp_path: Path) -> Start:
    """Starts a gateway with these telemetry settings."""

    @asynccontextmanager
    async def started(**telemetry: object) -> AsyncIterator[Gateway]:
        content = {
            "listen": "127.0.0.1:0",
            "admin": {"listen": "127.0.0.1:0"},
            "telemetry": {"access_log": {"destination": "none"}, **telemetry},
            "upstreams": {"main": {"endpoints": [triton.grpc_address]}},
            "models": MODELS,
        }
        file = tmp_path / "gateway.yaml"
        file.write_text(yaml.safe_dump(content))
        async with gateway_of(load(file, {})) as running:
            yield running

    return started


async def test_a_caller_s_request_id_comes_back_whatever_becomes_of_the_call(start: Start) -> None:
    theirs = [("x-request-id", "abc-1")]
    async with start() as gateway, channel_to(gateway.listen) as channel:
        for request in (infer("adder"), infer("same", [[1.0] * 4]), infer("nobody"), infer("adder", [[1.0]] * 9)):
            answer = await call(channel, request, metadata=theirs)
            assert answer.trailers.get("x-request-id") == "abc-1", request.model_name
        assert "x-request-id" not in (await call(channel, infer("adder"))).trailers
        streaming = stream(channel, theirs)
        await streaming.write(infer("adder"))
        await streaming.done_writing()
        assert numbers((await streaming.read()).infer_response) == [2.0, 3.0]
        await streaming.read()
        assert dict(await streaming.trailing_metadata())["x-request-id"] == "abc-1"


@pytest.mark.parametrize("id", ["a" * 300, "a  b"], ids=["too long", "spaces"])
async def test_an_odd_request_id_harms_nothing(start: Start, id: str) -> None:
    async with start() as gateway, channel_to(gateway.listen) as channel:
        for request in (infer("adder"), infer("nobody")):
            answer = await call(channel, request, metadata=[("x-request-id", id)])
            assert answer.code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
            assert answer.trailers.get("x-request-id") in (None, id)


@pytest.mark.parametrize(
    ("id", "metadata", "logged"),
    [("r-1", [], "r-1"), ("", [("x-request-id", "m-1")], "m-1"), ("r-1", [("x-request-id", "m-1")], "r-1")],
    ids=["in the message", "in the metadata", "in both"],
)
async def test_the_log_names_the_request(
    start: Start, id: str, metadata: list[tuple[str, str]], logged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = {"destination": "stdout", "sample": 1}
    async with start(access_log=log) as gateway, channel_to(gateway.listen) as channel:
        await call(channel, infer("adder", id=id), metadata=metadata)
    (line,) = [json.loads(each) for each in capsys.readouterr().out.splitlines() if each.startswith("{")]
    assert (line["model"], line["request_id"]) == ("adder", logged)


async def test_captured_requests_can_be_sent_again_from_the_command_line(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    kept = {"directory": str(folder), "share": 1, "metadata": ["x-user"]}
    capture = [{"model": name, **kept} for name in ("adder", "same")]
    async with start(capture=capture) as gateway, channel_to(gateway.listen) as channel:
        for number in range(3):
            await call(channel, infer("adder", [[float(number)]], id=f"r-{number}"), metadata=[("x-user", "ann")])
        await call(channel, infer("same", [[1.0] * 4]))
        await call(channel, infer("labels", [[1.0] * 4]))
        await call(channel, infer("adder", [[1.0]] * 9))  # more rows than the model takes
    files = sorted(str(file) for file in folder.iterdir())
    assert len(files) == 2

    async with start() as gateway:
        code, output, errors = await run("replay", *files, "--to", gateway.listen, folder=tmp_path)
        assert (code, errors) == (1, "")
        assert "5 requests" in output
        assert "OK                   4" in output
        assert "INVALID_ARGUMENT     1" in output
        code, output, _ = await run("replay", *files, "--to", gateway.listen, "--model", "same", folder=tmp_path)
        assert code == 0
        assert "1 requests" in output


async def test_requests_for_a_public_name_are_sent_to_a_triton_under_its_own_name(
    start: Start, triton: LocalTriton, tmp_path: Path
) -> None:
    folder = tmp_path / "captured"
    async with start(capture=[{"model": "adder", "directory": str(folder), "share": 1}]) as gateway:
        async with channel_to(gateway.listen) as channel:
            await call(channel, infer("adder"))
        (file,) = await until_kept(folder)
    here = ("replay", str(file), "--to", triton.grpc_address)
    code, output, _ = await run(*here, folder=tmp_path)
    assert (code, "NOT_FOUND" in output) == (1, True)
    code, output, _ = await run(*here, "--model", "adder", "--as", "add_one_a", folder=tmp_path)
    assert (code, "OK                   1" in output) == (0, True)
    code, _, errors = await run(*here, "--as", "add_one_a", folder=tmp_path)
    assert (code, "--as needs --model" in errors) == (2, True)


async def test_state_has_what_was_called_lately(start: Start, get_json: Callable[..., Awaitable[object]]) -> None:
    async with start() as gateway, channel_to(gateway.listen) as channel:
        gateway._telemetry.traffic.look()
        for _ in range(3):
            await call(channel, infer("adder"))
        gateway._telemetry.traffic.look()
        state = await get_json(gateway, "/state")
    (minute, _) = state["traffic"]["windows"]
    assert minute["models"]["adder"]["calls"] == 3
    assert minute["models"]["adder"]["variants"]["only"]["ms"]["p99"] > 0
    assert state["traffic"]["in_flight"] == {"adder": 0, "other": 0}  # other: names that no model has


async def test_one_process_sends_the_metrics_of_all_workers(triton: LocalTriton, tmp_path: Path) -> None:
    received: list[ExportMetricsServiceRequest] = []

    async def post(request: web.Request) -> web.Response:
        received.append(ExportMetricsServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    content = {
        "listen": free_address(),
        "admin": {"listen": "127.0.0.1:0"},
        "workers": 2,
        "upstreams": {"main": {"endpoints": [triton.grpc_address]}},
        "models": MODELS,
    }
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(content))
    async with (
        receiving("/v1/metrics", post) as url,
        command(
            *("serve", "--config", str(file)),
            folder=tmp_path,
            environ={
                "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{url}/v1/metrics",
                "OTEL_METRIC_EXPORT_INTERVAL": "60000",
            },
        ) as supervisor,
    ):
        address, admin = await supervisor.until_serving()
        await until_readyz(admin, True, within=20)
        for _ in range(8):  # a connection each, so that the kernel spreads them
            async with channel_to(address) as channel:
                await call(channel, infer("adder"))
        supervisor.signal(signal.SIGTERM)
        assert await supervisor.wait() == 0
    (last,) = received  # of the supervisor alone, at its end
    (group,) = last.resource_metrics
    metrics = {metric.name: metric for scope in group.scope_metrics for metric in scope.metrics}
    assert sum(point.as_double for point in metrics["gateway_requests"].sum.data_points) == 8


@pytest.fixture
def get_json() -> Callable[..., Awaitable[object]]:
    async def get(gateway: Gateway, path: str) -> object:
        async with aiohttp.ClientSession() as session, session.get(f"http://{gateway.admin_address}{path}") as answer:
            return await answer.json()

    return get


async def test_a_replayed_request_is_neither_captured_again_nor_its_model_s_traffic(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "captured"
    capture = [{"model": "adder", "directory": str(folder), "share": 1}]
    async with start(capture=capture) as gateway, channel_to(gateway.listen) as channel:
        await call(channel, infer("adder"))
        (file,) = await until_kept(folder)
        code, output, _ = await run("replay", str(file), "--to", gateway.listen, folder=tmp_path)
        assert (code, "1 requests" in output) == (0, True)
        code, output, _ = await run("replay", str(file), "--to", gateway.listen, "--as-traffic", folder=tmp_path)
        assert (code, "1 requests" in output) == (0, True)
        counts = await counted(gateway)
    assert len(file.read_text().splitlines()) == 2  # the caller's, and the one that was said to be traffic
    assert counts == {"adder": 2.0, "replayed": 1.0}


def whole_files(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.jsonl") if file.read_bytes().endswith(b"\n")]


async def until_kept(folder: Path) -> list[Path]:
    """The captured files, once one has a whole line."""
    for _ in range(1200):
        if files := whole_files(folder):
            return files
        await asyncio.sleep(0.05)
    raise AssertionError("nothing was captured")


async def counted(gateway: Gateway) -> dict[str, float]:
    """Calls by model, as Prometheus would read them."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{gateway.admin_address}/metrics") as answer:
        text = await answer.text()
    counts: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("gateway_requests_total{"):
            model = line.partition('model="')[2].partition('"')[0]
            counts[model] = counts.get(model, 0.0) + float(line.rpartition(" ")[2])
    return counts


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip], ids=["plain", "compressed"])
async def test_a_request_that_cannot_be_read_is_counted_logged_and_keeps_its_id(
    start: Start, capsys: pytest.CaptureFixture[str], compression: grpc.Compression | None
) -> None:
    log = {"destination": "stdout", "sample": 1}
    async with start(access_log=log) as gateway, channel_to(gateway.listen) as channel:
        refused = await call(channel, b"\xff" * 2000, metadata=[("x-request-id", "m-1")], compression=compression)
        counts = await counted(gateway)
    assert (refused.code, refused.trailers["x-request-id"]) == (grpc.StatusCode.INTERNAL, "m-1")
    assert counts == {"other": 1.0}
    (line,) = [json.loads(each) for each in capsys.readouterr().out.splitlines() if each.startswith("{")]
    assert (line["code"], line["request_id"]) == ("INTERNAL", "m-1")
