"""Bodies that are laid where they belong, straight from the socket's buffer: as if they had come as bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import h2.events
import pytest
from h2_peers import REQUEST, ServerUnderTest, message
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http2.limits import Limits
from gateway.rpc.connection import LEAST_VIEW
from gateway.rpc.places import Place, lay
from gateway.rpc.server import ServerCall

LIMITS = Limits(stream_window=8 << 20, connection_window=64 << 20)


class Body(Place):
    """A message's place, as large as the message."""

    def __init__(self, laid: Laid, front: bytes, size: int) -> None:
        self.laid = laid
        self.memory = bytearray(size)
        self.memory[: len(front)] = front
        self.at = len(front)

    def feed(self, data: bytes) -> None:
        self.memory[self.at : self.at + len(data)] = data
        self._took(len(data))

    def feed_view(self, view: memoryview) -> None:
        self.laid.straight += len(view)
        self.feed(bytes(view))

    def maybe_room(self, most: int) -> memoryview | None:
        room = memoryview(self.memory)[self.at : self.at + most]
        return room if len(room) else None

    def filled(self, size: int) -> None:
        self.laid.straight += size
        self.laid.read_there += size
        self._took(size)

    def _took(self, size: int) -> None:
        self.at += size
        if self.laid.fault is not None and self.at > self.laid.fault:
            raise ZeroDivisionError


@dataclass
class Laid:
    """Lays every other call of a connection."""

    straight: int = 0  # bytes that came without being made an object
    read_there: int = 0  # of these, bytes that were read to where they belong
    bodies: dict[int, bytes] = field(default_factory=dict)
    whole: list[int] = field(default_factory=list)
    fault: int | None = None  # bytes after which laying throws

    def accept(self, call: ServerCall) -> None:
        call.cut_through = True
        self.bodies[call.id] = b""

        def arrived(call: ServerCall) -> None:
            if call.missing and len(self.bodies) % 2:
                body = Body(self, call.body, len(call.body) + call.missing)
                call.on_request = lambda done: self.end(done, bytes(body.memory))
                lay(call, body)
            elif not call.missing:
                self.end(call, call.body)

        call.on_request = arrived

    def end(self, call: ServerCall, body: bytes) -> None:
        self.whole.append(call.id)
        self.bodies[call.id] = body
        call.reply(b"done")


def receive(server: ServerUnderTest, data: bytes, sizes: list[int], to_places: bool = True) -> None:
    """Give bytes as a socket does, in one buffer that has others right after, or where they belong."""
    at = turn = 0
    while at < len(data):
        size = min(sizes[turn % len(sizes)], len(data) - at)
        room = server.connection.maybe_room() if to_places else None
        if room is not None:
            size = min(size, len(room))
            room[:size] = data[at : at + size]
            server.connection.filled(size, server.now)
        else:
            buffer = bytearray(data[at : at + size])
            with memoryview(buffer) as view:
                server.connection.receive_view(view, server.now)
            buffer[:] = bytes(len(buffer))  # it is the next read's
        server.pump()
        at, turn = at + size, turn + 1


@given(
    bodies=st.lists(st.integers(0, 400_000), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 3) | st.integers(LEAST_VIEW - 20, 262_144), min_size=1, max_size=5),
    frame=st.sampled_from([1000, 16_384, 65_536, 300_000]),
    padding=st.sampled_from([None, 0, 7]),
    to_places=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_body_is_laid_as_it_was_sent_however_it_is_cut(
    bodies: list[int], sizes: list[int], frame: int, padding: int | None, to_places: bool
) -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, LIMITS)
    sent = {}
    for size in bodies:
        stream = server.open(REQUEST)
        sent[stream] = message(bytes(range(251)) * (size // 251 + 1))[: size + 5]
        sent[stream] = message(sent[stream][5:])
    left = dict(sent)
    while left:  # a frame of each in turn
        for stream, rest in list(left.items()):
            server.h2.send_data(stream, rest[:frame], end_stream=len(rest) <= frame, pad_length=padding)
            left[stream] = rest[frame:]
            if not left[stream]:
                del left[stream]
    data = server.h2.data_to_send()
    sizes = sizes if max(sizes) > 1000 or len(data) < 20_000 else [*sizes, 100_000]
    receive(server, data, sizes, to_places)
    assert not server.bugs
    assert laid.bodies == {s: b[5:] for s, b in sent.items()}
    assert sorted(laid.whole) == sorted(sent)


def upload(server: ServerUnderTest, size: int, frame: int = 65_536) -> tuple[int, bytes]:
    stream = server.open(REQUEST)
    body = message(bytes(size))
    for at in range(0, len(body), frame):
        server.h2.send_data(stream, body[at : at + frame], end_stream=at + frame >= len(body))
    return stream, server.h2.data_to_send()


@pytest.mark.parametrize("to_places", [False, True])
def test_nearly_all_of_a_large_body_comes_straight(to_places: bool) -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, LIMITS)
    _, data = upload(server, 4_000_000)
    receive(server, data, [200_000], to_places)
    assert laid.straight > 3_850_000


def test_in_large_frames_it_is_read_to_its_place() -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, LIMITS)
    _, data = upload(server, 4_000_000, frame=1 << 20)
    receive(server, data, [16_384])
    assert laid.read_there > 3_900_000


