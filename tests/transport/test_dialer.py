"""The dialer: connecting, waiting, failing, reconnecting, and retrying what was never looked at."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from aio_channel import WireChannel, start_unary
from command_line import free_port
from grpc_peers import Service, grpcio_server, path, wire_server
from patience import HANG, wait_until

from gateway.http2.frames import ErrorCode
from gateway.http2.limits import Limits
from gateway.rpc.client import ClientCall
from gateway.rpc.server import ServerCall, _numbers
from gateway.status import Code
from gateway.transport.dialer import UPSTREAM, ChannelOptions, State
from gateway.transport.listener import ForwardMethod, WireServer

UNARY = path("Unary")
QUICK = ChannelOptions(backoff_first=0.02, backoff_most=0.1, connect_seconds=0.5)


async def call_code(channel: WireChannel, body: bytes = b"x", **options: Any) -> grpc.StatusCode:
    call = channel.unary_unary(UNARY)(body, **options)
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


async def test_nothing_is_connected_before_the_first_call() -> None:
    async with wire_server(Service()) as (server, address), WireChannel(address) as channel:
        assert channel.state is State.IDLE
        await asyncio.sleep(0.05)
        assert server.connections == 0
        assert await call_code(channel) is grpc.StatusCode.OK
        assert channel.state is State.READY


async def _closed_while_they_connect(address: str) -> list[Any]:
    """What the loop was told of channels that were closed up to 4 ms after they began to connect."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    for after in range(400):
        channel = WireChannel(address)
        channel.connect()
        await asyncio.sleep(after * 1e-5)
        await channel.close()
        await asyncio.sleep(0.002)
    return told


async def test_a_channel_that_is_closed_as_it_connects_writes_no_stack_to_the_log() -> None:
    """uvloop, which the gateway runs on, closes the transport of a connection that is given up, and does not say so."""
    async with wire_server(Service()) as (_, address):
        assert await asyncio.to_thread(uvloop.run, _closed_while_they_connect(address)) == []


async def test_a_channel_keeps_its_number_of_connections_and_spreads_calls() -> None:
    service = Service()
    three = ChannelOptions(connections=3, together=2)
    async with wire_server(service) as (server, address), WireChannel(address, three) as channel:
        await channel.channel_ready()
        await wait_until(lambda: len(channel._edges) == 3)
        calls = [channel.unary_unary(UNARY)(b"sleep") for _ in range(2)]
        await wait_until(lambda: service.running == 2)
        assert sorted(len(edge.wire.streams) for edge in server._edges) == [0, 0, 2]  # they travel together
        calls += [channel.unary_unary(UNARY)(b"sleep") for _ in range(7)]
        await wait_until(lambda: service.running == 9)
        assert [len(edge.wire.streams) for edge in server._edges] == [3, 3, 3]
        for call in calls:
            call.cancel()


async def test_an_unreachable_target_fails_at_once_and_says_so() -> None:
    async with WireChannel(f"127.0.0.1:{free_port()}", ChannelOptions(backoff_first=3600.0)) as channel:
        error = await _error(channel)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "Failed to connect" in str(error.details())
        assert channel.state is State.TRANSIENT_FAILURE
        for _ in range(20):  # those that waited for the next attempt would have no time left
            assert await call_code(channel, timeout=HANG) is grpc.StatusCode.UNAVAILABLE


async def test_attempts_on_a_dead_target_back_off() -> None:
    dialled: list[float] = []
    loop = asyncio.get_running_loop()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(loop.time())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = ChannelOptions(backoff_first=0.05, backoff_factor=2.0, backoff_most=0.4)
    async with WireChannel(f"127.0.0.1:{port}", options) as channel:
        channel.connect()

        def gaps() -> list[float]:
            return [after - before for before, after in pairwise(dialled)]

        # The pauses stop growing at 0.4 s: the tenth would be 25 s. A busy machine makes some of them longer.
        await wait_until(lambda: any(gap < 2.0 for gap in gaps()[9:]))
    server.close()
    for gap, expected in zip(gaps(), [0.05, 0.1, 0.2, *[0.4] * 100], strict=False):
        assert gap >= 0.79 * expected


