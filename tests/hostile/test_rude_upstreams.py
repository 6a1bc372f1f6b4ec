"""Upstreams that misbehave, in raw bytes: each call ends with the status that gRPC gives it, and the next is fine.

Sources: grpc `doc/http-grpc-status-mapping.md`, `doc/PROTOCOL-HTTP2.md` (section "Errors"), gRFC A6.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import pytest
from aio_channel import WireChannel
from frames import (
    CODES,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HANG,
    Frame,
    Peer,
    block,
    data,
    frame,
    goaway,
    headers,
    literal,
    message,
    rst,
    settings,
)
from upstreams import RESPONSE, TRAILERS, RawServer, accept_client, reply, requests

from gateway.http2.limits import Limits
from gateway.transport.dialer import ChannelOptions

MiB = 1 << 20
PATH = "/test.Service/Method"
React = Callable[[Peer, Frame], bool | None]
"""What to do with a request. True: close the connection."""


@contextmanager
def upstream(react: React, *, rude: int = 1 << 30, connections: int = 1) -> Iterator[RawServer]:
    """A server that reacts so to the first `rude` requests on each of the first connections, and else answers well."""

    def script(peer: Peer, number: int) -> None:
        accept_client(peer)
        for at, got in enumerate(requests(peer)):
            if number >= connections or at >= rude:
                peer.send(reply(got.stream, b"well"))
            elif react(peer, got):
                peer.sock.close()
                return

    with RawServer(script) as server:
        yield server


@asynccontextmanager
async def channel(server: RawServer, connections: int = 1, limits: Limits | None = None) -> AsyncIterator[WireChannel]:
    options = ChannelOptions(connections=connections, together=1, limits=limits or Limits(stream_window=4 * MiB))
    channel = WireChannel(f"127.0.0.1:{server.port}", options)
    try:
        yield channel
    finally:
        await channel.close()


async def ask(channel: WireChannel, *, patient: bool = False) -> tuple[grpc.StatusCode, str]:
    """How one call ends."""
    try:
        await channel.unary_unary(PATH)(b"x", timeout=HANG, wait_for_ready=patient)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def sending(what: Callable[[int], bytes], *, close: bool = False) -> React:
    def react(peer: Peer, got: Frame) -> bool:
        peer.send(what(got.stream))
        return close

    return react


# HTTP statuses

HTTP = {
    "400": "INTERNAL",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE",
    "431": "INTERNAL",
    "500": "UNKNOWN",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "UNAVAILABLE",
    "200": "UNKNOWN",  # without a grpc-status
    "abc": "UNKNOWN",
}


@pytest.mark.parametrize("status", HTTP)
@pytest.mark.parametrize("page", [b"", b"<html>10.1.2.3 secret</html>"], ids=["no body", "a page"])
async def test_http_statuses_are_mapped_and_pages_stay_inside(status: str, page: bytes) -> None:
    head = block(((b":status", status.encode()), (b"content-type", b"text/html")))

    def answer(stream: int) -> bytes:
        if not page:
            return headers(stream, head, END_HEADERS | END_STREAM)
        return headers(stream, head) + data(stream, page, END_STREAM)

    with upstream(sending(answer)) as server:
        async with channel(server) as to:
            code, text = await ask(to)
            if status == "abc":
                assert code is not grpc.StatusCode.OK
            else:
                assert code.name == HTTP[status]
            assert "secret" not in text
            assert str(server.port) not in text


# Resets

RESETS = dict.fromkeys(CODES, "INTERNAL") | {
    "REFUSED_STREAM": "UNAVAILABLE",
    "CANCEL": "CANCELLED",
    "ENHANCE_YOUR_CALM": "RESOURCE_EXHAUSTED",
    "INADEQUATE_SECURITY": "PERMISSION_DENIED",
}


@pytest.mark.parametrize("when", ["before headers", "after headers", "after a message"])
@pytest.mark.parametrize("name", RESETS)
async def test_resets_are_mapped_and_only_refused_calls_go_out_again(name: str, when: str) -> None:
    seen: list[int] = []

    def react(peer: Peer, got: Frame) -> None:
        seen.append(got.stream)
        head = b"" if when == "before headers" else headers(got.stream, RESPONSE)
        body = data(got.stream, message(b"x")) if when == "after a message" else b""
        peer.send(head + body + rst(got.stream, CODES.index(name)))

    with upstream(react) as server:
        async with channel(server) as to:
            code, _ = await ask(to)
            assert code.name == RESETS[name]
            assert len(seen) == (2 if name == "REFUSED_STREAM" and when == "before headers" else 1)


async def test_one_refusal_is_not_noticed() -> None:
    seen: Counter[str] = Counter()

    def react(peer: Peer, got: Frame) -> None:
        seen["all"] += 1
        if got.stream % 10 == 1:
            seen["refused"] += 1
            peer.send(rst(got.stream, CODES.index("REFUSED_STREAM")))
        else:
            peer.send(reply(got.stream, b"well"))

    with upstream(react) as server:
        async with channel(server) as to:
            results = [await ask(to) for _ in range(100)]
    assert {code.name for code, _ in results} == {"OK"}
    assert seen["refused"] >= 20
    assert seen["all"] == 100 + seen["refused"]


# GOAWAY


@pytest.mark.parametrize("close", [False, True], ids=["stays open", "closes at once"])
async def test_goaway_under_load_loses_nothing(close: bool) -> None:
    """Every connection takes seven calls, answers them, and leaves the rest to the next; five are always under way."""
    executed: Counter[int] = Counter()

    def script(peer: Peer, number: int) -> None:
        accept_client(peer)
        for taken, got in enumerate(requests(peer), start=1):
            if taken <= 7:
                executed[number] += 1
                peer.send(reply(got.stream, b"well"))
            if taken == 7:
                peer.send(goaway(got.stream))
                if close:
                    return

    with RawServer(script) as server:
        async with channel(server) as to:
            for _ in range(20):
                results = await asyncio.gather(*(ask(to, patient=True) for _ in range(5)))
                assert {code.name for code, _ in results} == {"OK"}
    assert sum(executed.values()) == 100


async def test_after_goaway_calls_that_were_taken_still_end_well() -> None:
    def react(peer: Peer, got: Frame) -> None:
        peer.send(goaway((1 << 31) - 1) + goaway(got.stream))
        time.sleep(0.2)
        peer.send(reply(got.stream, b"well"))

    with upstream(react) as server:
        async with channel(server) as to:
            first = asyncio.ensure_future(ask(to))
            await asyncio.sleep(0.1)
            assert (await ask(to, patient=True))[0] is grpc.StatusCode.OK
            assert (await first)[0] is grpc.StatusCode.OK
            assert server.connections == 2


async def test_a_call_that_nobody_takes_goes_out_once_more_and_no_further() -> None:
    seen: list[int] = []

    def react(peer: Peer, got: Frame) -> None:
        seen.append(got.stream)
        if len(seen) == 1:
            peer.send(reply(got.stream, b"well"))
        else:
            peer.send(goaway(got.stream - 2 if got.stream > 1 else 0))

    with upstream(react, connections=100) as server:
        async with channel(server) as to:
            assert (await ask(to))[0] is grpc.StatusCode.OK
            assert (await ask(to))[0] is grpc.StatusCode.UNAVAILABLE
    assert len(seen) == 1 + 2


async def test_a_server_that_tells_no_limit_of_streams_gets_all_calls_at_once() -> None:
    waiting: list[int] = []

    def react(peer: Peer, got: Frame) -> None:
        waiting.append(got.stream)
        if len(waiting) == 300:
            peer.send(b"".join(reply(stream, b"well") for stream in waiting))

    with upstream(react) as server:
        async with channel(server) as to:
            results = await asyncio.gather(*(ask(to) for _ in range(300)))
    assert {code.name for code, _ in results} == {"OK"}


# Nonsense

GOOD_HEAD = headers(1, RESPONSE)
UNBOUNDED = END_HEADERS | END_STREAM


def endless_empty(peer: Peer, got: Frame) -> None:
    peer.send(headers(got.stream, RESPONSE))
    while peer.send(data(got.stream, b"") * 1000):
        continue


def endless_trailers(peer: Peer, got: Frame) -> None:
    peer.send(headers(got.stream, RESPONSE) + headers(got.stream, literal(b"x", b"y" * 10_000), END_STREAM))
    for _ in range(10_000):  # 100 MB
        if not peer.send(frame(CONTINUATION, 0, got.stream, literal(b"x", b"y" * 10_000))):
            return


def flood(one: bytes) -> React:
    def react(peer: Peer, got: Frame) -> None:
        while peer.send(one * 1000):
            continue

    return react


ERRORS = {"INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNKNOWN"}

NONSENSE: dict[str, tuple[React, set[str]]] = {
    "closes": (sending(lambda s: b"", close=True), {"UNAVAILABLE"}),
    "half a frame, closes": (sending(lambda s: headers(s, RESPONSE)[:-5], close=True), {"UNAVAILABLE"}),
    "half a message, closes": (
        sending(lambda s: headers(s, RESPONSE) + data(s, message(b"hello")[:-2]), close=True),
        {"UNAVAILABLE"},
    ),
    "garbage": (sending(lambda s: b"\xde\xad\xbe\xef" * 100), {"UNAVAILABLE"}),
    "HTTP/1": (sending(lambda s: b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), {"UNAVAILABLE"}),
    "bad HPACK": (sending(lambda s: headers(s, b"\xff\xff\xff\xff\xff\xff")), {"UNAVAILABLE"}),
    "DATA before HEADERS": (sending(lambda s: data(s, message(b"x"))), ERRORS),
    "DATA on a stream that is not": (sending(lambda s: data(s + 100, b"x")), {"UNAVAILABLE"}),
    "HEADERS on an even stream": (sending(lambda s: headers(2, RESPONSE)), {"UNAVAILABLE"}),
    "a frame that is too large": (sending(lambda s: data(s, bytes((1 << 20) + 1))), {"UNAVAILABLE"}),
    "no status": (sending(lambda s: headers(s, block(((b"a", b"b"),)), UNBOUNDED)), ERRORS),
    "two statuses": (sending(lambda s: headers(s, RESPONSE + block(((b":status", b"200"),)), UNBOUNDED)), ERRORS),
    "trailers without an end": (sending(lambda s: headers(s, RESPONSE) + headers(s, TRAILERS)), ERRORS),
    "no trailers": (sending(lambda s: headers(s, RESPONSE) + data(s, message(b"x"), END_STREAM)), {"UNKNOWN"}),
    "OK without a message": (sending(lambda s: headers(s, RESPONSE + TRAILERS, UNBOUNDED)), {"INTERNAL"}),
    "OK with half a message": (
        sending(lambda s: headers(s, RESPONSE) + data(s, message(b"hello")[:-1]) + headers(s, TRAILERS, UNBOUNDED)),
        {"INTERNAL"},
    ),
    "two messages": (
        sending(lambda s: headers(s, RESPONSE) + data(s, message(b"x") * 2) + headers(s, TRAILERS, UNBOUNDED)),
        {"INTERNAL", "UNIMPLEMENTED"},
    ),
    "message flag 7": (sending(lambda s: headers(s, RESPONSE) + data(s, message(b"x", 7))), {"INTERNAL"}),
    "a message over the limit": (
        sending(lambda s: headers(s, RESPONSE) + data(s, b"\0\xff\xff\xff\xff")),
        {"RESOURCE_EXHAUSTED"},
    ),
    "a status of letters": (
        sending(lambda s: headers(s, RESPONSE + block(((b"grpc-status", b"abc"),)), UNBOUNDED)),
        {"UNKNOWN"},
    ),
    "PUSH_PROMISE": (sending(lambda s: frame(5, END_HEADERS, s, b"\0\0\0\2" + RESPONSE)), {"UNAVAILABLE"}),
    "window overflow": (sending(lambda s: frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2), {"UNAVAILABLE"}),
    "GOAWAY of 3 bytes": (sending(lambda s: frame(GOAWAY, 0, 0, b"xxx")), {"UNAVAILABLE"}),
    "trailers of 100 MB": (endless_trailers, {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}),
    "empty DATA without end": (endless_empty, {"UNAVAILABLE"}),
    "PING without end": (flood(frame(6, 0, 0, bytes(8))), {"UNAVAILABLE"}),
    "SETTINGS without end": (flood(frame(4, 0, 0)), {"UNAVAILABLE"}),
}


def on_call(what: Callable[[int], bytes]) -> tuple[React, set[str]]:
    """An answer has begun; then this."""
    return sending(lambda stream: headers(stream, RESPONSE) + what(stream)), ERRORS


def alone(what: bytes) -> tuple[React, set[str]]:
    return sending(lambda stream: what), {"UNAVAILABLE"}


NONSENSE |= {  # what h2spec sends to clients, for the most part
    "DATA on stream 0": alone(data(0, b"x")),
    "HEADERS on stream 0": alone(headers(0, RESPONSE)),
    "RST_STREAM on stream 0": alone(rst(0)),
    "PING on a stream": alone(frame(6, 0, 1, bytes(8))),
    "PING of 7 bytes": alone(frame(6, 0, 0, bytes(7))),
    "SETTINGS on a stream": alone(frame(4, 0, 1)),
    "SETTINGS of 5 bytes": alone(frame(4, 0, 0, bytes(5))),
    "SETTINGS ACK with a payload": alone(frame(4, 1, 0, bytes(6))),
    "SETTINGS, window of 2^31": alone(settings([(4, 1 << 31)])),
    "SETTINGS, frames of 1 byte": alone(settings([(5, 1)])),
    "SETTINGS, push by a server": alone(settings([(2, 1)])),
    "WINDOW_UPDATE of 3 bytes": alone(frame(8, 0, 0, bytes(3))),
    "WINDOW_UPDATE 0": alone(frame(8, 0, 0, bytes(4))),
    "GOAWAY on a stream": alone(frame(GOAWAY, 0, 1, bytes(8))),
    "CONTINUATION alone": alone(frame(CONTINUATION, END_HEADERS, 1, RESPONSE)),
    "RST_STREAM, idle": alone(rst(99)),
    "WINDOW_UPDATE 0 on the call": on_call(lambda s: frame(8, 0, s, bytes(4))),
    "window overflow on the call": on_call(lambda s: frame(8, 0, s, b"\x7f\xff\xff\xff") * 2),
    "RST_STREAM of 3 bytes": on_call(lambda s: frame(3, 0, s, bytes(3))),
    "padding longer than DATA": on_call(lambda s: frame(0, 8, s, b"\x09x")),
    "padding longer than HEADERS": on_call(lambda s: frame(1, 8 | END_HEADERS, s, b"\xff" + TRAILERS)),
    "DATA within a header block": on_call(lambda s: headers(s, TRAILERS[:3], 0) + data(s, b"x")),
    "another stream within a header block": on_call(lambda s: headers(s, TRAILERS, 0) + rst(s + 2)),
    "uppercase in trailers": on_call(lambda s: headers(s, TRAILERS + literal(b"X", b""), UNBOUNDED)),
    "pseudo-field in trailers": on_call(lambda s: headers(s, TRAILERS + literal(b":status", b"200"), UNBOUNDED)),
    "connection field in trailers": on_call(lambda s: headers(s, TRAILERS + literal(b"connection", b"x"), UNBOUNDED)),
    "table size update at the end": on_call(lambda s: headers(s, TRAILERS + b"\x21", UNBOUNDED)),
    "index out of range": on_call(lambda s: headers(s, TRAILERS + b"\xc6", UNBOUNDED)),
    "content-length of more": (
        sending(lambda s: headers(s, RESPONSE + literal(b"content-length", b"99")) + reply(s, b"x")[len(GOOD_HEAD) :]),
        ERRORS,
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_ends_the_call_and_the_next_one_is_fine(name: str) -> None:
    react, codes = NONSENSE[name]
    with upstream(react, rude=1) as server:
        async with channel(server) as to:
            code, text = await ask(to)
            assert code.name in codes, text
            assert (await ask(to, patient=True))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_harms_no_call_on_another_connection(name: str) -> None:
    """Of two connections one turns rude while the other has calls under way."""
    react, _ = NONSENSE[name]

    def slowly(peer: Peer, number: int) -> None:
        accept_client(peer)
        for got in requests(peer):
            if number == 0:
                if react(peer, got):
                    peer.sock.close()
                    return
            else:
                time.sleep(0.01)
                peer.send(reply(got.stream, b"well"))

    with RawServer(slowly) as server:
        async with channel(server, connections=2) as to:
            await ask(to)
            await asyncio.sleep(0.15)  # for the first to be replaced if it is gone
            for _ in range(int(HANG / 0.01)):
                if server.connections >= 2:
                    break
                await asyncio.sleep(0.01)
            results = await asyncio.gather(*(ask(to) for _ in range(10)))
            assert [code.name for code, _ in results].count("OK") >= 5


@pytest.mark.parametrize("over", [True, False], ids=["of a call that is over", "of a message that takes for ever"])
async def test_a_server_that_floods_with_small_frames_is_cut(over: bool) -> None:
    def flood(peer: Peer, got: Frame) -> bool:
        begun = headers(got.stream, RESPONSE) + data(got.stream, b"\0\0\xff\xff\xff")
        ended = headers(got.stream, TRAILERS, END_HEADERS | END_STREAM) if over else b""
        peer.send(begun + ended)
        frames = data(got.stream, b"\0") * 1000
        return all(peer.send(frames) for _ in range(1000))

    faults: list[str] = []
    limits = Limits(stream_window=4 * MiB, tiny=(5000, 100))
    with upstream(flood, rude=1) as server:
        async with channel(server, limits=limits) as to:
            to.on_fault = faults.append
            code, _ = await ask(to)
            assert code.name == ("INTERNAL" if over else "UNAVAILABLE")
            for _ in range(int(HANG / 0.01)):
                if faults:
                    break
                await asyncio.sleep(0.01)
            assert faults == ["too many small frames that complete no message"]
            assert await ask(to, patient=True) == (grpc.StatusCode.OK, "")


async def test_data_after_the_trailers_harms_nobody() -> None:
    def answer(stream: int) -> bytes:
        return reply(stream, b"well") + data(stream, b"more")

    with upstream(sending(answer)) as server:
        async with channel(server) as to:
            for _ in range(5):
                assert (await ask(to, patient=True))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\0" * 100, frame(GOAWAY, 0, 0, bytes(8)), b"\0\0\1\4\0\0\0\0\0\0"],
    ids=["HTTP/1", "closes", "zeros", "GOAWAY first", "broken SETTINGS"],
)
async def test_a_server_that_does_not_speak_http2_is_unavailable(greeting: bytes) -> None:
    def script(peer: Peer, number: int) -> None:
        peer.send(greeting)
        peer.sock.close()

    with RawServer(script) as server:
        async with channel(server) as to:
            code, text = await ask(to)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert str(server.port) not in text
        assert server.connections < 20
