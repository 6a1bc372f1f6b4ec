"""What a gRPC transport must do, as cases that run on every pairing of client and server where one side is ours."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from aio_channel import WireChannel
from grpc_peers import UNLIMITED, Service, grpcio_server, path, wire_server
from patience import HANG

PAIRS = ["grpcio to wire", "wire to grpcio", "wire to wire"]


@pytest.fixture
def service() -> Service:
    return Service()


@pytest_asyncio.fixture(params=PAIRS)
async def channel(request: pytest.FixtureRequest, service: Service) -> AsyncIterator[Any]:
    """A channel to `service`; grpc.aio's and ours have no type in common."""
    client, server = str(request.param).split(" to ")
    async with wire_server(service) if server == "wire" else grpcio_server(service) as (_, address):
        if client == "wire":
            async with WireChannel(address) as ours:
                yield ours
        else:
            async with grpc.aio.insecure_channel(address, options=UNLIMITED) as theirs:
                yield theirs


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


@pytest.mark.parametrize("size", [0, 1, 4096, 65_536, 271_828, 8_000_000])
async def test_large_unary(channel: Any, size: int) -> None:
    body = bytes(i % 249 for i in range(size))
    assert await channel.unary_unary(path("Unary"))(body) == body


async def test_metadata_goes_both_ways_in_order(channel: Any) -> None:
    metadata = (("x-one", "1"), ("x-one", "3"), ("x-raw-bin", b"\0\xff"), ("x-two", "a b"))
    call = channel.unary_unary(path("Unary"))(b"metadata", metadata=metadata)
    assert await call == repr(list(metadata)).encode()
    assert list(await call.initial_metadata()) == [("initial", "1"), ("initial-bin", b"\1")]
    assert list(await call.trailing_metadata()) == [("trailing", "2"), ("trailing", "3"), ("trailing-bin", b"\2")]
    assert await call.code() is grpc.StatusCode.OK


async def test_special_status_message(channel: Any) -> None:
    error = await failure(channel.unary_unary(path("Unary"))(b"abort"))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "100 % näh")
    assert list(error.trailing_metadata() or ()) == [("k", "v"), ("k-bin", b"\0\xff")]


async def test_a_code_set_by_hand_ends_the_call_with_it(channel: Any) -> None:
    error = await failure(channel.unary_unary(path("Unary"))(b"code"))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "set by hand")


async def test_an_exception_in_a_handler_is_unknown(channel: Any) -> None:
    error = await failure(channel.unary_unary(path("Unary"))(b"raise"))
    assert error.code() is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("method", ["/test.Service/Nothing", "/no.Service/Unary", "//", "/test.Service/../Unary"])
async def test_unimplemented(channel: Any, method: str) -> None:
    assert (await failure(channel.unary_unary(method)(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_server_streaming(channel: Any) -> None:
    call = channel.unary_stream(path("ServerStream"))(b"100")
    assert [message async for message in call] == [b"%d" % number for number in range(100)]
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("count", [0, 1, 50])
async def test_client_streaming(channel: Any, count: int) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for number in range(count):
            yield bytes(number * 1000)

    assert await channel.stream_unary(path("ClientStream"))(requests()) == b"%d" % sum(n * 1000 for n in range(count))


@pytest.mark.parametrize("method", ["Both", "ByHand"])
async def test_ping_pong(channel: Any, method: str) -> None:
    call = channel.stream_stream(path(method))()
    for number in range(20):
        await call.write(b"PING %d" % number)
        assert await call.read() == b"PING %d" % number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_empty_stream(channel: Any) -> None:
    call = channel.stream_stream(path("Both"))()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_that_is_aborted_in_the_middle(channel: Any) -> None:
    call = channel.stream_stream(path("Both"))()
    await call.write(b"one")
    assert await call.read() == b"one"
    await call.write(b"abort")
    with pytest.raises(grpc.aio.AioRpcError, match="as asked"):
        await call.read()
    assert await call.code() is grpc.StatusCode.ABORTED


async def test_large_messages_stream_both_ways(channel: Any) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for number in range(20):
            yield bytes([number]) * 500_000

    got = [message async for message in channel.stream_stream(path("Both"))(requests())]
    assert [(len(message), message[0]) for message in got] == [(500_000, number) for number in range(20)]


async def test_timeout_on_sleeping_server(channel: Any, service: Service) -> None:
    seconds = 0.1
    while not service.started.is_set():  # a call whose time is up on its way says nothing
        error = await failure(channel.unary_unary(path("Unary"))(b"sleep", timeout=seconds))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        seconds *= 2
    await asyncio.wait_for(service.cancelled.wait(), HANG)


async def test_the_handler_sees_the_time_that_remains(channel: Any) -> None:
    unary = channel.unary_unary(path("Unary"))
    assert 2000 - HANG < float(await unary(b"time", timeout=2000)) < 2100  # C-core rounds timeouts up
    assert await unary(b"time") == b"none"


async def test_cancel_after_begin(channel: Any, service: Service) -> None:
    call = channel.unary_unary(path("Unary"))(b"sleep")
    await service.started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()
    await asyncio.wait_for(service.cancelled.wait(), HANG)


async def test_cancelling_whoever_awaits_cancels_the_call(channel: Any, service: Service) -> None:
    async def caller() -> None:
        await channel.unary_unary(path("Unary"))(b"sleep")

    task = asyncio.create_task(caller())
    await service.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(service.cancelled.wait(), HANG)


async def test_cancel_after_first_response(channel: Any) -> None:
    call = channel.stream_stream(path("Both"))()
    await call.write(b"one")
    assert await call.read() == b"one"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    assert await call.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_unary(channel: Any, compression: grpc.Compression) -> None:
    body = b"gzip " + bytes(range(256)) * 1000
    assert await channel.unary_unary(path("Unary"))(body, compression=compression) == body


async def test_compressed_streaming(channel: Any) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for number in range(5):
            yield bytes([number]) * 10_000

    call = channel.stream_stream(path("Both"))(requests(), compression=grpc.Compression.Gzip)
    assert [message[0] async for message in call] == list(range(5))


async def test_many_calls_at_once_get_their_own_answers(channel: Any) -> None:
    unary = channel.unary_unary(path("Unary"))
    bodies = [b"nonce %d" % number for number in range(500)]
    assert await asyncio.gather(*(unary(body) for body in bodies)) == bodies


async def test_serializers_are_used(channel: Any) -> None:
    call = channel.unary_unary(path("Unary"), request_serializer=str.encode, response_deserializer=bytes.decode)
    assert await call("text") == "text"


async def test_nothing_is_left_when_calls_have_ended(channel: Any, service: Service) -> None:
    unary = channel.unary_unary(path("Unary"))
    await unary(b"warm")
    before = len(asyncio.all_tasks())
    for _ in range(20):
        await unary(b"x")
        await failure(unary(b"abort"))
        await failure(unary(b"sleep", timeout=0.01))
    for _ in range(600):  # gateways of other tests share the loop, and have tasks that come and go
        await asyncio.sleep(0.1)
        gc.collect()
        if len(asyncio.all_tasks()) <= before + 1:
            break
    else:
        raise AssertionError(asyncio.all_tasks())
    assert service.running == 0
    if isinstance(channel, WireChannel):
        assert channel.calls == 0