@pytest.mark.parametrize("kind", ["silent", "http1", "garbage"])
async def test_a_target_that_does_not_speak_http2_is_unavailable(kind: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kind != "silent":
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" if kind == "http1" else bytes(100))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with WireChannel(f"127.0.0.1:{port}", QUICK) as channel:
        assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
    server.close()


async def test_wait_for_ready_waits_until_the_server_is_there() -> None:
    port = free_port()
    async with WireChannel(f"127.0.0.1:{port}", QUICK) as channel:
        assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
        waiting = asyncio.create_task(call_code(channel, wait_for_ready=True))
        await asyncio.sleep(0.1)
        async with grpcio_server(Service(), port):
            assert await asyncio.wait_for(waiting, HANG) is grpc.StatusCode.OK


async def test_a_waiting_call_can_expire_or_be_cancelled() -> None:
    async with WireChannel(f"127.0.0.1:{free_port()}", QUICK) as channel:
        assert await call_code(channel, timeout=0.1, wait_for_ready=True) is grpc.StatusCode.DEADLINE_EXCEEDED
        call = channel.unary_unary(UNARY)(b"x", wait_for_ready=True)
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_restarted_server_is_found_again() -> None:
    port = free_port()
    async with WireChannel(f"127.0.0.1:{port}", QUICK) as channel:
        for _ in range(3):
            async with grpcio_server(Service(), port):
                assert await asyncio.wait_for(call_code(channel, wait_for_ready=True), HANG) is grpc.StatusCode.OK
            assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_was_restarted_is_not_dialled_by_all_in_one_instant() -> None:
    """Each gateway's pause differs, though all have lost their connections together.

    A machine that is busy at that moment makes them one crowd all the same, so it is tried again; without differing
    pauses they are one each time.
    """
    crowds = []
    for _ in range(3):
        crowds.append(await largest_crowd_after_a_restart(callers=40))
        if crowds[-1] < 32:
            return
    raise AssertionError(crowds)


async def largest_crowd_after_a_restart(callers: int) -> int:
    """How many of so many callers come back to a server within the same 50 ms."""
    port, came = free_port(), list[float]()
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as exits:
        async with wire_server(Service(), port=port) as (server, address):
            channels = [await exits.enter_async_context(WireChannel(address)) for _ in range(callers)]
            assert {await call_code(channel) for channel in channels} == {grpc.StatusCode.OK}
        await asyncio.sleep(0.8)
        async with wire_server(Service(), port=port) as (server, _):
            while len(came) < callers:
                came += [loop.time()] * (server.connections - len(came))
                await asyncio.sleep(0.005)
            assert {await call_code(channel, wait_for_ready=True) for channel in channels} == {grpc.StatusCode.OK}
    return max(Counter(int(20 * at) for at in came).values())


async def test_a_connection_that_dies_ends_its_calls_and_is_replaced() -> None:
    service = Service()
    async with wire_server(service) as (server, address), WireChannel(address, QUICK) as channel:
        call = channel.unary_unary(UNARY)(b"sleep")
        await service.started.wait()
        for edge in list(server._edges):
            edge.transport.abort()
        with pytest.raises(grpc.aio.AioRpcError, match="Connection lost"):
            await call
        assert await asyncio.wait_for(call_code(channel, wait_for_ready=True), HANG) is grpc.StatusCode.OK


async def test_a_call_that_was_refused_goes_out_once_more_by_itself() -> None:
    tries: list[int] = []

    def handle(call: ServerCall) -> None:
        tries.append(call.id)
        if len(tries) == 1:
            call.reset(ErrorCode.REFUSED_STREAM)
        else:
            call.reply(call.body)

    async with wire_server(forward={UNARY: ForwardMethod(handle)}) as (_, address), WireChannel(address) as channel:
        assert await call_code(channel) is grpc.StatusCode.OK
        assert len(tries) == 2


async def test_a_stream_that_was_refused_is_whole_when_it_goes_out_again() -> None:
    tries: list[int] = []

    def handle(call: ServerCall) -> None:
        tries.append(call.id)
        if len(tries) == 1:
            call.reset(ErrorCode.REFUSED_STREAM)
            return
        call.send_headers([(b"i", b"1")])
        call.on_message = lambda body, compressed: (call.send_message(body), call.feed())[0]
        call.on_request = lambda done: done.finish(Code.OK)

    streaming = {UNARY: ForwardMethod(handle, streaming=True)}
    async with wire_server(forward=streaming) as (_, address), WireChannel(address) as channel:
        call = channel.unary_stream(UNARY)(b"hello")
        assert [message async for message in call] == [b"hello"]
        assert list(await call.initial_metadata()) == [("i", "1")]
        assert len(tries) == 2


async def test_a_call_that_is_always_refused_goes_out_twice_only() -> None:
    tries: list[int] = []

    def handle(call: ServerCall) -> None:
        tries.append(call.id)
        call.reset(ErrorCode.REFUSED_STREAM)

    async with wire_server(forward={UNARY: ForwardMethod(handle)}) as (_, address), WireChannel(address) as channel:
        assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
        assert len(tries) == 2


async def test_when_a_fifth_of_the_calls_is_refused_each_goes_out_once_more_and_all_are_answered() -> None:
    """Bar 44. The transport does it alone: budgets for retries are above it, and hear nothing of it."""
    tries: Counter[bytes] = Counter()

    def handle(call: ServerCall) -> None:
        tries[call.body] += 1
        if int(call.body) % 5 == 0 and tries[call.body] == 1:
            call.reset(ErrorCode.REFUSED_STREAM)
        else:
            call.reply(call.body)

    async with wire_server(forward={UNARY: ForwardMethod(handle)}) as (_, address), WireChannel(address) as channel:
        for first in range(0, 500, 25):
            bodies = [b"%d" % number for number in range(first, first + 25)]
            assert await asyncio.gather(*(channel.unary_unary(UNARY)(body) for body in bodies)) == bodies
    assert all(times == (2 if int(body) % 5 == 0 else 1) for body, times in tries.items())
    assert tries.total() == 600


async def test_goaways_in_mid_load_fail_no_call() -> None:
    def handle(call: ServerCall) -> None:
        asyncio.get_running_loop().call_later(0.002, lambda: call.reply(call.body))

    async with (
        wire_server(forward={UNARY: ForwardMethod(handle)}) as (server, address),
        WireChannel(address) as channel,
    ):

        async def caller(number: int) -> None:
            turn = 0
            while leavings < 100:
                turn += 1
                body = b"%d %d" % (number, turn)
                assert await channel.unary_unary(UNARY)(body) == body

        leavings = 0
        callers = [asyncio.create_task(caller(number)) for number in range(10)]
        while leavings < 100 and not any(task.done() for task in callers):
            await asyncio.sleep(0.01)
            for edge in [edge for edge in server._edges if edge.wire.streams][:1]:  # one that has come into use
                edge.wire.drain()
                leavings += 1
        await asyncio.gather(*callers)
        assert leavings == 100


async def test_calls_wait_for_room_on_a_connection_and_their_number_is_bounded() -> None:
    service = Service()
    options = ChannelOptions(connections=1, max_pending=5)
    limits = Limits(max_streams=100)
    async with wire_server(service, limits=limits) as (_, address), WireChannel(address, options) as channel:
        calls = [channel.unary_unary(UNARY)(b"sleep") for _ in range(5)]
        await service.started.wait()
        calls += [channel.unary_unary(UNARY)(b"sleep") for _ in range(100)]
        await wait_until(lambda: service.running == 100)
        assert channel.calls == 105
        assert await call_code(channel) is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls[0].cancel()
        await wait_until(lambda: service.running == 100 and channel.calls == 104)
        for call in calls:
            call.cancel()


async def test_a_target_that_was_dead_for_days_is_still_tried() -> None:
    port = free_port()
    async with WireChannel(f"127.0.0.1:{port}", QUICK) as channel:
        assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
        channel._failures = 1_000_000
        await asyncio.sleep(0.3)
        async with grpcio_server(Service(), port):
            assert await asyncio.wait_for(call_code(channel, wait_for_ready=True), HANG) is grpc.StatusCode.OK


async def test_a_server_that_leaves_as_soon_as_it_is_reached_is_unavailable_and_not_hammered() -> None:
    async with wire_server(Service()) as (server, address):
        server.draining = True  # accepts, and says GOAWAY
        before = next(_numbers)
        async with WireChannel(address, QUICK) as channel:
            assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(0.5)
            assert next(_numbers) - before - 1 <= 15


async def test_callbacks_never_come_before_submit_returns() -> None:
    order: list[str] = []
    done = asyncio.Event()

    def on_done(call: ClientCall) -> None:
        order.append(f"done {call.code.name}")
        done.set()

    async with WireChannel(f"127.0.0.1:{free_port()}", QUICK) as channel:
        await call_code(channel)  # the target is known to be dead now
        start_unary(channel, UNARY.encode(), (), b"x", None, on_done)
        order.append("returned")
        await done.wait()
    assert order == ["returned", "done UNAVAILABLE"]


async def test_a_callback_that_raises_harms_no_other_call() -> None:
    done = asyncio.Event()

    def boom(call: ClientCall) -> None:
        done.set()
        raise RuntimeError("boom")

    async with wire_server(Service()) as (_, address), WireChannel(address, ChannelOptions(connections=1)) as channel:
        await channel.channel_ready()
        other = channel.unary_unary(UNARY)(b"other")
        start_unary(channel, UNARY.encode(), (), b"x", None, boom)
        await done.wait()
        assert await other == b"other"
        assert await call_code(channel) is grpc.StatusCode.OK


async def test_a_server_that_is_pinged_too_often_is_pinged_half_as_often_from_then_on() -> None:
    limits = replace(UPSTREAM, keepalive_seconds=10.0)
    options = ChannelOptions(connections=1, limits=limits)
    async with wire_server(Service()) as (server, address), WireChannel(address, options) as channel:
        for seconds in (10.0, 20.0, 40.0):
            assert await call_code(channel, wait_for_ready=True) is grpc.StatusCode.OK
            assert [edge.wire.limits.keepalive_seconds for edge in channel._edges] == [seconds]
            before = set(server._edges)
            for edge in before:
                edge.wire.break_off(ErrorCode.ENHANCE_YOUR_CALM, "too_many_pings")
            await wait_until(partial(_replaced, server, channel, before))


async def test_closing_ends_what_runs_and_what_comes_later() -> None:
    service = Service()
    async with wire_server(service) as (_, address):
        channel = WireChannel(address)
        call = channel.unary_unary(UNARY)(b"sleep")
        await service.started.wait()
        await channel.close()
        with pytest.raises(grpc.aio.AioRpcError, match="The channel is closed"):
            await call
        assert await call_code(channel) is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(service.cancelled.wait(), HANG)
        assert channel.state is State.SHUTDOWN


async def test_states_are_reported_in_order() -> None:
    states: list[State] = []
    port = free_port()
    async with WireChannel(f"127.0.0.1:{port}", QUICK) as channel:
        channel.on_state = states.append
        channel.connect()
        await wait_until(lambda: State.TRANSIENT_FAILURE in states)
        async with grpcio_server(Service(), port):
            await asyncio.wait_for(channel.channel_ready(), HANG)
    assert states[:3] == [State.CONNECTING, State.TRANSIENT_FAILURE, State.READY]
    assert states[-1] is State.SHUTDOWN


@pytest.mark.parametrize("target", ["", "host", "host:", ":", "host:port"])
def test_a_target_that_is_no_address_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        WireChannel(target)


@pytest.mark.parametrize("form", ["{}:{}", "dns:///{}:{}", "ipv4:{}:{}"])
async def test_targets_may_be_written_as_grpc_does(form: str) -> None:
    async with wire_server(Service()) as (_, address), WireChannel(form.format(*address.split(":"))) as channel:
        assert await call_code(channel) is grpc.StatusCode.OK


def _replaced(server: WireServer, channel: WireChannel, before: set[Any]) -> bool:
    return server.connections == 1 and not server._edges & before and len(channel._edges) == 1


async def _error(channel: WireChannel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary(UNARY)(b"x")
    return error.value


def test_codes_are_the_same_numbers_as_grpcs() -> None:
    assert {code.name: int(code) for code in Code} == {code.name: code.value[0] for code in grpc.StatusCode}
