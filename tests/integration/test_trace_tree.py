"""The gateway's spans and Triton's own, at one OTLP receiver: one tree per call, and nothing for unsampled calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from patience import wait_until
from receiver import receiving
from triton_fixture import FAST_START
from v2_calls import call, channel_to, infer, numbers, stream_all

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.triton import LocalTriton
from gateway.upstream.endpoint import State

MODELS = ("add_one_a",)


@dataclass(frozen=True)
class SpanRead:
    """One exported span, whoever sent it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    links: tuple[str, ...] = ()  # ids of spans


@dataclass
class Receiver:
    """An OTLP/HTTP receiver: protobuf from the gateway, JSON from Triton."""

    spans: list[SpanRead] = field(default_factory=list)
    url: str = ""

    async def post(self, request: web.Request) -> web.Response:
        if request.content_type == "application/json":
            self._take(await request.json())
        else:
            self._take_message(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type=request.content_type)

    def of(self, service: str) -> list[SpanRead]:
        return [span for span in self.spans if span.service == service]

    def _take(self, document: dict[str, Any]) -> None:
        for group in document["resourceSpans"]:
            service = _plain(group["resource"]["attributes"])["service.name"]
            for span in (span for scope in group["scopeSpans"] for span in scope["spans"]):
                self.spans.append(
                    SpanRead(
                        service,
                        span["name"],
                        span["traceId"],
                        span["spanId"],
                        span.get("parentSpanId", ""),
                        _plain(span.get("attributes", [])),
                    )
                )

    def _take_message(self, message: ExportTraceServiceRequest) -> None:
        for group in message.resource_spans:
            service = _values(group.resource)["service.name"]
            for span in (span for scope in group.scope_spans for span in scope.spans):
                ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                links = tuple(link.span_id.hex() for link in span.links)
                self.spans.append(SpanRead(service, span.name, *ids, _values(span), links))


def _plain(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["key"]: next(iter(each["value"].values())) for each in attributes}


def _values(message: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes}


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with receiving("/v1/traces", receiver.post) as receiver.url:
        yield receiver


@pytest.fixture(scope="module")
async def traced_triton(receiver: Receiver, triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """A Triton that traces every request, so that one whose parent it lost is not missing but a trace of its own."""
    trace = ("mode=opentelemetry", f"opentelemetry,url={receiver.url}/v1/traces", "rate=1", "level=TIMESTAMPS")
    batches = "opentelemetry,bsp_schedule_delay=100"
    extra = (*FAST_START, *(f"--trace-config={each}" for each in (*trace, batches)))
    server = LocalTriton(triton_repository, models=MODELS, extra=extra)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
async def gateway(
    receiver: Receiver,
    traced_triton: LocalTriton,
    unused_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Gateway]:
    """A gateway with traces on, configured as an operator does it."""
    for name, value in {"ENDPOINT": receiver.url, "TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    content = {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "telemetry": {"access_log": {"destination": "none"}},
        "upstreams": {
            "main": {"endpoints": [traced_triton.grpc_address]},
            "gone": {"endpoints": [f"127.0.0.1:{unused_port}"], "probe_interval": "10m"},
        },
        "models": {
            "adder": {"variants": {"only": {"upstream": "main", "model": "add_one_a"}}},
            "fallen": {
                "variants": {
                    "gone": {"upstream": "gone", "model": "add_one_a"},
                    "here": {"upstream": "main", "model": "add_one_a"},
                },
                "split": {"gone": 1},
            },
            "best": {
                "pipeline": {
                    "inputs": [{"name": "IN", "datatype": "FP32", "shape": [4]}],
                    "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1]}],
                    "steps": [
                        {"call": "fallen", "inputs": {"IN": "IN"}, "outputs": {"OUT": "scores"}},
                        {"step": "top_k", "with": {"k": 1}},
                    ],
                }
            },
            "merged": {
                "variants": {"only": {"upstream": "main", "model": "add_one_a"}},
                "merge": {"ignore_ids": True},
            },
        },
    }
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(content))
    loaded = load(file, {})
    receiver.spans.clear()
    async with Gateway(loaded, lambda: loaded, os.environ, Place("127.0.0.1:0")) as running:
        await wait_until(lambda: running.shown.readiness()[0])
        yield running


def parent_of(number: int, flag: str = "01") -> tuple[str, str]:
    return "traceparent", f"00-{number:032x}-{number:016x}-{flag}"