def test_its_window_is_returned() -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, Limits(stream_window=1 << 20))
    stream, sent = server.open(REQUEST), 0
    body = message(bytes(5_000_000))
    while sent < len(body):
        window = server.h2.local_flow_control_window(stream)
        part = body[sent : sent + min(65_536, window)]
        assert part, "the window is not returned"
        sent += len(part)
        server.h2.send_data(stream, part, end_stream=sent == len(body))
        receive(server, server.h2.data_to_send(), [65_536])
        server.pump()
    assert laid.whole == [stream]


@pytest.mark.parametrize("is_laid", [True, False])
def test_a_body_within_its_window_has_nothing_returned_and_one_that_padding_makes_larger_has(is_laid: bool) -> None:
    """A WINDOW_UPDATE costs both sides a system call; but a peer that pads must never wait for one in vain."""
    laid = Laid()
    server = ServerUnderTest(laid.accept, Limits(stream_window=1 << 20))
    if not is_laid:  # every other call is
        server.call(b"first")
    for padding in (None, 255):
        stream, sent = server.open(REQUEST), 0
        before = window = server.h2.local_flow_control_window(stream)
        body = message(bytes(before - 5 - 256))  # so that its last frame may have padding
        while sent < len(body):
            part = body[sent : sent + min(4096, window - (0 if padding is None else padding + 1))]
            assert part, "the window is not returned"
            sent += len(part)
            server.h2.send_data(stream, part, end_stream=False, pad_length=padding)
            receive(server, server.h2.data_to_send(), [65_536])
            server.pump()
            window = server.h2.local_flow_control_window(stream)
        assert padding is not None or window == 256
        server.h2.end_stream(stream)
        receive(server, server.h2.data_to_send(), [65_536])
        assert laid.bodies[stream] == body[5:]
        server.call(b"between")


def test_one_whose_laying_throws_ends_alone() -> None:
    laid = Laid(fault=300_000)
    server = ServerUnderTest(laid.accept, LIMITS)
    _, data = upload(server, 1_000_000)
    receive(server, data, [200_000])
    server.pump()
    assert [type(bug) for bug in server.bugs] == [ZeroDivisionError]
    assert not laid.whole
    laid.fault = None
    assert server.call(b"small").body == message(b"done")


@pytest.mark.parametrize("size", [-1, 1])
def test_a_body_of_another_length_than_it_says_is_refused(size: int) -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, LIMITS)
    stream = server.open([*REQUEST, ("content-length", str(1_000_005 + size))])
    body = message(bytes(1_000_000))
    for at in range(0, len(body), 65_536):
        server.h2.send_data(stream, body[at : at + 65_536], end_stream=False)
    data = server.h2.data_to_send() + b"\0\0\0\0\1" + stream.to_bytes(4, "big")
    receive(server, data, [200_000])
    assert not laid.whole


def test_a_reset_within_a_body_ends_it() -> None:
    laid = Laid()
    server = ServerUnderTest(laid.accept, LIMITS)
    stream = server.open(REQUEST)
    server.h2.send_data(stream, message(bytes(1_000_000))[:196_608][:65_536])
    server.h2.reset_stream(stream, 8)
    receive(server, server.h2.data_to_send(), [30_000])
    assert not laid.whole
    assert server.connection.streams == {}
    assert not any(isinstance(event, h2.events.ConnectionTerminated) for event in server.events)
