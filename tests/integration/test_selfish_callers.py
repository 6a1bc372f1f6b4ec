"""What one caller does must not decide how others are served: where calls fail over, are repeated, or are kept."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from played_triton import Behaviour, PlayedTriton, hangs, played
from traffic import OK, config, gateway, http, patient, traffic, until, write
from triton_fixture import TritonFactory
from v2_calls import SERVICE, call, channel_to
from v2_calls import infer as tensor
from v2_gateways import transparent_to

from gateway.access.api_keys import hash_of
from gateway.app import Gateway


def infer(id: str = "", size: int = 4, model: str = "net") -> Any:
    from tritonclient.grpc import service_pb2 as pb  # noqa: PLC0415

    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="IN", datatype="UINT8", shape=[size])
    request.raw_input_contents.append(bytes(size))
    return request


def takes(seconds: float) -> Behaviour:
    async def behaviour(request: Any, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(seconds)

    return behaviour


@contextlib.asynccontextmanager
async def large_and_small(
    tmp_path: Path, large: Behaviour, small: Behaviour
) -> AsyncIterator[tuple[Gateway, PlayedTriton, PlayedTriton]]:
    """A model whose fallback is another one."""
    async with played(large) as one, played(small) as two:
        variants = {name: {"upstream": name, "model": "net"} for name in ("large", "small")}
        upstreams = {"large": patient(one.address), "small": patient(two.address)}
        async with gateway(write(tmp_path / "g.yaml", config(upstreams, {"net": {"variants": variants}}))) as running:
            yield running, one, two


async def test_a_caller_in_a_hurry_takes_nobody_the_variant_that_is_slower(tmp_path: Path) -> None:
    async with (
        large_and_small(tmp_path, takes(0.2), takes(0.001)) as (running, _large, _small),
        traffic(running.listen, infer("hurried"), callers=16, pause=0.02, timeout=0.1) as hurried,
        traffic(running.listen, infer("good"), callers=2) as good,
    ):
        await hurried.more(400)
        ended = await good.more(20)
        assert not good.failed, good.why()
        assert sum(each.variant == "large" for each in ended) > 0.9 * len(ended), good.variants()


async def test_input_that_one_variant_fails_takes_nobody_else_that_variant(tmp_path: Path) -> None:
    async def fails_odd(request: Any, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(0.002)
        if request.id == "odd":
            await context.abort(grpc.StatusCode.INTERNAL, "this shape has no engine")

    async with (
        large_and_small(tmp_path, fails_odd, takes(0.002)) as (running, _large, _small),
        traffic(running.listen, infer("good"), callers=2, pause=0.02) as good,
    ):
        await good.more(50)
        async with traffic(running.listen, infer("odd"), callers=6) as odd:
            await odd.more(1000)
            ended = await good.more(100)
        assert not good.failed, good.why()
        assert sum(each.variant == "large" for each in ended) > 0.9 * len(ended), good.variants()


async def refuses(request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


async def test_a_model_whose_servers_refuse_all_uses_up_no_other_model_s_retries(tmp_path: Path) -> None:
    async with played(refuses) as full1, played(refuses) as full2, played(refuses) as one, played() as two:
        models = {name: {"variants": {"only": {"upstream": name, "model": name}}} for name in ("full", "net")}
        upstreams = {"full": patient(full1.address, full2.address), "net": patient(one.address, two.address)}
        async with (
            gateway(write(tmp_path / "g.yaml", config(upstreams, models))) as running,
            channel_to(running.listen) as channel,
            traffic(running.listen, infer(model="full"), callers=8, pause=0) as full,
        ):
            await full.more(600)
            outcomes = await asyncio.gather(*(call(channel, infer()) for _ in range(40)))
            assert one.executed.total() > 0
            assert {outcome.code for outcome in outcomes} == {OK}, outcomes


async def fails_bad(request: Any, context: grpc.aio.ServicerContext) -> None:
    if request.id == "bad":
        await context.abort(grpc.StatusCode.INTERNAL, "this shape has no engine")
    await asyncio.sleep(0.005)


async def fails_all(request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "CUDA error")


@pytest.mark.parametrize("who", ["a caller", "a user"])
async def test_a_caller_whose_calls_always_fail_does_not_use_up_the_retries_of_others(tmp_path: Path, who: str) -> None:
    """The last calls are sent before a server is found to fail, and each of these needs the other one."""
    net: dict[str, Any] = {"variants": {"only": {"upstream": "all", "model": "net"}}, "retry": {"on": ["server"]}}
    more: dict[str, Any] = {}
    if who == "a caller":
        keys = {name: f"igk_{name}-{'0' * 40}" for name in ("eve", "ann")}
        named = {name: [("authorization", f"Bearer {key}")] for name, key in keys.items()}
        api_keys = [{"caller": name, "sha256": hash_of(key).hex()} for name, key in keys.items()]
        more["access"] = {"api_keys": api_keys, "grants": [{"callers": list(keys), "models": ["*"]}]}
    else:
        named = {name: [("x-user", name)] for name in ("eve", "ann")}
        net["sticky"] = {"metadata": "x-user"}
    async with played(fails_bad) as one, played(fails_bad) as two:
        file = write(tmp_path / "g.yaml", config({"all": [one.address, two.address]}, {"net": net}, **more))
        async with (
            gateway(file) as running,
            channel_to(running.listen) as channel,
            traffic(running.listen, infer("bad"), callers=8, pause=0, metadata=lambda _: named["eve"]) as bad,
        ):
            await bad.more(800)
            assert (await call(channel, infer("good"), metadata=named["ann"])).code is OK
            metrics = (await http(running.admin_address, "/metrics"))[1]
            assert 'gateway_retries_refused_total{model="net"}' in metrics
            one.behaviour = fails_all
            outcomes = await asyncio.gather(*(call(channel, infer("last"), metadata=named["ann"]) for _ in range(10)))
            assert one.executed["last"] > 0
            assert {outcome.code for outcome in outcomes} == {OK}, outcomes


async def test_large_requests_that_are_kept_meanwhile_take_no_room_from_messages_that_must_be_whole(
    tmp_path: Path,
) -> None:
    """Streams go on with one message at a time where the room is used up, and other messages are refused."""
    async with played(hangs) as triton:
        net = {"net": {"variants": {"only": {"upstream": "all", "model": "net"}}}}
        file = write(tmp_path / "g.yaml", config({"all": triton.address}, net, server={"max_collected_bytes": "16MiB"}))
        async with gateway(file) as running, contextlib.AsyncExitStack() as exits:
            channels = [await exits.enter_async_context(channel_to(running.listen)) for _ in range(4)]
            calls = [
                asyncio.ensure_future(call(channel, infer(str(number), size=1_000_000), timeout=30))
                for number, channel in enumerate(channels * 5)
            ]
            await until(lambda: triton.executed.total() == len(calls), 10, "all of them", str)
            budget = running._collected
            assert budget.has_room
            assert 2 << 20 < budget.kept <= 5 << 20
            for each in calls:
                each.cancel()
            await until(lambda: budget.kept == budget.held == 0, 10, "nothing kept", str)


async def test_who_cancels_large_requests_ends_no_triton(triton_factory: TritonFactory) -> None:
    """Triton 2.51 crashes when calls are reset as it answers them: mostly within two seconds of these."""
    triton = await triton_factory(["identity_fp32", "add_one_a"])
    async with transparent_to(triton.grpc_address) as running, contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel_to(running.listen)) for _ in range(12)]

        async def cancels(number: int) -> None:
            draw = random.Random(number)
            for _ in range(100):
                values = np.zeros((1, 100_000), np.float32)
                request = tensor(draw.choice(("identity_fp32", "add_one_a")), values).SerializeToString()
                asked = channels[number].unary_unary(f"{SERVICE}ModelInfer")(request)
                await asyncio.sleep(draw.uniform(0, 0.03))
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await asked

        await asyncio.gather(*map(cancels, range(12)))
        outcome = await call(channels[0], tensor("add_one_a"))
        assert outcome.code is OK, outcome.text
        assert triton.is_running