async def until_exported(receiver: Receiver, gateway_spans: int, triton_spans: int) -> None:
    for _ in range(600):
        mine, theirs = len(receiver.of("inference-gateway")), len(receiver.of("triton-inference-server"))
        if mine >= gateway_spans and theirs >= triton_spans:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{mine} and {theirs} spans came instead of {gateway_spans} and {triton_spans}")


async def test_triton_s_spans_and_the_gateway_s_are_one_tree(gateway: Gateway, receiver: Receiver) -> None:
    """Triton itself loses a few per cent of the parents; those spans name their attempt in the request's id."""
    calls = range(1, 41)
    async with channel_to(gateway.listen) as channel:
        for number in calls:
            answer = await call(channel, infer("adder"), metadata=[parent_of(number)])
            assert numbers(answer.response) == [2.0, 3.0]
            assert answer.response.id == ""
            assert answer.response.model_name == "adder"
    await until_exported(receiver, 2 * len(calls), 3 * len(calls))

    mine, theirs = receiver.of("inference-gateway"), receiver.of("triton-inference-server")
    servers = {span.trace: span for span in mine if span.parent == f"{int(span.trace, 16):016x}"}
    attempts = {span.parent: span for span in mine if span.trace in servers and span is not servers[span.trace]}
    assert servers.keys() == {f"{number:032x}" for number in calls}
    assert attempts.keys() == {span.id for span in servers.values()}
    joined = strays = 0
    for model in (span for span in theirs if span.name == "add_one_a"):
        trace, span = model.attributes["triton.request_id"].split("-")
        attempt = attempts[servers[trace].id]
        assert attempt.id == span
        (request,) = (each for each in theirs if each.id == model.parent)
        if (request.trace, request.parent) == (trace, attempt.id):
            joined += 1
        else:
            strays += 1
    assert joined + strays == len(calls)
    assert joined >= 0.8 * len(calls)


async def test_steps_attempts_and_the_fallback_are_in_the_tree(gateway: Gateway, receiver: Receiver) -> None:
    """A pipeline whose model has lost a variant since the last probe."""
    for endpoint in gateway._topology.now.pools["gone"].endpoints:
        endpoint.state = State.READY
    async with channel_to(gateway.listen) as channel:
        answer = await call(channel, infer("best", [[1.0, 2.0, 3.0, 4.0]]), metadata=[parent_of(3)])
        assert answer.code is grpc.StatusCode.OK, answer.text
    await until_exported(receiver, 4, 3)
    mine = {span.id: span for span in receiver.of("inference-gateway")}
    (server,) = (span for span in mine.values() if span.parent == f"{3:016x}")
    assert server.attributes["gateway.model"] == "best"
    below = [span for span in mine.values() if span.parent == server.id]
    assert len(below) == len(mine) - 1
    attempts = sorted((span for span in below if "gateway.why" in span.attributes), key=_number)
    assert [(each.attributes["gateway.variant"], each.attributes.get("gateway.meaning")) for each in attempts] == [
        ("gone", "unreachable"),
        ("here", None),
    ]
    assert attempts[1].attributes["gateway.why"] == "fallback"
    assert [span.name for span in below if "gateway.step" in span.attributes] == ["step top_k"]
    (model,) = (span for span in receiver.of("triton-inference-server") if span.name == "add_one_a")
    assert model.attributes["triton.request_id"] == f"{3:032x}-{attempts[1].id}"


def _number(span: SpanRead) -> int:
    return int(span.attributes["gateway.attempt"])


async def test_unsampled_calls_reach_triton_as_they_came(gateway: Gateway, receiver: Receiver) -> None:
    """No span here, no parent and no other id there."""
    async with channel_to(gateway.listen) as channel:
        for number in range(1, 6):
            answer = await call(channel, infer("adder", id="mine"), metadata=[parent_of(number, "00")])
            assert answer.response.id == "mine"
        await call(channel, infer("adder"), metadata=[parent_of(9)])
    await until_exported(receiver, 2, 3 * 6)
    assert {span.trace for span in receiver.of("inference-gateway")} == {f"{9:032x}"}
    models = [span for span in receiver.of("triton-inference-server") if span.name == "add_one_a"]
    ids = [span.attributes["triton.request_id"] for span in models]
    assert sorted(id for id in ids if "-" not in id) == ["mine"] * 5
    assert not {f"{number:032x}" for number in range(1, 6)} & {span.trace for span in models}


