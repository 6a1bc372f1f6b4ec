"""Quotas at a gateway: who is over one is refused before anything reaches Triton, by each way that there is to call."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from command_line import command
from google.rpc import error_details_pb2, status_pb2
from patience import ask_until
from played_triton import PlayedTriton, answers, played
from quota_server import needs_store, running_store
from runbook import as_the_page_says
from traffic import config, gateway, http, until, write
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, stream, stream_all

from gateway.app import Gateway
from gateway.v1 import prediction_pb2, prediction_pb2_grpc

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
ACME = (("x-tenant", "acme"),)
MODELS: dict[str, Any] = {
    "net": {"variants": {"only": {"upstream": "gpu", "model": "net"}}},
    "pipe": {
        "pipeline": {
            "inputs": [{"name": "IN", "datatype": "UINT8", "shape": [4]}],
            "outputs": [{"name": "OUT", "datatype": "INT32", "shape": []}],
            "steps": [{"call": "net", "inputs": {"IN": "IN"}, "outputs": {"OUT": "OUT"}}],
        }
    },
}
MODELS["also"] = {"variants": {"only": {"upstream": "gpu", "model": "other"}}}


def request(model: str = "net", rows: int = 1, id: str = "", size: int = 4) -> Any:
    asked = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[bytes(rows * size)])
    asked.inputs.add(name="IN", datatype="UINT8", shape=[rows, size])
    return asked


@asynccontextmanager
async def served(folder: Path, quotas: Any) -> AsyncIterator[tuple[Gateway, grpc.aio.Channel, PlayedTriton]]:
    async with played() as triton:
        file = write(
            folder / "gateway.yaml", config({"gpu": triton.address}, MODELS, quotas={"caller": "x-tenant", **quotas})
        )
        async with gateway(file) as running, channel_to(running.listen) as channel:
            yield running, channel, triton


def details(trailers: Any) -> tuple[Any, Any]:
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    retry, failure = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert status.details[0].Unpack(retry)
    assert status.details[1].Unpack(failure)
    return retry, failure


async def test_a_caller_over_his_quota_is_refused_and_told_whose_it_is_and_when_to_come_again(tmp_path: Path) -> None:
    async with served(tmp_path, {"callers": {"acme": {"requests": 2}}}) as (_, channel, triton):
        outcomes = await asyncio.gather(*(call(channel, request(id=str(n)), metadata=ACME) for n in range(8)))
        other = await call(channel, request(), metadata=(("x-tenant", "other"),))
    refused = next(each for each in outcomes if each.code is not grpc.StatusCode.OK)
    assert sum(each.code is grpc.StatusCode.OK for each in outcomes) >= 2
    assert refused.code is EXHAUSTED
    assert refused.text.startswith("The quota of caller 'acme' is used up: 2 requests per second; try again in 0.")
    retry, failure = details(refused.trailers)
    assert 0 < retry.retry_delay.nanos <= 500_000_000
    [violation] = failure.violations
    assert (violation.subject, violation.description) == ("caller:acme", "2 requests per second")
    assert other.code is grpc.StatusCode.OK
    assert sum(triton.executed.values()) == 1 + sum(each.code is grpc.StatusCode.OK for each in outcomes)


async def test_a_caller_who_only_says_that_he_has_many_rows_uses_up_nobodys_quota(tmp_path: Path) -> None:
    async with served(tmp_path, {"models": {"net": {"rows": 1000, "burst": "60s"}}}) as (_, channel, _):
        lie = request()
        lie.inputs[0].shape[0] = (1 << 31) - 1
        await call(channel, lie)
        answered = await call(channel, request(), metadata=ACME)
    assert answered.code is grpc.StatusCode.OK


async def test_whoever_comes_when_he_was_told_to_is_answered(tmp_path: Path) -> None:
    async with served(tmp_path, {"callers": {"acme": {"requests": 5, "burst": "200ms"}}}) as (_, channel, _):
        both = await asyncio.gather(*(call(channel, request(), metadata=ACME) for _ in range(2)))
        (refused,) = (each for each in both if each.code is not grpc.StatusCode.OK)
        await asyncio.sleep(details(refused.trailers)[0].retry_delay.nanos / 1e9)
        again = await call(channel, request(), metadata=ACME)
    assert (refused.code, again.code) == (EXHAUSTED, grpc.StatusCode.OK)


async def test_messages_of_a_stream_count_each_and_the_stream_goes_on(tmp_path: Path) -> None:
    async with served(tmp_path, {"callers": {"acme": {"requests": 0.01, "burst": "5m"}}}) as (_, channel, triton):
        answered = await stream_all(channel, [request(id=f"s{n}") for n in range(6)], ACME)
        unary = await call(channel, request(), metadata=ACME)
    errors = [each.error_message for each in answered]
    assert errors[:3] == [""] * 3
    assert all(text.startswith("The quota of caller 'acme' is used up") for text in errors[3:])
    assert [each.infer_response.id for each in answered] == [f"s{n}" for n in range(6)]
    assert unary.code is EXHAUSTED
    assert sum(triton.executed.values()) == 3


async def test_typed_calls_and_pipelines_count_once(tmp_path: Path) -> None:
    quotas = {
        "callers": {"acme": {"requests": 0.01, "burst": "5m"}},
        "models": {"net": {"requests": 0.01, "burst": "5m"}},
    }
    async with served(tmp_path, quotas) as (_, channel, triton):
        stub = prediction_pb2_grpc.PredictionServiceStub(channel)
        typed = prediction_pb2.PredictRequest(model="pipe")
        typed.inputs["IN"].CopyFrom(prediction_pb2.Tensor(datatype="UINT8", shape=[1, 4], raw=bytes(4)))
        await stub.Predict(typed, metadata=ACME)
        outcomes = [await call(channel, request("pipe"), metadata=ACME) for _ in range(3)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Predict(typed, metadata=ACME)
        others = [await call(channel, request("net")) for _ in range(4)]
    assert [each.code for each in outcomes] == [grpc.StatusCode.OK, grpc.StatusCode.OK, EXHAUSTED]
    assert details(outcomes[-1].trailers)[1].violations[0].subject == "caller:acme"
    assert refused.value.code() is EXHAUSTED
    assert details(dict(refused.value.trailing_metadata() or ()))
    # The pipeline's calls of `net` are its own: they came under no quota.
    assert [each.code for each in others] == [grpc.StatusCode.OK] * 3 + [EXHAUSTED]
    assert sum(triton.executed.values()) == 6


async def test_rows_and_bytes_count(tmp_path: Path) -> None:
    quotas = {"default": {"rows": 0.1, "burst": "5m"}, "models": {"also": {"bytes": 1, "burst": "5m"}}}
    async with served(tmp_path, quotas) as (_, channel, triton):
        rows = [await call(channel, request(rows=10), metadata=ACME) for _ in range(4)]
        size = [await call(channel, request("also", size=100), metadata=(("x-tenant", str(n)),)) for n in range(4)]
    assert [each.code for each in rows] == [grpc.StatusCode.OK] * 3 + [EXHAUSTED]
    assert size[0].code is grpc.StatusCode.OK
    assert size[-1].code is EXHAUSTED
    assert "of model 'also' is used up: 1 bytes per second" in size[-1].text
    assert sum(triton.executed.values()) == 3 + sum(each.code is grpc.StatusCode.OK for each in size)


async def test_a_large_request_is_refused_before_it_is_here(tmp_path: Path) -> None:
    large = request(size=8 << 20)
    async with served(tmp_path, {"default": {"bytes": "100KiB", "burst": "100s"}}) as (_, channel, triton):
        first = await call(channel, large, metadata=ACME)
        second = await call(channel, large, metadata=ACME)
    assert (first.code, second.code) == (grpc.StatusCode.OK, EXHAUSTED)
    assert sum(triton.executed.values()) == 1


async def test_concurrent_calls_and_messages_leave_their_places_however_they_end(tmp_path: Path) -> None:
    async with served(tmp_path, {"callers": {"acme": {"concurrent": 2}}}) as (running, channel, triton):
        go_on = asyncio.Event()

        async def hangs(request: Any, context: Any) -> None:
            await go_on.wait()

        triton.behaviour = hangs
        streaming = stream(channel, ACME)
        await streaming.write(request(id="s"))
        one = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
            request().SerializeToString(), metadata=ACME
        )
        await until(lambda: sum(triton.executed.values()) == 2, 10, "two are at Triton")
        third = await call(channel, request(), metadata=ACME)
        assert third.code is EXHAUSTED
        assert details(third.trailers)[1].violations[0].description == "2 calls at a time"
        one.cancel()
        streaming.cancel()
        in_flight: Callable[[], int] = lambda: running._quotas.of({"x-tenant": "acme"}, "net").accounts[0].in_flight  # noqa: E731
        await until(lambda: in_flight() == 0, 10, "the places are free")
        go_on.set()
        triton.behaviour = answers
        for _ in range(5):
            assert (await call(channel, request(), metadata=ACME)).code is grpc.StatusCode.OK
        assert (await call(channel, request("no-such-model"), metadata=ACME)).code is grpc.StatusCode.NOT_FOUND
        assert in_flight() == 0


async def test_state_and_metrics_say_what_is_left_and_what_was_refused_and_used(tmp_path: Path) -> None:
    quotas = {"callers": {"acme": {"requests": 0.01, "burst": "5m"}}, "default": {"rows": 0.1, "burst": "5m"}}
    async with served(tmp_path, quotas) as (running, channel, _):
        for _ in range(5):
            await call(channel, request(), metadata=ACME)
        await call(channel, request(rows=20), metadata=(("x-tenant", "one"),))
        await call(channel, request(rows=20), metadata=(("x-tenant", "one"),))
        _, state = await http(running.admin_address, "/state")
        # Usage is taken each second.
        usage = 'gateway_usage_rows_total{caller="other"'
        _, metrics = await ask_until(lambda: http(running.admin_address, "/metrics"), lambda found: usage in found[1])
    left = {quota["caller"]: quota["left"] for quota in state["quotas"]}
    assert left["acme"]["requests"] == pytest.approx(0, abs=0.1)
    assert left["one"]["rows"] == pytest.approx(10, abs=0.5)
    assert 'gateway_quota_refusals_total{caller="acme",model="",reason="requests"} 2.0' in metrics
    assert 'gateway_quota_refusals_total{caller="other",model="",reason="rows"} 1.0' in metrics
    assert 'gateway_usage_requests_total{caller="acme",model="net"} 3.0' in metrics
    assert 'gateway_usage_rows_total{caller="other",model="net"} 20.0' in metrics
    assert 'gateway_queue_full_total{model="net",where="gateway"}' not in metrics  # no overload
    assert "gateway_quota_store_away 0.0" in metrics


async def test_a_new_config_puts_quotas_in_force_without_a_restart(tmp_path: Path) -> None:
    async with served(tmp_path, {}) as (running, channel, triton):
        for _ in range(10):
            assert (await call(channel, request(), metadata=ACME)).code is grpc.StatusCode.OK
        quotas = {"caller": "x-tenant", "callers": {"acme": {"requests": 0.01}}}
        write(tmp_path / "gateway.yaml", config({"gpu": triton.address}, MODELS, quotas=quotas))
        running.reload()
        await until(lambda: running._quotas.is_on, 10, "the new config")
        outcomes = [await call(channel, request(), metadata=ACME) for _ in range(2)]
    assert [each.code for each in outcomes] == [grpc.StatusCode.OK, EXHAUSTED]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("usage-*.jsonl")) for line in file.read_text().splitlines()]


async def test_the_usage_log_survives_a_kill_with_at_most_an_interval_lost(tmp_path: Path) -> None:
    async with played() as triton:
        usage = {"directory": str(tmp_path / "usage"), "interval": "1s"}
        content = config({"gpu": triton.address}, MODELS, quotas={"caller": "x-tenant", "usage": usage})
        file = write(tmp_path / "gateway.yaml", content)
        async with command("serve", "--config", str(file), folder=tmp_path) as serving:
            listen, _ = await serving.until_serving()
            async with channel_to(listen) as channel:
                for _ in range(4):
                    await call(channel, request(rows=3), metadata=ACME)
            await until(lambda: sum(each["requests"] for each in lines_of(tmp_path / "usage")) == 4, 10, "the lines")
            serving.process.kill()
            await serving.wait()
        first = lines_of(tmp_path / "usage")
        async with command("serve", "--config", str(file), folder=tmp_path) as serving:
            listen, _ = await serving.until_serving()
            async with channel_to(listen) as channel:
                await call(channel, request("also"), metadata=ACME)
            serving.process.terminate()
            await serving.wait()
    lines = lines_of(tmp_path / "usage")
    assert lines[: len(first)] == first
    assert len({line["id"] for line in lines}) == len(lines)
    assert {(line["caller"], line["model"]) for line in lines} == {("acme", "net"), ("acme", "also")}
    assert sum(line["rows"] for line in lines) == 13
    assert sum(line["request_bytes"] for line in lines) == 4 * len(request(rows=3).SerializeToString()) + len(
        request("also").SerializeToString()
    )
    assert all(line["upstream_seconds"] > 0 and line["response_bytes"] > 0 for line in lines)


@needs_store
async def test_two_gateways_share_a_quota_and_serve_without_the_store(tmp_path: Path) -> None:
    with running_store() as store:
        shared = {"url": store.url, "gateways": 2, "timeout": "5s"}
        quotas = {"default": {"requests": 0.1, "burst": "5m"}, "shared": shared}  # 30 at once
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
        async with served(tmp_path / "a", quotas) as (a, at_a, _), served(tmp_path / "b", quotas) as (b, at_b, _):
            quotas_of = (a._quotas.shared, b._quotas.shared)
            await until(lambda: all(each is not None and each.share == 0.5 for each in quotas_of), 10, "both are known")
            answered = 0
            end = time.monotonic() + 30
            while answered < 30 and time.monotonic() < end:
                for channel in (at_a, at_b):
                    outcome = await call(channel, request(), metadata=ACME)
                    answered += outcome.code is grpc.StatusCode.OK
                await asyncio.sleep(0.03)
            assert 28 <= answered <= 34  # the rate adds one in ten seconds, and each half of the last one
            _, metrics = await http(a.admin_address, "/metrics")
            assert "gateway_quota_store_away 0.0" in metrics
            store.stop()
            await until(lambda: all(each is not None and each.is_away for each in quotas_of), 10, "it is away")
            others = await call(at_a, request(), metadata=(("x-tenant", "beta"),))
            assert others.code is grpc.StatusCode.OK  # of its own share
            again = [await call(channel, request(), metadata=ACME) for channel in (at_a, at_b) for _ in range(15)]
            # What is used up stays used up: ten calls take 100 s.
            assert sum(each.code is grpc.StatusCode.OK for each in again) < 10
            _, metrics = await http(a.admin_address, "/metrics")
            assert "gateway_quota_store_away 1.0" in metrics
            _, state = await http(a.admin_address, "/state")
            assert state["quota_store"] == "away"
            await as_the_page_says("quota-store-away", a.admin_address, tmp_path, {})
            store.start()
            await until(lambda: all(each is not None and not each.is_away for each in quotas_of), 10, "it is back")
