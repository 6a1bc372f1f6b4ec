"""Listening for both IPs, and reaching a name of which some addresses swallow what is sent to them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from aio_channel import WireChannel
from patience import HANG

from gateway.admin import Admin
from gateway.api.listener import CannotServe
from gateway.supervisor import reserve
from gateway.transport import sockets
from gateway.transport.dialer import ChannelOptions, State
from gateway.transport.listener import WireServer
from gateway.transport.sockets import bind, connect, in_turns

V4, V6 = socket.AF_INET, socket.AF_INET6


class Source:
    """Of an admin plane that has nothing to show."""

    def is_live(self) -> bool:
        return True

    def readiness(self) -> tuple[bool, list[str]]:
        return True, []

    def state(self) -> dict[str, object]:
        return {}

    def config(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize("client", ["127.0.0.1", "[::1]"])
async def test_every_ipv6_address_is_every_ipv4_address_too(client: str) -> None:
    server = WireServer()
    port = server.listen("[::]:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{client}:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/no/such")(b"", timeout=HANG)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop()


async def test_a_caller_by_ipv4_is_shown_as_one() -> None:
    peers: list[str] = []

    async def note(request: bytes, context: Any) -> bytes:
        peers.append(context.peer())
        return request

    server = WireServer()
    handler = grpc.unary_unary_rpc_method_handler(note)
    server.add_registered_method_handlers("t", {"Note": handler})
    port = server.listen("[::]:0")
    await server.start()
    try:
        for client in ("127.0.0.1", "[::1]"):
            async with WireChannel(f"{client}:{port}") as channel:
                await channel.unary_unary("/t/Note")(b"", timeout=HANG)
    finally:
        await server.stop()
    assert [peer.rpartition(":")[0] for peer in peers] == ["ipv4:127.0.0.1", "ipv6:[::1]"]


async def test_the_admin_plane_takes_both() -> None:
    async with Admin(Source(), "[::]:0", lambda accept: (b"", "text/plain")) as admin:
        port = int(admin.address.rpartition(":")[2])
        for host in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.0 200")
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize("listen", ["[::]:0", "127.0.0.1:0"])
def test_a_port_can_be_held_once_and_is_not_listened_on(listen: str) -> None:
    with reserve(listen) as (address, held):
        assert not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert address.endswith(f":{held.getsockname()[1]}")
        with pytest.raises(CannotServe, match="cannot listen on"), reserve(address):
            pass
    with reserve(address):
        pass


def test_a_port_that_another_has_by_ipv4_is_not_taken_for_both() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other, pytest.raises(OSError, match="in use"):
        bind("::", other.getsockname()[1])


def test_without_ipv6_every_address_is_every_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def none(family: int = V4, *rest: Any) -> socket.socket:
        if family == V6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *rest)

    monkeypatch.setattr(sockets.socket, "socket", none)
    with bind("::", 0) as bound:
        assert bound.family == V4
    with pytest.raises(OSError, match="not supported"):
        bind("::1", 0)


# Reaching a name


@pytest.fixture
def hole() -> Iterator[int]:
    """A port of 127.0.0.2 that swallows every SYN: its queue is full."""
    with ExitStack() as exits:
        deaf = exits.enter_context(socket.socket())
        deaf.bind(("127.0.0.2", 0))
        deaf.listen(0)
        for _ in range(4):
            waits = exits.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(deaf.getsockname())
        time.sleep(0.1)
        yield deaf.getsockname()[1]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the name `several.test` these addresses, at any port."""
    real = socket.getaddrinfo

    def set_to(*hosts: str) -> None:
        def look_up(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
            if host != "several.test":
                return real(host, port, *rest, **options)
            if options.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "not an address")
            return [(V4, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return set_to


async def test_a_name_whose_first_address_swallows_packets_connects_by_the_next(
    hole: int, resolve: Callable[..., None]
) -> None:
    """The first attempt, so that it does not take the time that a connection may take."""
    resolve("127.0.0.2", "127.0.0.1")
    server = WireServer()
    server.listen(f"127.0.0.1:{hole}")
    await server.start()
    channel = WireChannel(f"several.test:{hole}", ChannelOptions(connections=1, connect_seconds=3600.0))
    states: list[State] = []
    channel.on_state = states.append
    try:
        await asyncio.wait_for(channel.channel_ready(), HANG)
        assert states == [State.CONNECTING, State.READY]
    finally:
        await channel.close()
        await server.stop()


async def test_an_address_that_refuses_gives_way_at_once_and_the_last_failure_is_told(
    resolve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "NEXT_ADDRESS_SECONDS", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as good:
        port = good.getsockname()[1]
        resolve("127.0.0.3", "127.0.0.4", "127.0.0.1")
        made = await asyncio.wait_for(connect("several.test", port), HANG)
        assert made.getpeername() == ("127.0.0.1", port)
        made.close()
        resolve("127.0.0.3", "127.0.0.4")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(connect("several.test", port), HANG)


async def test_whoever_gives_up_leaves_no_socket_behind(hole: int, resolve: Callable[..., None]) -> None:
    """Warnings are errors here, and a socket that is forgotten open is one."""
    resolve("127.0.0.2", "127.0.0.2")
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(connect("several.test", hole), 0.4)


def test_families_take_turns() -> None:
    found = [(V6, 1), (V6, 2), (V6, 3), (V4, 4), (V4, 5)]
    assert [place for _, place in in_turns(found)] == [1, 4, 2, 5, 3]
    assert in_turns([]) == []
