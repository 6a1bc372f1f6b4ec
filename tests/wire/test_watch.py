"""Frame headers are understood however the bytes are cut; what a client may not do is told, what it may is not."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest

from gateway.wire.watch import MOST_OPEN, PREFACE, FrameWatch

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, CONTINUATION, UNKNOWN = 0, 1, 2, 3, 4, 6, 9, 0xEE
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def opened(stream: int, flags: int = 0) -> bytes:
    return frame(HEADERS, END_HEADERS | flags, stream, b"block")


def ended(stream: int) -> bytes:
    return opened(stream) + frame(DATA, END_STREAM, stream, b"x")


def read(watch: FrameWatch, pieces: Iterable[bytes]) -> str:
    """What was found, or ""."""
    for second, piece in enumerate(pieces):
        fault = watch.read(piece, second)
        if fault is not None:
            return fault[1]
    return ""


GOOD = {
    "calls one after the other": b"".join(ended(2 * n + 1) for n in range(20)),
    "calls at once": opened(1) + opened(3) + ended(5) + frame(DATA, END_STREAM, 1) + frame(DATA, END_STREAM, 3),
    "trailers": opened(1) + frame(DATA, 0, 1, b"x") + opened(1, END_STREAM),
    "a head in pieces": frame(HEADERS, 0, 1, b"a") + frame(CONTINUATION, END_HEADERS, 1, b"b") + frame(DATA, 0, 1),
    "resetting": opened(1) + frame(RST, 0, 1, bytes(4)) + ended(3) + frame(RST, 0, 3, bytes(4)),
    "priorities": frame(PRIORITY, 0, 1, b"\0\0\0\x03\x10") + frame(PRIORITY, 0, 3, b"\0\0\0\0\x10") + ended(5),
    "reserved bits": frame(HEADERS, END_HEADERS, 1 | 1 << 31, b"b") + frame(DATA, END_STREAM, 1),
    "frames of the connection": frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) + frame(UNKNOWN, 0xFF, 7, b"?"),
}
BAD = {
    "DATA after the end": ended(1) + frame(DATA, 0, 1),
    "HEADERS after the end": ended(1) + opened(1),
    "trailers twice": opened(1) + opened(1, END_STREAM) + opened(1, END_STREAM),
    "DATA after a reset": opened(1) + frame(RST, 0, 1, bytes(4)) + frame(DATA, 0, 1),
    "a stream that was skipped": opened(5) + opened(3),
    "PRIORITY on no stream": frame(PRIORITY, 0, 0, b"\0\0\0\x03\x10"),
    "PRIORITY on itself": frame(PRIORITY, 0, 3, b"\0\0\0\x03\x10"),
}


def cuts(data: bytes) -> dict[str, list[bytes]]:
    order = random.Random(5)
    at, some = 0, []
    while at < len(data):
        size = order.randint(1, 20)
        some.append(data[at : at + size])
        at += size
    return {"whole": [data], "bytes": [data[n : n + 1] for n in range(len(data))], "some": some}


@pytest.mark.parametrize("cut", ["whole", "bytes", "some"])
@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_only_faults_are_found_however_the_bytes_are_cut(name: str, cut: str) -> None:
    data = bytes(PREFACE) + {**GOOD, **BAD}[name]
    watch = FrameWatch()
    assert bool(read(watch, cuts(data)[cut])) is (name in BAD)
    if name in GOOD:
        assert watch.since is None


def test_streams_that_the_client_leaves_open_are_forgotten_in_time_and_then_tolerated() -> None:
    """After we reset a stream, the client may send on it for a while, or never again."""
    watch = FrameWatch()
    watch.read(bytes(PREFACE), 0.0)
    for n in range(3 * MOST_OPEN):
        assert watch.read(opened(2 * n + 1), 0.0) is None
        assert len(watch._open) <= MOST_OPEN
    assert watch.read(frame(DATA, 0, 1), 0.0) is None
    last = 2 * (3 * MOST_OPEN) + 1
    assert read(watch, [ended(last), frame(DATA, 0, last)]) != ""


@pytest.mark.parametrize(
    ("data", "since"),
    [
        (frame(PING, 0, 0, bytes(8))[:5], 0),
        (frame(PING, 0, 0, bytes(8))[:12], 0),
        (ended(1) + frame(PING, 0, 0, bytes(8))[:12], 0),
        (frame(HEADERS, 0, 1, b"block"), 0),
        (frame(HEADERS, 0, 1, b"block") + frame(CONTINUATION, 0, 1, b"more"), 0),
        (opened(1) + frame(DATA, 0, 1, bytes(1000))[:500], None),
        (ended(1), None),
    ],
    ids=["half a header", "half a frame", "behind others", "half a block", "more of it", "half DATA", "nothing"],
)
def test_what_is_half_here_is_told_since_when(data: bytes, since: float | None) -> None:
    watch = FrameWatch()
    watch.read(bytes(PREFACE), 0.0)
    watch.read(data, 0.0)
    assert watch.since == since


def test_bytes_that_dribble_in_do_not_make_a_half_frame_younger() -> None:
    watch = FrameWatch()
    watch.read(bytes(PREFACE), 0.0)
    data = frame(HEADERS, 0, 1, b"block") + frame(CONTINUATION, 0, 1, b"more")
    for second in range(len(data)):
        watch.read(data[second : second + 1], float(second))
        assert watch.since == 0.0
