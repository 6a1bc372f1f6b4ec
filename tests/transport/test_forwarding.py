"""Bytes through a server and a channel, whole and cut through: nothing is lost, crossed, or kept."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from aio_channel import WireChannel
from grpc_peers import UNLIMITED, Service, grpcio_server, path, wire_server
from patience import HANG
from plain_relay import relay
from traffic import until

from gateway.http2.limits import KiB, Limits, MiB
from gateway.rpc.client import ClientCall
from gateway.rpc.server import ServerCall
from gateway.transport.dialer import ChannelOptions
from gateway.transport.listener import ForwardMethod

UNARY = path("Unary")


@pytest.fixture
def service() -> Service:
    return Service()


@pytest_asyncio.fixture(params=["grpcio", "wire"])
async def through(request: pytest.FixtureRequest, service: Service) -> AsyncIterator[Any]:
    """A grpcio channel to a relay to `service`, served by grpcio or by ourselves."""
    async with AsyncExitStack() as stack:
        upstream = grpcio_server(service) if request.param == "grpcio" else wire_server(service)
        _, address = await stack.enter_async_context(upstream)
        channel = await stack.enter_async_context(WireChannel(address))
        server, front = await stack.enter_async_context(wire_server(forward={UNARY: relay(lambda: channel)}))
        yield await stack.enter_async_context(grpc.aio.insecure_channel(front, options=UNLIMITED))
        await until(lambda: (server.calls, channel.calls) == (0, 0), HANG, "all calls have ended")


@pytest.mark.parametrize("size", [0, 1, 16 * KiB, 64 * KiB, 64 * KiB + 1, 602_112, 16 * MiB])
async def test_messages_of_every_size_come_through(through: Any, size: int) -> None:
    body = bytes(i % 247 for i in range(4096)) * (size // 4096 + 1)
    assert await through.unary_unary(UNARY)(body[:size]) == body[:size]


async def test_metadata_and_statuses_come_through_unchanged(through: Any) -> None:
    metadata = (("x-one", "1"), ("x-raw-bin", b"\0\xff"))
    call = through.unary_unary(UNARY)(b"metadata", metadata=metadata)
    assert await call == repr(list(metadata)).encode()
    assert list(await call.initial_metadata()) == [("initial", "1"), ("initial-bin", b"\1")]
    assert list(await call.trailing_metadata()) == [("trailing", "2"), ("trailing", "3"), ("trailing-bin", b"\2")]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await through.unary_unary(UNARY)(b"abort")
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.NOT_FOUND, "100 % näh")
    assert list(error.value.trailing_metadata() or ()) == [("k", "v"), ("k-bin", b"\0\xff")]


@pytest.mark.parametrize("size", [100, 500_000])
async def test_compressed_messages_come_through(through: Any, size: int) -> None:
    body = b"gzip " + random.Random(1).randbytes(size)
    assert await through.unary_unary(UNARY)(body, compression=grpc.Compression.Gzip) == body


async def test_a_cancelled_call_is_cancelled_upstream(through: Any, service: Service) -> None:
    call = through.unary_unary(UNARY)(b"sleep")
    await service.started.wait()
    call.cancel()
    await asyncio.wait_for(service.cancelled.wait(), HANG)


async def test_a_deadline_passes_upstream(through: Any, service: Service) -> None:
    left = float(await through.unary_unary(UNARY)(b"time", timeout=2000))
    assert 2000 - HANG < left < 2100  # C-core rounds timeouts up
    seconds = 0.1
    while not service.started.is_set():  # a call whose time is up on its way says nothing
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await through.unary_unary(UNARY)(b"sleep", timeout=seconds)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        seconds *= 2
    await asyncio.wait_for(service.cancelled.wait(), HANG)


async def test_no_answer_ever_reaches_another_caller(service: Service) -> None:
    """Nonces under random cancels, deadlines and upstream deaths; every answer must echo its own."""
    chance = random.Random(7)
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(wire_server(service)) for _ in range(2)]
        channels = [await stack.enter_async_context(WireChannel(address)) for _, address in servers]
        pick = relay(lambda: chance.choice(channels))
        front, address = await stack.enter_async_context(wire_server(forward={UNARY: pick}))
        client = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=UNLIMITED))
        unary = client.unary_unary(UNARY)
        outcomes: dict[str, int] = {}

        async def one(number: int) -> None:
            size = chance.choice([0, 10, 10, 10, 5000, 100_000])
            body = b"nonce-%d " % number + bytes(size)
            timeout = chance.choice([None] * 6 + [HANG] * 3 + [0.002])
            call = unary(body, timeout=timeout)
            if chance.random() < 0.1:
                asyncio.get_running_loop().call_later(chance.random() * 0.01, call.cancel)
            try:
                assert await call == body
                outcome = "OK"
            except grpc.aio.AioRpcError as error:
                outcome = error.code().name
            except asyncio.CancelledError:
                outcome = "cancelled"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        async def deaths() -> None:
            while True:
                await asyncio.sleep(0.1)
                for edge in list(chance.choice(servers)[0]._edges)[:1]:
                    edge.transport.abort()

        killer = asyncio.create_task(deaths())
        for batch in range(40):
            await asyncio.gather(*(one(batch * 50 + number) for number in range(50)))
        killer.cancel()
        running = [server for server, _ in servers]
        await until(lambda: not any(each.calls for each in (front, *running)), HANG, "all calls have ended")
        await until(lambda: not any(each.calls for each in channels), HANG, "all calls have ended")
        assert outcomes["OK"] > 1000, outcomes
        assert set(outcomes) <= {"OK", "cancelled", "DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"}
        for channel in channels:
            assert channel._alarm is not None
            assert len(channel._alarm.deadlines) == 0
        assert len(front._alarm.deadlines) == 0


async def test_calls_leave_nothing_behind_not_even_for_the_garbage_collector(service: Service) -> None:
    def count() -> int:
        return sum(isinstance(thing, ServerCall | ClientCall) for thing in gc.get_objects())

    async with (
        wire_server(service) as (_, upstream),
        WireChannel(upstream) as channel,
        wire_server(forward={UNARY: relay(lambda: channel)}) as (_, address),
        WireChannel(address) as client,
    ):
        unary = client.unary_unary(UNARY)
        await asyncio.gather(*(unary(b"x", timeout=60) for _ in range(200)))
        gc.collect()
        gc.disable()
        before = count()
        for _ in range(10):
            await asyncio.gather(*(unary(b"x", timeout=60) for _ in range(200)))
        try:
            await until(lambda: count() <= before, HANG, "no call is left")
        finally:
            gc.enable()


async def test_a_slow_upstream_bounds_what_is_held_by_windows_not_by_messages() -> None:
    """32 requests of 8 MiB (256 MiB in all) towards an upstream that reads nothing."""
    held: list[ServerCall] = []

    def swallow(call: ServerCall) -> None:
        """Set `on_chunk` and never consume: the window stays shut."""
        if call.missing:
            held.append(call)
            call.on_chunk = lambda data: None

    limits = Limits(stream_window=256 * KiB, connection_window=4 * MiB)
    async with AsyncExitStack() as stack:
        slow = ForwardMethod(swallow, cut_through=True)
        _, upstream = await stack.enter_async_context(wire_server(forward={UNARY: slow}, limits=limits))
        channel = await stack.enter_async_context(WireChannel(upstream))
        forward = {UNARY: relay(lambda: channel)}
        front, address = await stack.enter_async_context(wire_server(forward=forward, limits=limits))
        client = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=UNLIMITED))
        calls = [client.unary_unary(UNARY)(bytes(8 * MiB)) for _ in range(32)]
        while not held:  # noqa: ASYNC110  # what it watches has no event
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        queued = sum(edge.wire.engine.queued_body_size() for edge in channel._edges)
        unread = sum(stream._unacknowledged for edge in front._edges for stream in edge.wire.streams.values())
        assert queued <= 4 * MiB + 32 * (64 * KiB + 16 * KiB)
        assert unread <= 4 * MiB
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_a_slow_client_bounds_what_is_held_of_answers() -> None:
    def big(call: ServerCall) -> None:
        call.reply(bytes(32 * MiB))

    async with AsyncExitStack() as stack:
        _, upstream = await stack.enter_async_context(wire_server(forward={UNARY: ForwardMethod(big)}))
        options = ChannelOptions(connections=1, limits=Limits(stream_window=256 * KiB, connection_window=1 * MiB))
        channel = await stack.enter_async_context(WireChannel(upstream, options))
        front, address = await stack.enter_async_context(wire_server(forward={UNARY: relay(lambda: channel)}))
        client = await stack.enter_async_context(WireChannel(address, options))
        call = client.call(UNARY.encode())
        call.request = b"x"
        chunks: list[bytes] = []

        def front_arrived(arrived: Any) -> None:
            call.on_chunk = chunks.append

        call.on_front = front_arrived
        client.submit(call)
        await asyncio.sleep(0.5)
        assert sum(map(len, chunks)) < 256 * KiB
        queued = sum(edge.wire.engine.queued_body_size() for edge in front._edges)
        assert queued <= 256 * KiB + 64 * KiB
        while not call.done:  # now it reads
            call.consume(call._unacknowledged)
            await asyncio.sleep(0.001)
        assert len(call.body) + sum(map(len, chunks)) == 32 * MiB
        assert call.code == 0
