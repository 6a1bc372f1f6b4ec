"""What one endpoint's faults cost callers, by the bars of docs/reliability.md. Tritons are played (`played_triton`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from played_triton import SERVICE, PlayedTriton, fails_at_once, hangs, played, processes
from runbook import as_the_page_says
from traffic import OK, UNAVAILABLE, Traffic, config, gateway, http, patient, traffic, write
from v2_calls import call, channel_to

from gateway.app import Gateway

NET = {"net": {"variants": {"only": {"upstream": "all", "model": "net"}}}}


def infer(id: str = "", size: int = 4, **parameters: Any) -> Any:
    from tritonclient.grpc import service_pb2 as pb  # noqa: PLC0415

    request = pb.ModelInferRequest(model_name="net", id=id)
    request.inputs.add(name="IN", datatype="UINT8", shape=[size])
    request.raw_input_contents.append(bytes(size))
    return request


@contextlib.asynccontextmanager
async def pair(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[Gateway, PlayedTriton, PlayedTriton]]:
    """A gateway with one upstream of two servers."""
    async with played() as one, played() as two:
        file = write(tmp_path / "g.yaml", config({"all": [one.address, two.address]}, {**NET, **more}))
        async with gateway(file) as running:
            yield running, one, two


def share_of_failures(calls: Traffic, since: float) -> float:
    ended = calls.since(since)
    assert len(ended) > 200
    return sum(each.code is not OK for each in ended) / len(ended)


def ejected(running: Gateway, upstream: str = "all") -> list[str]:
    """The addresses that are left alone."""
    state: Any = running.shown.state()
    return [each["address"] for each in state["upstreams"][upstream] if each["ejected"]]


async def test_one_of_two_servers_that_fails_every_call_at_once_fails_hardly_any_and_gets_calls_when_it_is_well(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (running, one, two), traffic(running.listen, infer(), callers=8) as calls:
        await calls.more(200)
        one.behaviour = fails_at_once
        await asyncio.sleep(2)
        await calls.until(lambda: one.address in ejected(running), 30, "it is left alone")
        since = time.monotonic()
        await calls.more(400)
        assert share_of_failures(calls, since) <= 0.01
        metrics = (await http(running.admin_address, "/metrics"))[1]
        assert f'gateway_endpoint_ejections_total{{address="{one.address}",model="net",upstream="all"}} ' in metrics
        assert ejected(running) == [one.address]
        here = {"upstreams.gpu": "upstreams.all", "efficientnet_fp32": "net"}
        await as_the_page_says("one-triton-fails", running.admin_address, tmp_path, here)
        one.behaviour = two.behaviour
        well = time.monotonic()
        await calls.until(lambda: calls.latest()[one.address] > 25, 25, "its share again")
        assert not [each for each in calls.since(well + 1) if each.code is not OK]


async def test_a_server_that_fails_its_probe_inferences_gets_no_call_however_healthy_it_says_it_is(
    tmp_path: Path,
) -> None:
    variant = {"upstream": "all", "model": "net", "probe": {"interval": "200ms"}}
    async with played(fails_at_once) as one, played() as two:
        content = config({"all": [one.address, two.address]}, {"net": {"variants": {"only": variant}}})
        file = write(tmp_path / "g.yaml", content)
        async with gateway(file) as running, traffic(running.listen, infer("caller"), callers=4) as calls:
            await calls.more(200)
            assert not calls.failed, calls.why()
            assert one.executed["caller"] == 0
            await calls.until(lambda: one.executed[""] > 2, 10, "it is tried out again and again")
            assert one.executed["caller"] == 0
            state: Any = running.shown.state()
            shown = {each["address"]: (each["state"], each["probed"]) for each in state["upstreams"]["all"]}
            assert "CUDA error" in shown[one.address][1]["net"]
            assert shown[one.address][0] == "ready"
            assert shown[two.address][1] == {"net": "well"}
            ok = "gateway_endpoint_probe_inference_ok"
            metrics = (await http(running.admin_address, "/metrics"))[1]
            assert f'{ok}{{address="{one.address}",model="net",upstream="all"}} 0.0' in metrics
            assert f'{ok}{{address="{two.address}",model="net",upstream="all"}} 1.0' in metrics
            here = {
                "efficientnet_fp32": "net",
                "imagenet": "net",
                "fp32": "only",
                "gpu/": "all/",
                "gateway.yaml": "g.yaml",
            }
            await as_the_page_says("probe-fails", running.admin_address, tmp_path, here)
            one.behaviour, two.behaviour = two.behaviour, one.behaviour
            await calls.until(lambda: calls.latest()[one.address] > 25, 20, "its share")
            began = time.monotonic()
            await calls.more(200)
            assert not [each for each in calls.since(began) if each.code is not OK], calls.why()
            assert set(calls.endpoints(began)) == {one.address}


@pytest.mark.parametrize(("retry", "deaths"), [({}, 2), ({"retry": {"on": []}}, 1)], ids=["default", "on nothing"])
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_a_request_that_crashes_its_server_does_not_go_on_to_crash_them_all(
    tmp_path: Path, retry: dict[str, Any], deaths: int, method: str
) -> None:
    async with processes(3) as servers:
        upstreams = {"gpu": [servers[0][1], servers[1][1]], "cpu": servers[2][1]}
        variants = {name: {"upstream": name, "model": "net"} for name in upstreams}
        file = write(tmp_path / "g.yaml", config(upstreams, {"net": {"variants": variants, "attempts": 5, **retry}}))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            if method == "ModelInfer":
                outcome = await call(channel, infer("crash"))
                assert outcome.code is UNAVAILABLE
                assert "may have been executed" in outcome.text
            else:
                (error,) = await stream(channel, infer("crash"))
                assert "broke before the last answer" in error.error_message
            await asyncio.sleep(0.2)
            assert sum(process.returncode is not None for process, _ in servers) == deaths
            assert (await call(channel, infer("good"))).code is OK


async def stream(channel: grpc.aio.Channel, *requests: Any) -> list[Any]:
    """The answers of one ModelStreamInfer."""
    from tritonclient.grpc import service_pb2 as pb  # noqa: PLC0415

    method = channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    return [answer async for answer in method(iter(requests), timeout=10)]


async def test_a_server_that_hangs_at_inference_costs_an_attempt_and_not_the_call_and_is_left_alone(
    tmp_path: Path,
) -> None:
    net = {"variants": {"only": {"upstream": "all", "model": "net", "attempt_timeout": "3s"}}}
    async with pair(tmp_path, net=net) as (running, one, _two), traffic(running.listen, infer(), callers=8) as calls:
        await calls.more(200)
        one.behaviour = hangs
        before = one.executed.total()
        await calls.more(50)
        await calls.until(lambda: one.address in ejected(running), 30, "it is left alone")
        await calls.more(300)
        assert not calls.failed, calls.why()
        assert before > 50
        assert one.executed.total() - before < 60


async def test_a_call_that_must_not_run_twice_ends_with_its_attempt(tmp_path: Path) -> None:
    variants = {"only": {"upstream": "all", "model": "net", "attempt_timeout": "100ms"}}
    async with pair(tmp_path, net={"variants": variants, "retry": {"on": []}}) as (running, one, two):
        one.behaviour = two.behaviour = hangs
        async with channel_to(running.listen) as channel:
            outcome = await call(channel, infer("1"))
            assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "may have been executed" in outcome.text
            assert one.executed["1"] + two.executed["1"] == 1


async def refuses_with_pushback(request: Any, context: grpc.aio.ServicerContext) -> None:
    context.set_trailing_metadata((("grpc-retry-pushback-ms", request.id),))
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "later")


async def test_a_server_s_pushback_is_kept_to(tmp_path: Path) -> None:
    async with pair(tmp_path) as (running, one, two), channel_to(running.listen) as channel:
        one.behaviour = two.behaviour = refuses_with_pushback
        assert (await call(channel, infer("-1"))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert one.executed["-1"] + two.executed["-1"] == 1
        began = time.monotonic()
        assert (await call(channel, infer("300"))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert one.executed["300"] + two.executed["300"] == 2
        assert time.monotonic() - began > 0.28
        assert (await call(channel, infer("600000"), timeout=60)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_retries_end_with_their_budget(tmp_path: Path) -> None:
    """A fifth of the calls, and ten per second of the last ten."""
    async with pair(tmp_path) as (running, one, two), traffic(running.listen, infer("-"), callers=8, pause=0) as calls:

        async def refuses(request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

        one.behaviour = two.behaviour = refuses
        await calls.more(1000)
        made = one.executed["-"] + two.executed["-"]
        assert made <= 1.2 * len(calls.calls) + 110
        metrics = (await http(running.admin_address, "/metrics"))[1]
        assert 'gateway_retries_refused_total{model="net"}' in metrics


class Switch:
    """A virtual address before a server. What is swallowed gets no answer ever after, as if its node was gone."""

    def __init__(self, behind: str) -> None:
        self._behind = behind
        self._links: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.accepted = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        host, _, port = self._behind.rpartition(":")
        other_reader, other_writer = await asyncio.open_connection(host, int(port))
        links = [asyncio.ensure_future(_copy(*pair)) for pair in ((reader, other_writer), (other_reader, writer))]
        self._links.update(links)
        await asyncio.wait(links)

    def swallow(self) -> None:
        """The connections that there are now; new ones work."""
        for link in self._links:
            link.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def test_connections_that_lead_nowhere_any_more_are_dialled_anew_within_seconds(tmp_path: Path) -> None:
    async with played() as triton:
        switch = Switch(triton.address)
        server = await asyncio.start_server(switch.carry, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        file = write(tmp_path / "g.yaml", config({"all": address}, NET))
        async with gateway(file) as running, traffic(running.listen, infer(), timeout=2) as calls:
            await calls.more(50)
            before = switch.accepted
            switch.swallow()
            await calls.until(lambda: bool(calls.calls) and calls.calls[-1].code is not OK, 5, "a failure")
            await calls.until(lambda: {each.code for each in calls.calls[-50:]} == {OK}, 10, "calls again")
            assert switch.accepted > before
        server.close()


async def stops(request: Any, context: grpc.aio.ServicerContext) -> None:
    text = "Server is stopping, scheduler for model has stopped accepting new inference requests"
    await context.abort(grpc.StatusCode.UNAVAILABLE, f"[request id: {request.id or '<id_unknown>'}] {text}")


async def test_large_requests_are_sent_again_too_whole_and_unchanged(tmp_path: Path) -> None:
    """400 KB are passed on as they arrive, and kept meanwhile as long as there is room."""
    async with pair(tmp_path) as (running, one, two), channel_to(running.listen) as channel:
        got: list[bytes] = []

        async def keeps(request: Any, context: grpc.aio.ServicerContext) -> None:
            got.append(request.SerializeToString())

        one.behaviour, two.behaviour = stops, keeps
        requests = [infer(str(number), size=400_000 + number) for number in range(30)]
        for request in requests:
            request.raw_input_contents[0] = bytes(number % 251 for number in range(len(request.raw_input_contents[0])))
        outcomes = await asyncio.gather(*(call(channel, request) for request in requests))
        assert {outcome.code for outcome in outcomes} == {OK}
        assert one.executed.total() > 5
        sent = [request.SerializeToString() for request in requests]
        assert sorted(got, key=len) == sorted(sent, key=len)
        assert running._collected.held == running._collected.kept == 0


@pytest.mark.parametrize("size", [100_000, 3_000_000])
async def test_large_requests_that_have_waited_for_their_turn_are_sent_whole_and_unchanged(
    tmp_path: Path, size: int
) -> None:
    """They are collected meanwhile: up to a stream's window, or all of it."""
    net = {"variants": {"only": {"upstream": "all", "model": "other", "limit": 1}}}
    async with pair(tmp_path, net=net) as (running, one, two), channel_to(running.listen) as channel:
        got: list[bytes] = []

        async def keeps(request: Any, context: grpc.aio.ServicerContext) -> None:
            await asyncio.sleep(0.01)
            got.append(request.raw_input_contents[0])

        one.behaviour = two.behaviour = keeps
        requests = [infer(str(number), size=size + number) for number in range(8)]
        for request in requests:
            request.raw_input_contents[0] = bytes(range(251)) * (size // 251) + bytes(size % 251 + int(request.id))
        outcomes = await asyncio.gather(*(call(channel, request) for request in requests))
        assert {outcome.code for outcome in outcomes} == {OK}
        assert sorted(got, key=len) == [request.raw_input_contents[0] for request in requests]
        assert running._collected.held == running._collected.kept == 0


async def test_what_could_not_be_kept_is_not_sent_again_in_parts(tmp_path: Path) -> None:
    async with pair(tmp_path) as (running, one, two), channel_to(running.listen) as channel:
        one.behaviour = two.behaviour = stops
        running._collected.keep(running._collected.most)
        outcome = await call(channel, infer("1", size=1_000_000))
        assert outcome.code is UNAVAILABLE
        assert one.executed["1"] + two.executed["1"] == 1
        running._collected.keep(-running._collected.most)
        assert running._collected.held == running._collected.kept == 0


@contextlib.asynccontextmanager
async def gpu_and_cpu(tmp_path: Path) -> AsyncIterator[tuple[Gateway, PlayedTriton, PlayedTriton]]:
    """A model on one server, with another one as its fallback."""
    async with played() as gpu, played() as cpu:
        variants = {name: {"upstream": name, "model": "net"} for name in ("gpu", "cpu")}
        upstreams = {"gpu": patient(gpu.address), "cpu": patient(cpu.address)}
        async with gateway(write(tmp_path / "g.yaml", config(upstreams, {"net": {"variants": variants}}))) as running:
            yield running, gpu, cpu


async def test_a_variant_that_fails_every_call_at_once_gives_way_to_its_fallback_and_returns(tmp_path: Path) -> None:
    async with gpu_and_cpu(tmp_path) as (running, gpu, _), traffic(running.listen, infer(), callers=8) as calls:
        await calls.more(100)
        well = gpu.behaviour
        gpu.behaviour = fails_at_once
        await asyncio.sleep(2)
        await calls.until(lambda: bool(ejected(running, "gpu")), 30, "it is left alone")
        since = time.monotonic()
        await calls.more(400)
        assert share_of_failures(calls, since) <= 0.01
        gpu.behaviour = well
        await calls.until(lambda: calls.latest()["gpu"] > 25, 25, "back on the first variant")


async def test_input_that_fails_everywhere_takes_nobody_his_variant(tmp_path: Path) -> None:
    """However many such calls there are."""

    async def fails_bad(request: Any, context: grpc.aio.ServicerContext) -> None:
        if request.id == "bad":
            await context.abort(grpc.StatusCode.INTERNAL, "this can't be")

    async with gpu_and_cpu(tmp_path) as (running, gpu, cpu):
        gpu.behaviour = cpu.behaviour = fails_bad
        async with traffic(running.listen, infer("bad"), callers=6, pause=0) as bad:
            await bad.more(1000)
            async with traffic(running.listen, infer("good"), callers=2) as good:
                await good.more(300)
                assert not good.failed, good.why()
                assert good.variants()["gpu"] > 0.9 * len(good.calls)  # the rest is a sample
            metrics = (await http(running.admin_address, "/metrics"))[1]
            assert "gateway_endpoint_ejections_total{" not in metrics
