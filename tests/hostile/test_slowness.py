"""Peers that are slow or only take up room: ended by a timer of a name, never in the way of honest calls.

The timers are shortened here; their defaults are in `gateway.http2.limits`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from frames import HANG, INITIAL_WINDOW, PREFACE, Peer, connect, data, message, settings, window
from processes import FAST, LARGE, Honest, Served, head, request, target
from slowness import slowness

KiB, MiB = 1 << 10, 1 << 20
CALM = 11
LARGEST = (1 << 31) - 1

LIMITS = {"handshake_seconds": 1, "frame_seconds": 1, "first_message_seconds": 1, "write_stall_seconds": 2}


@pytest.fixture(scope="module")
def quick() -> Iterator[Served]:
    with target(limits=LIMITS) as served:
        yield served


def greeted(then: bytes) -> Callable[[Served], Peer]:
    def open_(served: Served) -> Peer:
        peer = served.connect()
        peer.send(then)
        return peer

    return open_


def raw(start: bytes) -> Callable[[Served], Peer]:
    def open_(served: Served) -> Peer:
        peer = connect(served.port)
        peer.send(start)
        return peer

    return open_


SLOW_STARTS = {
    "silence": raw(b""),
    "half a preface": raw(PREFACE[:10]),
    "no SETTINGS": raw(PREFACE),
    "half a frame": greeted(b"\0\0"),
    "half a head": greeted(head(FAST)[:30]),
}


@pytest.mark.parametrize("start", SLOW_STARTS)
def test_a_hundred_clients_that_do_not_get_on_are_closed(start: str, quick: Served) -> None:
    memory = quick.memory
    with ExitStack() as exits, Honest(quick.port) as honest:
        idle = exits.enter_context(quick.connect())
        peers = [exits.enter_context(SLOW_STARTS[start](quick)) for _ in range(100)]
        assert quick.memory - memory < 100 * 40 * KiB
        assert all(peer.wait_closed() for peer in peers)
        idle.send(request(FAST, b"x"))
        assert idle.answer(1).status == "0"
    assert honest.held()


def test_a_head_that_dribbles_in_is_closed(quick: Served) -> None:
    with quick.connect() as peer:
        for byte in head(FAST)[:-1]:
            if not peer.send(bytes((byte,))) or peer.wait_closed(0.1):
                break
        assert peer.closed


@pytest.mark.parametrize(
    "start", [b"", message(b"hello")[:3], message(b"hello")[:-1]], ids=["nothing", "prefix", "half"]
)
def test_calls_that_only_hold_their_place_are_ended(start: bytes, quick: Served) -> None:
    """Twenty connections with a hundred calls each."""
    with ExitStack() as exits, Honest(quick.port) as honest:
        peers = [exits.enter_context(quick.connect()) for _ in range(20)]
        streams = range(1, 201, 2)
        for peer in peers:
            peer.send(b"".join(head(FAST, stream=s) + (data(s, start) if start else b"") for s in streams))
        for peer in peers:
            answers = [peer.answer(stream) for stream in streams]
            assert {answer.status for answer in answers} == {"4"}
    assert honest.held()
    assert quick.stats()["calls"] == 0


# Reading slowly


@pytest.mark.parametrize("dribble", [0, 1], ids=["no window", "one byte now and then"])
def test_answers_that_nobody_takes_are_dropped(dribble: int, quick: Served) -> None:
    """Two hundred answers of 256 KiB, on two connections."""
    memory, streams = quick.memory, range(1, 201, 2)
    with ExitStack() as exits, Honest(quick.port) as honest:
        peers = [exits.enter_context(connect(quick.port).greet([(INITIAL_WINDOW, 0)])) for _ in range(2)]
        for peer in peers:
            peer.send(b"".join(request(LARGE, b"262144", stream=stream) for stream in streams))
        until = time.monotonic() + HANG
        while time.monotonic() < until and not all(
            peer.answers.get(s) and peer.answers[s].over for s in streams for peer in peers
        ):
            for peer in peers:
                if dribble:
                    peer.send(b"".join(window(stream, dribble) for stream in streams[::4]))
                peer.wait(lambda: False, 0.25)
        assert {peer.answers[stream].reset for stream in streams for peer in peers} == {CALM}
        assert quick.memory - memory < 64 * MiB
    assert honest.held()
    assert quick.stats()["calls"] == 0


def test_a_socket_that_is_never_read_is_closed(quick: Served) -> None:
    memory = quick.memory
    with connect(quick.port, buffer=4096).greet([(INITIAL_WINDOW, LARGEST)]) as peer:
        peer.send(window(0, LARGEST - 65_535) + request(LARGE, str(32 * MiB).encode()))
        deadline = time.monotonic() + HANG
        while quick.stats()["connections"] > 1 and time.monotonic() < deadline:
            assert quick.memory - memory < 40 * MiB  # the answer itself, and little more
            time.sleep(0.2)
        assert quick.stats()["connections"] == 1  # the one that asks


def test_a_slow_reader_who_keeps_reading_is_not_cut() -> None:
    """The socket stays full for longer than a stall may last, since the kernel's own buffer empties slowly."""
    with (
        target(limits={"write_stall_seconds": 4}) as served,
        connect(served.port, buffer=16 * KiB).greet([(INITIAL_WINDOW, LARGEST)]) as peer,
    ):
        peer.send(window(0, LARGEST - 65_535) + request(LARGE, str(16 * MiB).encode()))
        for _ in range(70):
            time.sleep(0.1)
            assert peer.read() is not None
        assert peer.answers[1].reset is None
        assert served.stats()["connections"] == 2  # with the one that asks


# Too many connections


def test_connections_beyond_the_limit_are_told_to_leave() -> None:
    with target(server={"max_connections": 20}) as served, ExitStack() as exits:
        peers = [exits.enter_context(served.connect()) for _ in range(20)]
        for _ in range(3):
            with connect(served.port) as refused:
                refused.send(PREFACE + settings())
                assert refused.wait_closed()
                assert refused.goaway is not None
        for peer in peers:
            peer.send(request(FAST, b"x"))
            assert peer.answer(1).status == "0"
        peers[0].sock.close()
        until_asked(served)


def test_running_out_of_files_neither_kills_nor_spins() -> None:
    """A storm of 300 connections on a process that may have 64 files."""
    with target(files=64) as served, Honest(served.port) as honest:
        sockets = []
        for _ in range(300):
            sock = socket.socket()
            sock.settimeout(HANG)
            sock.connect(("127.0.0.1", served.port))
            sockets.append(sock)
        cpu = served.cpu
        time.sleep(1.0)
        assert served.cpu - cpu < 0.5 * slowness()
        for sock in sockets:
            sock.close()
        until_asked(served)
    assert honest.held()


def until_asked(served: Served) -> None:
    """Wait until it takes connections again, which it does once it has heard of the end of others."""
    until = time.monotonic() + HANG
    while served.ask(FAST, b"x").status != "0":
        assert time.monotonic() < until
        time.sleep(0.05)
