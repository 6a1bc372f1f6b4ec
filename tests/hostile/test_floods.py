"""Peers that flood: each is cut at its named limit, and costs little until then, while honest calls hold.

`allowed` units of an attack are borne by the default limits (`gateway.http2.limits`) without a word; before `most` are
sent, the connection is cut. Exactly where is tested on limits that do not refill, and in memory in `tests/rpc`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PRIORITY,
    Peer,
    block,
    data,
    frame,
    headers,
    integer,
    literal,
    message,
    ping,
    rst,
    settings,
    u32,
    window,
)
from processes import FAST, SLEEP, Honest, Served, head, request, target
from slowness import slowness

from gateway.http2.limits import Limits

MiB = 1 << 20
CALM = 11  # ENHANCE_YOUR_CALM
LARGEST = (1 << 31) - 1

Unit = Callable[[int], bytes]
"""What is sent on the n-th stream, or the n-th time."""


class Flood(NamedTuple):
    unit: Unit
    limit: str  # its name
    allowed: int  # units
    most: int
    opening: bytes = b""
    cpu: float = 0.15  # seconds that one connection may cost in all


def opened(then: Unit, path: bytes = SLEEP) -> Unit:
    """Open a call, then do something to it."""
    return lambda stream: head(path, stream=stream) + then(stream)


def answered(then: Unit) -> Unit:
    """A whole call that is under way, then something on it."""
    return lambda stream: request(SLEEP, b"x", stream=stream) + then(stream)


HELD = head(FAST)  # a call on stream 1 that does not end
UNFINISHED = HELD + data(1, b"\0" + u32(MiB))  # nor does its message
BOMB = literal(b"x", b"v" * 3900, kind=0x40)

FLOODS = {
    "rapid reset": Flood(opened(rst), "resets", 900, 1500),
    "rapid reset of whole calls": Flood(answered(rst), "resets", 900, 1500),
    "answered early": Flood(lambda stream: head(b"/x/y", stream=stream), "resets", 900, 1500),
    "made to reset: WINDOW_UPDATE 0": Flood(opened(lambda stream: window(stream, 0)), "resets", 0, 500),
    "made to reset: window overflow": Flood(opened(lambda stream: window(stream, LARGEST)), "resets", 0, 500),
    "made to reset: DATA after the end": Flood(answered(lambda stream: data(stream, b"x")), "resets", 0, 500),
    "made to reset: HEADERS after the end": Flood(answered(lambda s: head(SLEEP, stream=s)), "resets", 0, 500),
    "made to reset: PRIORITY of 1 byte": Flood(opened(lambda s: frame(PRIORITY, 0, s, b"x")), "resets", 0, 500),
    "made to reset: no method": Flood(
        lambda stream: headers(stream, block(((b":path", b"/x"), (b":scheme", b"http")))), "resets", 50, 500
    ),
    "made to reset: a field without a name": Flood(
        lambda stream: head(FAST, (b"", b"x"), stream=stream), "resets", 50, 500
    ),
    "streams beyond the limit": Flood(lambda stream: head(FAST, stream=stream), "max_streams", 900, 1500),
    "SETTINGS": Flood(lambda _: settings(), "control", 900, 2000),
    "SETTINGS with values": Flood(lambda n: settings([(4, 65_535 + n)]), "control", 900, 2000),
    "PING": Flood(lambda _: ping(), "control", 900, 2000),
    "WINDOW_UPDATE by 1": Flood(lambda _: window(0, 1), "control", 900, 2000),
    "WINDOW_UPDATE by 1 on a stream": Flood(lambda _: window(1, 1), "control", 900, 2000, HELD),
    "empty DATA": Flood(lambda _: data(1, b""), "glitches", 300, 1500, HELD),
    "DATA of one byte, a hundred": Flood(lambda _: data(1, b"x") * 100, "tiny", 90, 400, UNFINISHED),
    "DATA of one byte on a call that is over, a hundred": Flood(
        lambda _: data(1, b"x") * 100, "tiny", 90, 400, head(b"/x/y")
    ),
    "PRIORITY": Flood(lambda stream: frame(PRIORITY, 0, stream, u32(0) + b"x"), "glitches", 300, 1500),
    "unknown frames": Flood(lambda _: frame(0xFA, 0, 0, b"unknown"), "glitches", 300, 1500),
    "CONTINUATION": Flood(
        lambda _: frame(CONTINUATION, 0, 1, b"\0\x01x\x01y" * 100), "max_continuations", 6, 64, headers(1, b"", 0)
    ),
    "empty CONTINUATION": Flood(lambda _: frame(CONTINUATION, 0, 1), "max_continuations", 6, 64, headers(1, b"", 0)),
    "empty HEADERS, unfinished": Flood(lambda _: frame(HEADERS, 0, 1), "none: against the protocol", 0, 5),
    "HPACK bomb": Flood(
        lambda stream: headers(stream, head(FAST)[9:] + integer(0x80, 7, 62) * 16_000),
        "header_list_bytes_hard",
        0,
        5,
        headers(1, head(FAST)[9:] + BOMB),
    ),
    "heads just too large": Flood(
        lambda stream: headers(stream, head(FAST)[9:] + literal(b"x", b"v" * 16_000)),
        "resets",
        50,
        1500,
        cpu=1.0,
    ),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with target() as served:
        yield served


def units(flood: Flood, first: int, number: int) -> bytes:
    return b"".join(flood.unit(2 * n + 3) for n in range(first, first + number))


def is_alive(peer: Peer, stream: int) -> bool:
    peer.send(request(FAST, b"alive", stream=stream))
    return peer.answer(stream).status == "0"


def drain(peer: Peer, seconds: float) -> None:
    """Read what there is, for no longer than this."""
    peer.wait(lambda: peer.closed, seconds)


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_cut_at_its_limit_and_not_before(name: str, served: Served) -> None:
    flood = FLOODS[name]
    with served.connect() as peer:
        peer.send(flood.opening)
        step = min(10, flood.allowed or 1)
        for sent in range(0, flood.allowed, step):
            peer.send(units(flood, sent, step))
            drain(peer, 0.001)
        drain(peer, 0.02)
        assert not peer.closed, f"{flood.limit} is said to allow {flood.allowed}"
        for sent in range(flood.allowed, flood.most, 10):
            peer.send(units(flood, sent, 10))
            drain(peer, 0.001)
            if peer.closed:
                break
        assert peer.wait_closed(), f"{flood.most} were borne"
    assert served.alive


@pytest.mark.parametrize("connections", [1, 20])
@pytest.mark.parametrize("name", FLOODS)
def test_honest_calls_hold_while_others_flood(name: str, connections: int, served: Served) -> None:
    """As fast as the attackers can send, and they read nothing of what they are answered."""
    flood = FLOODS[name]
    attack = flood.opening + units(flood, 0, flood.most * 3)
    cost = Cost(served)
    with Honest(served.port) as honest:
        together(connections, lambda: blast(served, attack))
    assert honest.held()
    assert cost.cpu < (flood.cpu * connections + 0.2 + 0.1 * cost.seconds) * slowness()
    assert cost.memory < connections * (2 * MiB + Limits().open_heads_bytes) + 4 * MiB
    assert cost.lag < 0.15 * slowness()
    assert served.stats()["most_sleeping"] <= 1000 * connections


class Cost:
    """What a server has spent since then."""

    def __init__(self, served: Served) -> None:
        served.stats()  # forgets how late the loop was before
        self._served = served
        self._before = served.cpu, served.memory
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """In which honest calls, and looks at how late the loop is, cost something too."""
        return time.monotonic() - self._began

    @property
    def cpu(self) -> float:
        return self._served.cpu - self._before[0]

    @property
    def memory(self) -> int:
        return self._served.memory - self._before[1]

    @property
    def lag(self) -> float:
        """How late its event loop was at worst, in seconds; asking forgets it."""
        return float(self._served.stats()["lag"])


def together(number: int, attack: Callable[[], None]) -> None:
    """Run an attack in threads, and wait for them."""
    threads = [threading.Thread(target=attack) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def blast(served: Served, attack: bytes) -> None:
    with served.connect() as peer:
        peer.send(attack)


@pytest.mark.parametrize("name", ["rapid reset of whole calls", "PING", "heads just too large"])
def test_honest_calls_hold_while_cut_attackers_come_back(name: str, served: Served) -> None:
    """For a second and a half, eight attackers connect anew whenever they are cut."""
    flood = FLOODS[name]
    attack = flood.opening + units(flood, 0, flood.most)
    until = time.monotonic() + 1.5

    def keep_on() -> None:
        while time.monotonic() < until:
            blast(served, attack)

    cost = Cost(served)
    with Honest(served.port) as honest:
        together(8, keep_on)
    assert honest.held()
    assert cost.memory < 16 * MiB + 8 * Limits().open_heads_bytes


def test_heads_far_too_large_are_cheap_to_refuse(served: Served) -> None:
    """A hundred of 56 KB in legal frames: less than a millisecond for 16 KB."""
    fragment = head(FAST)[9:] + literal(b"x", b"v" * 14_000) * 4
    pieces = [fragment[at : at + 16_384] for at in range(0, len(fragment), 16_384)]
    cost = Cost(served)
    with Honest(served.port) as honest, served.connect() as peer:
        for stream in range(1, 201, 2):
            peer.send(headers(stream, pieces[0], 0) + b"".join(frame(CONTINUATION, 0, stream, p) for p in pieces[1:-1]))
            peer.send(frame(CONTINUATION, END_HEADERS, stream, pieces[-1]) + data(stream, message(b"x"), END_STREAM))
            assert peer.answer(stream).status == "8"
    assert honest.held()
    assert cost.cpu < (100 * 3.5 * 0.001 + 0.1 + 0.1 * cost.seconds) * slowness()
    assert cost.memory < 4 * MiB


# Frames that carry next to nothing, and are legal: nobody is cut for them, so they must be cheap


@pytest.mark.parametrize(
    "dribble",
    [frame(DATA, PADDED, 1, b"\x05" + bytes(5)), data(1, b"x")],
    ids=["only padding", "one byte"],
)
def test_frames_that_carry_next_to_nothing_cost_next_to_nothing(dribble: bytes, served: Served) -> None:
    """A hundred and seventy thousand of them, and however many are here, others have their turn in between."""
    cost = Cost(served)
    with Honest(served.port) as honest, served.connect() as peer:
        peer.send(HELD + data(1, b"\0" + u32(256 * MiB)) + dribble * 170_000)
        assert peer.answer(1, 0.5).status is None
    assert honest.held()
    assert cost.cpu < (0.7 + 0.1 * cost.seconds) * slowness()
    assert cost.lag < 0.1 * slowness()
    assert cost.memory < 8 * MiB


# Exactly at the limits, which do not refill here


@pytest.fixture(scope="module")
def exact() -> Iterator[Served]:
    limits = {"resets": [20, 0], "control": [20, 0], "max_streams": 10, "max_continuations": 4}
    with target(limits=limits) as served:
        yield served


@pytest.mark.parametrize(
    ("unit", "allowed"),
    [
        pytest.param(opened(rst), 20, id="resets, by the peer"),
        pytest.param(lambda stream: head(b"/x/y", stream=stream), 20, id="resets, of calls answered early"),
        pytest.param(lambda stream: head(FAST, (b"", b"x"), stream=stream), 5, id="resets, of malformed requests"),
        pytest.param(lambda _: ping(), 19, id="control, PING"),  # the greeting has taken one
        pytest.param(lambda _: settings(), 19, id="control, SETTINGS"),
        pytest.param(lambda _: window(0, 1), 19, id="control, WINDOW_UPDATE"),
    ],
)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_rate_is_exact(unit: Unit, allowed: int, more: int, exact: Served) -> None:
    with exact.connect() as peer:
        for n in range(allowed + more):
            peer.send(unit(2 * n + 1))
            drain(peer, 0.005)
        drain(peer, 0.1)
        assert peer.closed is (more > 0)
        if more > 0:
            assert peer.goaway is not None
            assert peer.goaway.code == CALM
        else:
            assert is_alive(peer, 999)


@pytest.mark.parametrize(("streams", "cut"), [(9, False), (10, False), (11, True)])
def test_calls_at_once_are_exact(streams: int, cut: bool, exact: Served) -> None:
    """A client that has acknowledged the limit and exceeds it is cut (RFC 9113 sections 5.1.2 and 5.4)."""
    with exact.connect() as peer:
        for n in range(streams):
            peer.send(head(FAST, stream=2 * n + 1))
        peer.send(data(1, message(b"x"), END_STREAM))
        assert (peer.answer(1).status == "0") is not cut
        assert peer.closed is cut


@pytest.mark.parametrize(("frames", "cut"), [(3, False), (4, False), (5, True)])
def test_continuations_are_exact(frames: int, cut: bool, exact: Served) -> None:
    fragment = head(FAST)[9:]
    with exact.connect() as peer:
        peer.send(
            headers(1, fragment, 0) + frame(CONTINUATION, 0, 1) * (frames - 1) + frame(CONTINUATION, END_HEADERS, 1)
        )
        peer.send(data(1, message(b"x"), END_STREAM))
        assert (peer.answer(1).status == "0") is not cut
        assert peer.closed is cut


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("what", ["bytes", "fields"])
def test_header_limits_are_exact_and_end_one_call_only(what: str, more: int, served: Served) -> None:
    """Bytes are counted as RFC 9113 section 6.5.2 does: 32 more for each field."""
    given = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", FAST), (b":authority", b"test")]
    given += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    if what == "fields":
        given += [(b"x-%d" % n, b"") for n in range(100 - len(given) + more)]
    else:
        used = sum(len(name) + len(value) + 32 for name, value in given)
        given += [(b"x", b"v" * (16 * 1024 - used - 33 + more))]
    with served.connect() as peer:
        fragment = block(given)
        peer.send(headers(1, fragment[:16_000], 0) + frame(CONTINUATION, END_HEADERS, 1, fragment[16_000:]))
        peer.send(data(1, message(b"x"), END_STREAM))
        assert peer.answer(1).status == ("8" if more > 0 else "0")
        assert is_alive(peer, 3)
