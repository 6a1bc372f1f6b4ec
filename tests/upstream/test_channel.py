"""What a connection tells of a failed call, with a real server on the other side."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from gateway.status import Code
from gateway.upstream.channel import ChannelConnection, wire_channel
from gateway.upstream.connection import CallFailed

LIMIT = 64 << 10
METHOD = "/test.Service/Call"
STREAM = "/test.Service/Stream"


@pytest.fixture
def dial() -> Callable[[str], ChannelConnection]:
    return lambda address: wire_channel(address, LIMIT, None)


async def _call(body: bytes, context: Any) -> bytes:
    if body.startswith(b"unavailable"):
        await context.abort(grpc.StatusCode.UNAVAILABLE, body[12:].decode(), (("x-cost", "3"),))
    if body.startswith(b"count"):
        return b"%d" % len(body)
    if body == b"large":
        return bytes(LIMIT + 1)
    if body == b"hang":
        await asyncio.sleep(30)
    return body


async def _stream(requests: AsyncIterator[bytes], context: Any) -> None:
    async for body in requests:
        if body == b"end":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Server is stopping")
        await context.write(body)


@pytest.fixture
async def server() -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    made = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    methods = {
        "Call": grpc.unary_unary_rpc_method_handler(_call),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))
    port = made.add_insecure_port("127.0.0.1:0")
    await made.start()
    yield made, f"127.0.0.1:{port}"
    await made.stop(0)


Dial = Callable[[str], ChannelConnection]
Served = tuple[grpc.aio.Server, str]


async def failure_of(connection: ChannelConnection, body: bytes, timeout: float | None = 10) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await connection.unary(METHOD, body, (), timeout)
    return caught.value


@pytest.mark.parametrize("text", ["Server is stopping", "Exceeds maximum queue size", "", "größe"])
async def test_a_servers_status_is_the_servers(dial: Dial, server: Served, text: str) -> None:
    connection = dial(server[1])
    failure = await failure_of(connection, b"unavailable:" + text.encode())
    assert (failure.code, failure.text, failure.from_server) == (Code.UNAVAILABLE, text, True)
    assert ("x-cost", "3") in tuple(failure.trailing)
    await connection.aclose()


async def test_a_port_that_nobody_listens_on_is_not_the_servers_word(dial: Dial) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        connection = dial(f"127.0.0.1:{taken.getsockname()[1]}")
        failure = await failure_of(connection, b"")
        await connection.aclose()
    assert (failure.code, failure.from_server) == (Code.UNAVAILABLE, False)


async def test_a_name_that_does_not_resolve_is_not_the_servers_word(dial: Dial) -> None:
    connection = dial("nowhere.invalid:1")
    failure = await failure_of(connection, b"")
    assert (failure.code, failure.from_server) == (Code.UNAVAILABLE, False)
    await connection.aclose()


async def test_a_peer_that_hangs_up_is_not_the_servers_word(dial: Dial) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(24)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as rude:
        connection = dial(f"127.0.0.1:{rude.sockets[0].getsockname()[1]}")
        failure = await failure_of(connection, b"")
        await connection.aclose()
    assert (failure.code, failure.from_server) == (Code.UNAVAILABLE, False)


async def test_an_answer_above_the_limit_is_not_the_servers_word(dial: Dial, server: Served) -> None:
    connection = dial(server[1])
    failure = await failure_of(connection, b"large")
    assert (failure.code, failure.from_server) == (Code.RESOURCE_EXHAUSTED, False)
    await connection.aclose()


async def test_a_request_above_the_limit_is_sent(dial: Dial, server: Served) -> None:
    """It was within the limit when it came, and has grown by the model's own name."""
    connection = dial(server[1])
    body = b"count" + bytes(LIMIT)
    assert (await connection.unary(METHOD, body, (), 10)).body == b"%d" % len(body)
    await connection.aclose()


async def test_a_passed_deadline_is_said_so(dial: Dial, server: Served) -> None:
    connection = dial(server[1])
    assert (await failure_of(connection, b"hang", 0.1)).code == Code.DEADLINE_EXCEEDED
    await connection.aclose()


async def test_a_closed_connection_fails_calls(dial: Dial, server: Served) -> None:
    connection = dial(server[1])
    await connection.aclose()
    failure = await failure_of(connection, b"")
    assert (failure.code, failure.from_server) == (Code.UNAVAILABLE, False)


class Heard:
    """Notes what a stream tells. hungry: does it want the next message at once?"""

    def __init__(self, hungry: bool = True) -> None:
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()
        self.end: asyncio.Future[CallFailed | None] = asyncio.get_running_loop().create_future()
        self.room = asyncio.Event()
        self.hungry = hungry

    def message_arrived(self, body: bytes) -> bool:
        self.messages.put_nowait(body)
        return self.hungry

    def has_room(self) -> None:
        self.room.set()

    def ended(self, failure: CallFailed | None) -> None:
        self.end.set_result(failure)


async def test_a_stream_ends_as_the_server_ends_it(dial: Dial, server: Served) -> None:
    connection, heard = dial(server[1]), Heard()
    streaming = connection.stream(STREAM, (), None, heard)
    streaming.send(b"1")
    assert await heard.messages.get() == b"1"
    streaming.send(b"end")
    failure = await heard.end
    assert failure is not None
    assert (failure.code, failure.text, failure.from_server) == (Code.UNAVAILABLE, "Server is stopping", True)
    streaming.send(b"2")
    streaming.done_writing()
    await connection.aclose()


async def test_a_stream_that_has_said_all_is_read_to_its_end(dial: Dial, server: Served) -> None:
    connection, heard = dial(server[1]), Heard()
    streaming = connection.stream(STREAM, (), None, heard)
    streaming.send(b"1")
    streaming.done_writing()
    assert await heard.end is None
    assert heard.messages.get_nowait() == b"1"
    await connection.aclose()


async def test_a_stream_to_nowhere_ends_and_not_by_the_servers_word(dial: Dial) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        connection, heard = dial(f"127.0.0.1:{taken.getsockname()[1]}"), Heard()
        connection.stream(STREAM, (), None, heard).send(b"1")
        failure = await heard.end
        await connection.aclose()
    assert failure is not None
    assert (failure.code, failure.from_server) == (Code.UNAVAILABLE, False)


async def test_a_stream_that_is_not_fed_holds_up_the_server_which_holds_up_the_sender(
    dial: Dial, server: Served
) -> None:
    connection, heard = dial(server[1]), Heard(hungry=False)
    streaming = connection.stream(STREAM, (), None, heard)
    sent = 0
    with contextlib.suppress(asyncio.TimeoutError):
        while True:
            sent += 1
            heard.room.clear()
            if not streaming.send(bytes(LIMIT // 2)):
                await asyncio.wait_for(heard.room.wait(), 1)
    assert sent < 1000
    assert heard.messages.qsize() < sent
    heard.hungry = True
    streaming.feed()
    await asyncio.wait_for(heard.room.wait(), 60)
    streaming.done_writing()
    assert await asyncio.wait_for(heard.end, 60) is None
    assert heard.messages.qsize() == sent
    await connection.aclose()


async def test_a_cancelled_stream_says_no_more(dial: Dial, server: Served) -> None:
    connection, heard = dial(server[1]), Heard()
    streaming = connection.stream(STREAM, (), None, heard)
    streaming.send(b"1")
    await heard.messages.get()
    streaming.send(b"2")
    streaming.cancel()
    await asyncio.sleep(0.05)
    assert heard.messages.empty()
    assert not heard.end.done()
    await connection.aclose()
