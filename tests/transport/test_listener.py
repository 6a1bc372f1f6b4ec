"""The listener: draining, ageing, refusing, TLS, and the byte lane, with grpcio as the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest
from aio_channel import WireChannel
from certificates import Authority, read
from frames import connect, data, u32
from grpc_peers import SERVICE, Service, handlers, path, wire_server
from patience import HANG
from processes import head, request
from traffic import until

from gateway.http2.frames import frame
from gateway.http2.hpack import NeverIndexed
from gateway.http2.limits import Limits
from gateway.rpc.server import ServerCall
from gateway.status import Code
from gateway.transport.dialer import ChannelOptions, State, client_tls
from gateway.transport.listener import MOST_NARROW, ForwardMethod, WireServer, server_tls

FAST = path("Fast")


async def test_a_forwarded_call_is_answered_by_a_callback_alone() -> None:
    def handle(call: ServerCall) -> None:
        call.reply(call.body[::-1], [(b"i", b"1")], [NeverIndexed(b"t", b"2")])

    async with (
        wire_server(forward={FAST: ForwardMethod(handle)}) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = channel.unary_unary(FAST)(b"hello")
        assert await call == b"olleh"
        assert list(await call.initial_metadata()) == [("i", "1")]
        assert list(await call.trailing_metadata()) == [("t", "2")]


async def test_a_forwarded_call_can_fail_with_status_and_trailers() -> None:
    def handle(call: ServerCall) -> None:
        call.fail(Code.RESOURCE_EXHAUSTED, "full – try later", [(b"grpc-retry-after", b"1")])

    async with (
        wire_server(forward={FAST: ForwardMethod(handle)}) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(FAST)(b"hello")
        assert (error.value.code(), error.value.details()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "full – try later",
        )


async def test_a_forward_handler_that_raises_fails_its_call_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def handle(call: ServerCall) -> None:
        raise RuntimeError("secret")

    async with (
        wire_server(Service(), {FAST: ForwardMethod(handle)}) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(FAST)(b"hello")
        assert error.value.details() == "Internal error"
        assert "secret" in caplog.text
        assert await channel.unary_unary(path("Unary"))(b"neighbour") == b"neighbour"


async def test_a_handler_gets_a_compressed_message_plain() -> None:
    seen: list[tuple[bytes, bool]] = []

    def handle(call: ServerCall) -> None:
        seen.append((call.encoding, call.compressed))
        call.reply(call.body)

    async with (
        wire_server(forward={FAST: ForwardMethod(handle)}) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert await channel.unary_unary(FAST)(bytes(5000), compression=grpc.Compression.Gzip) == bytes(5000)
    assert seen == [(b"gzip", False)]


async def test_stopping_with_grace_lets_calls_end_and_refuses_new_ones() -> None:
    async with (
        wire_server(forward={FAST: ForwardMethod(_late_reply(0.3))}) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        unary = channel.unary_unary(FAST)
        running = [unary(b"%d" % number) for number in range(10)]
        await until(lambda: server.calls == 10, HANG, "all are here")
        stopping = asyncio.create_task(server.stop(HANG))
        assert await asyncio.gather(*running) == [b"%d" % number for number in range(10)]
        await asyncio.wait_for(stopping, HANG)
        assert server.connections == 0
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(b"new", timeout=1)
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_stopping_cuts_what_outlasts_the_grace() -> None:
    service = Service()
    async with wire_server(service) as (server, address), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(path("Unary"))(b"sleep")
        await service.started.wait()
        await asyncio.wait_for(server.stop(0.1), HANG)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert service.running == 0


async def test_connections_leave_at_their_age_and_no_call_fails() -> None:
    async with (
        wire_server(Service(), limits=Limits(age_seconds=0.5)) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        unary = channel.unary_unary(path("Unary"))
        peers = set[Any]()
        give_up = asyncio.get_running_loop().time() + HANG
        while len(peers) < 4:
            assert asyncio.get_running_loop().time() < give_up
            assert await unary(b"x") == b"x"
            peers |= {edge.wire.peer for edge in server._edges}
            await asyncio.sleep(0.005)


async def test_connections_that_came_together_leave_one_by_one() -> None:
    """Or all their clients would connect anew in one instant.

    A machine that is busy at that moment makes them one crowd all the same, so it is tried again.
    """
    found = []
    for _ in range(3):
        found.append(await instants_of_leaving())
        if len(found[-1]) >= 6:
            return
    raise AssertionError(found)


async def instants_of_leaving() -> Counter[int]:
    """When how many of sixty connections leave, in instants of 50 ms: twelve of them are within the age ± 10 %."""
    left: list[float] = []
    async with wire_server(Service(), limits=Limits(age_seconds=3.0)) as (server, address):
        with contextlib.ExitStack() as exits:
            for _ in range(60):
                exits.enter_context(connect(int(address.rpartition(":")[2])))
            await until(lambda: server.connections == 60, HANG, "all are connected")
            going = set(server._edges)
            while going:
                gone = {edge for edge in going if edge.wire.draining}
                left += [asyncio.get_running_loop().time()] * len(gone)
                going -= gone
                await asyncio.sleep(0.005)
    return Counter(int(20 * at) for at in left)


async def test_connections_beyond_the_limit_are_refused_and_the_others_serve() -> None:
    server = WireServer(max_connections=1)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with WireChannel(f"127.0.0.1:{port}", ChannelOptions(connections=1)) as first:
        assert await first.unary_unary(path("Unary"))(b"1") == b"1"
        async with WireChannel(f"127.0.0.1:{port}", ChannelOptions(connections=1)) as second:
            with pytest.raises(grpc.aio.AioRpcError, match="Failed to connect"):
                await second.unary_unary(path("Unary"))(b"2")
            assert await first.unary_unary(path("Unary"))(b"3") == b"3"
    await server.stop()


async def test_a_server_closed_to_new_connections_serves_those_that_it_has_and_opens_again() -> None:
    refused: list[str] = []
    server = WireServer(refused=refused.append)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with WireChannel(f"127.0.0.1:{port}", ChannelOptions(connections=1)) as first:
        assert await first.unary_unary(path("Unary"))(b"1") == b"1"
        server.is_closed_to_new = True
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await asyncio.wait_for(reader.read(), HANG)).endswith(b"no more connections")
        writer.close()
        assert await first.unary_unary(path("Unary"))(b"2") == b"2"
        server.is_closed_to_new = False
        async with WireChannel(f"127.0.0.1:{port}", ChannelOptions(connections=1)) as second:
            assert await second.unary_unary(path("Unary"))(b"3") == b"3"
    assert refused == ["memory"]
    await server.stop()


HEALTH = path("Unary")


@contextlib.asynccontextmanager
async def closed_to_new(**more: Any) -> AsyncIterator[tuple[WireServer, str, list[str]]]:
    """A server that takes no new connections but for `HEALTH`, its address, and why it refused connections."""
    refused: list[str] = []
    server = WireServer(vital=[HEALTH], refused=refused.append, **more)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    port = server.listen("127.0.0.1:0")
    await server.start()
    server.is_closed_to_new = True
    try:
        yield server, f"127.0.0.1:{port}", refused
    finally:
        await server.stop()


async def test_health_is_served_on_new_connections_where_all_else_is_refused() -> None:
    async with closed_to_new() as (server, address, refused), grpc.aio.insecure_channel(address) as channel:
        for _ in range(3):
            assert await channel.unary_unary(HEALTH)(b"well?") == b"well?"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(path("Other"))(b"x")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert set(refused) == {"memory"}
        server.is_closed_to_new = False
        assert await channel.unary_unary(HEALTH)(b"well?") == b"well?"


async def test_a_call_that_is_turned_away_has_not_begun_so_its_client_may_send_it_elsewhere() -> None:
    async with closed_to_new() as (_, address, _):
        with connect(int(address.rpartition(":")[2])) as peer:
            await asyncio.to_thread(peer.greet)
            peer.send(request(HEALTH.encode(), b"well?") + request(b"/other", b"x", stream=3))
            await asyncio.to_thread(peer.wait, lambda: peer.goaway is not None)
            assert peer.goaway is not None
            assert peer.goaway.payload == u32(2) + u32(0) + b"no more connections"  # the last that may have begun


async def test_who_holds_connections_for_health_gives_way_to_who_asks() -> None:
    async with closed_to_new() as (server, address, refused):
        port = int(address.rpartition(":")[2])
        with contextlib.ExitStack() as exits:
            for _ in range(3 * MOST_NARROW):
                exits.enter_context(connect(port))
            async with grpc.aio.insecure_channel(address) as channel:
                assert await channel.unary_unary(HEALTH)(b"well?") == b"well?"
            await until(lambda: server.connections <= MOST_NARROW, HANG, "the older ones are closed")
            assert refused == ["memory"] * (3 * MOST_NARROW + 1)


async def test_health_is_served_beyond_the_most_connections_too() -> None:
    async with closed_to_new(max_connections=1) as (server, address, refused):
        server.is_closed_to_new = False
        with connect(int(address.rpartition(":")[2])):
            async with grpc.aio.insecure_channel(address) as channel:
                assert await channel.unary_unary(HEALTH)(b"well?") == b"well?"
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(path("Other"))(b"x")
        assert set(refused) == {"max_connections"}


async def test_the_connection_that_holds_the_most_is_reset_and_those_that_hold_little_never() -> None:
    async with wire_server(Service()) as (server, address):
        port = int(address.rpartition(":")[2])
        with contextlib.ExitStack() as exits:
            small, large, idle = peers = [exits.enter_context(connect(port)) for _ in range(3)]
            for peer in peers:
                await asyncio.to_thread(peer.greet)
            for peer, size in ((small, 2 << 20), (large, 4 << 20)):
                peer.send(head(path("Unary").encode()) + data(1, b"\0" + u32(size + 16_384)))
                for _ in range(0, size, 16_384):
                    await asyncio.to_thread(peer.send, data(1, bytes(16_384)))
            for peer, held in ((large, 4 << 20), (small, 2 << 20)):
                await until(lambda held=held: max(e.wire.weight for e in server._edges) >= held, HANG, "what was sent")
                found = server.reset_heaviest()
                assert found is not None
                assert held <= found[1] < held + 100_000
                assert await asyncio.to_thread(peer.wait_closed)
                assert peer.goaway is not None
                assert (peer.goaway.code, b"memory" in peer.goaway.payload) == (11, True)
            assert server.reset_heaviest() is None
            assert not idle.closed


async def test_an_http1_client_is_closed_and_nobody_else() -> None:
    async with wire_server(Service()) as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(reader.read(), HANG)
        writer.close()
        async with grpc.aio.insecure_channel(address) as channel:
            assert await channel.unary_unary(path("Unary"))(b"x") == b"x"


async def test_why_streams_were_reset_is_logged_once_a_minute_and_only_for_debugging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "gateway.transport")
    malformed = hpack.Encoder().encode([(":method", "POST"), (":path", "/a.B/C")])
    async with wire_server() as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        writer.write(frame(1, 5, 1, malformed) + frame(1, 5, 3, malformed) + frame(6, 0, 0, bytes(8)))
        received = b""
        while frame(6, 1, 0, bytes(8)) not in received:  # the PING is answered after the requests
            received += await reader.read(1 << 16)
        writer.close()
    lines = [record for record in caplog.records if "broke the rules of HTTP/2" in record.message]
    assert [record.levelname for record in lines] == ["DEBUG"]
    assert lines[0].message.endswith("a request has a :method, a :scheme and a :path")


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    server = WireServer()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    server.listen(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as theirs, WireChannel(f"unix:{tmp_path}/s") as ours:
        assert await theirs.unary_unary(path("Unary"))(b"x") == b"x"
        assert await ours.unary_unary(path("Unary"))(b"x") == b"x"
    await server.stop()


async def test_tls_serves_grpcio_and_our_own_channel(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("localhost")
    async with _tls_server(server_tls(files.certificate, files.key)) as port:
        credentials = grpc.ssl_channel_credentials(read(files.ca))
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as theirs:
            assert await theirs.unary_unary(path("Unary"))(bytes(500_000)) == bytes(500_000)
        options = ChannelOptions(tls=client_tls(files.ca), server_name="localhost")
        async with WireChannel(f"127.0.0.1:{port}", options) as ours:
            assert await ours.unary_unary(path("Unary"))(bytes(500_000)) == bytes(500_000)


async def test_our_channel_speaks_tls_to_grpcio(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("localhost")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    pair = (read(files.key), read(files.certificate))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    options = ChannelOptions(tls=client_tls(files.ca), server_name="localhost")
    async with WireChannel(f"127.0.0.1:{port}", options) as channel:
        assert await channel.unary_unary(path("Unary"))(b"x") == b"x"
    await server.stop(None)


async def test_mtls_lets_in_only_who_shows_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files, mine = authority.issue("localhost"), authority.issue("client")
    async with _tls_server(server_tls(files.certificate, files.key, client_ca=files.ca)) as port:
        good = ChannelOptions(tls=client_tls(files.ca, mine.certificate, mine.key), server_name="localhost")
        async with WireChannel(f"127.0.0.1:{port}", good) as channel:
            assert await channel.unary_unary(path("Unary"))(b"x") == b"x"
        bad = ChannelOptions(tls=client_tls(files.ca), server_name="localhost")
        async with WireChannel(f"127.0.0.1:{port}", bad) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(path("Unary"))(b"x")
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", ["other.example", None], ids=["wrong name", "address instead of name"])
async def test_a_certificate_for_someone_else_is_refused(tmp_path: Path, name: str | None) -> None:
    files = Authority(tmp_path).issue("localhost")
    async with (
        _tls_server(server_tls(files.certificate, files.key)) as port,
        WireChannel(f"127.0.0.1:{port}", ChannelOptions(tls=client_tls(files.ca), server_name=name)) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(path("Unary"))(b"x")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert channel.state is State.TRANSIENT_FAILURE


async def test_tls_without_h2_is_closed(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("localhost")
    async with _tls_server(server_tls(files.certificate, files.key)) as port:
        context = ssl.create_default_context(cafile=files.ca)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), HANG) == b""
        writer.close()


class _tls_server:  # noqa: N801  # reads as a function where it is used
    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._server = WireServer()

    async def __aenter__(self) -> int:
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
        port = self._server.listen("127.0.0.1:0", self._context)
        await self._server.start()
        return port

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop()


def _late_reply(seconds: float) -> Any:
    def handle(call: ServerCall) -> None:
        asyncio.get_running_loop().call_later(seconds, lambda: call.reply(call.body))

    return handle


CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01"  # the first bytes of one


async def tls_server(folder: Path, **settings: Any) -> tuple[WireServer, str, ssl.SSLContext]:
    """A server, its address, and the context of a client that trusts it."""
    files = Authority(folder).issue("localhost")
    server = WireServer(**settings)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(Service())),))
    port = server.listen("127.0.0.1:0", server_tls(files.certificate, files.key))
    await server.start()
    return server, f"localhost:{port}", client_tls(files.ca, None, None)


async def test_connections_in_their_tls_handshake_count_and_those_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    refused: list[str] = []
    server, address, context = await tls_server(
        tmp_path, max_connections=3, refused=refused.append, limits=Limits(handshake_seconds=0.5)
    )
    with contextlib.ExitStack() as exits:  # the loop does not turn meanwhile, so that they all come at once
        *halves, late = [exits.enter_context(socket.create_connection(address.split(":"))) for _ in range(4)]
        for half in halves:
            half.sendall(CLIENT_HELLO)
        assert await asyncio.to_thread(late.recv, 1) == b""
        assert refused == ["max_connections"]
        for half in halves:  # they are cut for their slowness
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(half.recv, 1) == b""
    async with WireChannel(address, ChannelOptions(tls=context, connections=1)) as channel:
        assert await channel.unary_unary(path("Unary"))(b"1") == b"1"
    await server.stop()


async def test_tls_connections_up_to_the_limit_are_served(tmp_path: Path) -> None:
    refused: list[str] = []
    server, address, context = await tls_server(tmp_path, max_connections=3, refused=refused.append)
    async with contextlib.AsyncExitStack() as exits:
        for _ in range(3):
            options = ChannelOptions(tls=context, connections=1)
            channel = await exits.enter_async_context(WireChannel(address, options))
            assert await channel.unary_unary(path("Unary"))(b"1") == b"1"
    assert not refused
    await server.stop()


async def test_a_tls_connection_whose_descriptor_is_reserved_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []
    server, address, _ = await tls_server(tmp_path, descriptors=3, refused=refused.append)
    reader, writer = await asyncio.open_connection(*address.split(":"))
    assert await asyncio.wait_for(reader.read(), HANG) == b""
    writer.close()
    await server.stop()
    assert refused == ["descriptors"]


async def test_a_server_that_stops_ends_handshakes(tmp_path: Path) -> None:
    server, address, _ = await tls_server(tmp_path)
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(CLIENT_HELLO)
    while not server._shaking:  # noqa: ASYNC110  (no event tells of it)
        await asyncio.sleep(0.001)
    await server.stop()
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), HANG) == b""
    writer.close()