async def test_an_error_names_the_caller_s_id_and_not_the_span(gateway: Gateway, receiver: Receiver) -> None:
    """A batch of 9 rows where 8 are allowed."""
    too_many = infer("adder", [[1.0]] * 9, id="mine")
    async with channel_to(gateway.listen) as channel:
        unsampled = await call(channel, too_many, metadata=[parent_of(1, "00")])
        sampled = await call(channel, too_many, metadata=[parent_of(1)])
    assert "[request id: mine]" in unsampled.text
    assert (sampled.code, sampled.text) == (unsampled.code, unsampled.text)


async def test_a_stream_s_requests_are_told_apart_by_their_ids(gateway: Gateway, receiver: Receiver) -> None:
    """Triton gives all requests of a stream one parent: the ids say which attempt each belongs to."""
    async with channel_to(gateway.listen) as channel:
        requests = [infer("adder", [[float(number)]]) for number in range(3)]
        answers = await stream_all(channel, requests, [parent_of(7)])
    assert [answer.infer_response.id for answer in answers] == ["", "", ""]
    await until_exported(receiver, 6, 9)
    ids = [span.attributes["triton.request_id"] for span in receiver.spans if span.name == "add_one_a"]
    attempts = {span.id for span in receiver.of("inference-gateway") if span.attributes.get("gateway.attempt")}
    assert {id.partition("-")[2] for id in ids} == attempts


async def test_a_traced_request_keeps_the_id_that_its_caller_gave(gateway: Gateway, receiver: Receiver) -> None:
    """Models act on ids. The gateway's span has it too, so Triton's is found by it."""
    async with channel_to(gateway.listen) as channel:
        await call(channel, infer("adder", id="41"), metadata=[parent_of(7)])
        await stream_all(channel, [infer("adder", id="42")], [parent_of(8)])
    await until_exported(receiver, 4, 6)
    ids = [span.attributes["triton.request_id"] for span in receiver.spans if span.name == "add_one_a"]
    assert sorted(ids) == ["41", "42"]
    ours = [span.attributes.get("gateway.request_id") for span in receiver.of("inference-gateway")]
    assert {"41", "42"} <= set(ours)


@pytest.mark.parametrize("gateway", ["wire"], indirect=True)
async def test_attempts_that_travel_together_link_to_the_one_that_triton_is_told_of(
    gateway: Gateway, receiver: Receiver
) -> None:
    calls = range(1, 13)
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel_to(gateway.listen)) for _ in range(4)]
        await call(channels[0], infer("merged"), metadata=[parent_of(99, "00")])  # the model's config is asked for
        await asyncio.sleep(0.3)
        going = [
            call(channels[n % 4], infer("merged", [[float(n)]], id=f"r-{n}"), metadata=[parent_of(n)]) for n in calls
        ]
        answers = await asyncio.gather(*going)
    assert [numbers(answer.response) for answer in answers] == [[n + 1.0] for n in calls]
    assert [answer.response.id for answer in answers] == [f"r-{n}" for n in calls]
    await until_exported(receiver, 2 * len(calls), 3 * 3)
    attempts = {span.id: span for span in receiver.of("inference-gateway") if "gateway.attempt" in span.attributes}
    merged = [span for span in attempts.values() if span.attributes.get("gateway.batch.requests", 1) > 1]
    carriers = [span for span in merged if not span.links]
    assert carriers
    for carrier in carriers:
        riders = [span for span in merged if span.links == (carrier.id,)]
        assert len(riders) + 1 == carrier.attributes["gateway.batch.requests"]
    assert len(merged) == sum(span.attributes["gateway.batch.requests"] for span in carriers)
    models = [span for span in receiver.of("triton-inference-server") if span.name == "add_one_a"]
    told = {span.attributes.get("triton.request_id", "").partition("-")[2] for span in models}
    assert {carrier.id for carrier in carriers} <= told


async def test_a_large_request_is_traced_like_any_other(gateway: Gateway, receiver: Receiver) -> None:
    """Large enough to be passed on as it arrives."""
    async with channel_to(gateway.listen) as channel:
        answer = await call(channel, infer("adder", [[1.0] * 600_000]), metadata=[parent_of(5)])
    assert (answer.response.id, len(answer.response.raw_output_contents[0])) == ("", 2_400_000)
    await until_exported(receiver, 2, 3)
    (model,) = (span for span in receiver.spans if span.name == "add_one_a")
    assert model.attributes["triton.request_id"].startswith(f"{5:032x}-")
