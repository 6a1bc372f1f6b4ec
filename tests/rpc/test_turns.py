"""No event does unbounded work in one turn of the loop, and the end of a call is told before anything else."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest
from h2_peers import REQUEST, ClientUnderTest, ServerUnderTest, message, request

from gateway.http2.frames import ACK, DATA, END_STREAM, INITIAL_WINDOW_SIZE, PING, frame, settings_frame
from gateway.http2.limits import Limits, MiB
from gateway.http2.prices import BODIES_AT_ONCE
from gateway.rpc.codes import CallFailed
from gateway.rpc.connection import TURN
from gateway.rpc.framing import Inflater
from gateway.rpc.server import ServerCall
from gateway.status import Code

MANY = 3 * TURN + 7


def slices(server: ServerUnderTest, count: Callable[[], int]) -> list[int]:
    """How much more there is after each turn, until nothing is left to do."""
    steps, before = [], count()
    while server.connection.has_work:
        server.connection.advance()
        steps.append(count() - before)
        before = count()
    return steps


def deliver(server: ServerUnderTest) -> None:
    """To the server, and no turn of its loop."""
    server.connection.receive(server.h2.data_to_send(), server.now)


class Reader:
    """Takes messages, all that come or one after another."""

    def __init__(self, eager: bool = True) -> None:
        self.got: list[bytes] = []
        self.ends = 0
        self.cancelled = 0
        self.eager = eager

    def accept(self, call: ServerCall) -> None:
        self.call = call
        call.streaming = True
        call.on_message = self._message
        call.on_request = self._end
        call.on_cancel = self._cancel

    def _message(self, body: bytes, compressed: bool) -> None:
        self.got.append(body)
        self.call.hungry = self.eager

    def _end(self, call: ServerCall) -> None:
        self.ends += 1

    def _cancel(self, code: Code) -> None:
        self.cancelled += 1


def test_empty_messages_are_handed_on_in_slices_and_all_of_them() -> None:
    reader = Reader()
    server = ServerUnderTest(reader.accept)
    stream = server.open()
    server.h2.send_data(stream, message(b"") * MANY, end_stream=True)
    deliver(server)
    assert len(reader.got) <= TURN
    assert not reader.ends
    assert max(slices(server, lambda: len(reader.got))) <= TURN
    assert reader.got == [b""] * MANY
    assert reader.ends == 1


def test_a_reader_that_is_not_hungry_gets_nothing_and_holds_bytes_only() -> None:
    reader = Reader(eager=False)
    server = ServerUnderTest(reader.accept)
    stream = server.open()
    server.h2.send_data(stream, b"".join(message(b"%d" % n) for n in range(MANY)), end_stream=True)
    server.pump()
    assert reader.got == [b"0"]
    for _ in range(MANY):
        reader.call.feed()
        server.pump()
    assert reader.got == [b"%d" % n for n in range(MANY)]
    assert reader.ends == 1


def test_nothing_is_worked_off_for_a_caller_who_has_gone() -> None:
    reader = Reader()
    server = ServerUnderTest(reader.accept)
    stream = server.open()
    server.h2.send_data(stream, message(b"") * MANY)
    deliver(server)
    before = len(reader.got)
    server.h2.reset_stream(stream)
    server.pump()
    assert reader.cancelled == 1
    assert len(reader.got) <= before + TURN
    assert not server.bugs


@pytest.mark.parametrize("way", ["reset", "connection"])
def test_the_end_of_a_call_is_told_before_its_writers_are_let_go(way: str) -> None:
    told: list[str] = []

    def accept(call: ServerCall) -> None:
        def answer(_: ServerCall) -> None:
            call.send_headers()
            call.send_message(bytes(200_000))
            call.when_writable(lambda: told.append("writable"))

        call.on_request = answer
        call.on_cancel = lambda code: told.append("cancelled")

    server = ServerUnderTest(accept)
    server.auto_window = False
    stream = server.open()
    server.h2.send_data(stream, message(b"x"), end_stream=True)
    server.pump()
    assert told == []
    if way == "reset":
        server.h2.reset_stream(stream)
        server.pump()
    else:
        server.connection.close("lost")
    assert told == ["cancelled", "writable"]


def test_the_calls_of_a_connection_that_ends_are_told_in_slices() -> None:
    told: list[Code] = []

    def accept(call: ServerCall) -> None:
        call.on_cancel = told.append

    server = ServerUnderTest(accept)
    for _ in range(MANY):
        server.open()
        server.pump()
    server.connection.close("lost")
    assert len(told) <= TURN
    assert max(slices(server, lambda: len(told))) <= TURN
    assert told == [Code.CANCELLED] * MANY


def test_the_calls_of_one_read_begin_in_slices_and_in_order() -> None:
    server = ServerUnderTest()
    streams = []
    for number in range(MANY):
        streams.append(server.open())
        server.h2.send_data(streams[-1], message(b"%d" % number), end_stream=True)
    deliver(server)
    assert len(server.calls) <= TURN
    assert max(slices(server, lambda: len(server.calls))) <= TURN
    server.pump()
    assert [server.answers[stream].body for stream in streams] == [message(b"%d" % n) for n in range(MANY)]


def test_windows_let_writers_go_in_slices() -> None:
    let_go: list[int] = []

    def accept(call: ServerCall) -> None:
        def answer(_: ServerCall) -> None:
            call.send_headers()
            call.send_message(bytes(200_000))
            call.when_writable(lambda: let_go.append(call.id))

        call.on_request = answer

    server = ServerUnderTest(accept)
    server.auto_window = False
    for _ in range(MANY):
        server.h2.send_data(server.open(), message(b"x"), end_stream=True)
        server.pump()
    assert let_go == []
    server.h2.increment_flow_control_window(200 * MiB)
    server.h2.update_settings({INITIAL_WINDOW_SIZE: MiB})
    deliver(server)
    steps = [0]
    while len(let_go) < MANY:
        before = len(let_go)
        server.connection.output()
        server.connection.advance()
        steps.append(len(let_go) - before)
    assert max(steps) <= 2 * TURN


def test_settings_that_resize_many_windows_again_and_again_are_a_flood() -> None:
    server = ServerUnderTest()
    for _ in range(500):
        server.open()
    server.pump()
    server.raw(b"".join(settings_frame({INITIAL_WINDOW_SIZE: 65_535 + n}) for n in range(30)))
    assert not server.connection.closed
    server.raw(b"".join(settings_frame({INITIAL_WINDOW_SIZE: 65_535 + n}) for n in range(60)))
    assert server.connection.closed


def test_an_upstreams_messages_come_in_slices_and_its_end_after_them() -> None:
    client = ClientUnderTest()
    call = client.start(None)
    got: list[bytes] = []
    ends: list[int] = []

    def taken(body: bytes, compressed: bool) -> None:
        got.append(body)
        call.hungry = len(got) % 100 != 0  # it stops now and then

    call.on_message = taken
    call.on_done = lambda done: ends.append(len(got))
    call.half_close()
    client.respond(call)
    client.h2.send_data(call.id, message(b"") * MANY)
    client.h2.send_headers(call.id, [("grpc-status", "0")], end_stream=True)
    while not ends:
        client.pump()
        assert len(got) % 100 == 0 or ends
        call.feed()
    assert ends == [MANY]
    assert call.code is Code.OK


def test_an_upstream_call_that_is_cancelled_ends_without_its_messages() -> None:
    client = ClientUnderTest()
    call = client.start(None)
    got: list[bytes] = []
    ended: list[Code] = []
    call.on_message = lambda body, compressed: got.append(body)
    call.on_done = lambda done: ended.append(done.code)
    call.half_close()
    client.respond(call)
    client.h2.send_data(call.id, message(b"") * MANY)
    client.finish(call, ("grpc-status", "0"))
    call.cancel()
    client.pump()
    call.feed()
    client.pump()
    assert ended == [Code.CANCELLED]
    assert got == [b""]


# Windows of many calls


def test_with_many_calls_each_may_send_less_ahead_and_with_few_again_as_much() -> None:
    held: list[ServerCall] = []
    server = ServerUnderTest(held.append, Limits(max_streams=1000))
    assert server.h2.remote_settings.initial_window_size == MiB
    streams = [server.open() for _ in range(130)]
    server.pump()
    narrow = server.h2.remote_settings.initial_window_size
    assert 1000 * narrow <= Limits().connection_window // 2
    for call in held[:-1]:
        call.finish(Code.OK)
    server.pump()
    assert server.h2.remote_settings.initial_window_size == MiB
    last = held[-1]
    last.on_request = lambda call: call.reply(call.body)
    body = bytes(3 * MiB)
    whole = message(body)
    sent = 0
    while sent < len(whole):
        room = min(server.h2.local_flow_control_window(streams[-1]), 16_384, len(whole) - sent)
        assert room > 0
        server.h2.send_data(streams[-1], whole[sent : sent + room], end_stream=sent + room == len(whole))
        sent += room
        server.pump()
    assert server.answers[streams[-1]].body == whole


def test_a_call_goes_on_when_its_window_shrinks_while_it_is_used_up() -> None:
    """It has sent more than it may now; as soon as that is taken, it may go on."""
    held: list[ServerCall] = []

    def accept(call: ServerCall) -> None:
        held.append(call)
        call.streaming = True
        call.on_message = lambda body, compressed: None

    server = ServerUnderTest(accept, Limits(max_streams=1000))
    first = server.open()
    while (room := min(server.h2.local_flow_control_window(first), 16_384)) > 0:
        server.h2.send_data(first, message(bytes(room - 5)) if room > 5 else b"\0" * room)
        server.pump()
    for _ in range(130):
        server.open()
    server.pump()
    assert server.h2.local_flow_control_window(first) < 0
    for _ in range(100):
        held[0].feed()
        server.pump()
    assert server.h2.local_flow_control_window(first) > 0


def test_a_full_connection_is_told_of() -> None:
    told: list[int] = []
    server = ServerUnderTest(lambda call: None, Limits(max_streams=3))
    server.connection.on_full = lambda: told.append(len(server.connection.streams))
    for _ in range(3):
        server.open()
        server.pump()
    assert told == [3]


# Compression


@pytest.mark.parametrize("size", [10, 60_000, 5 * MiB])
def test_a_compressed_request_is_plain_when_its_handler_gets_it(size: int) -> None:
    server = ServerUnderTest()
    fields = [*REQUEST, ("grpc-encoding", "gzip")]
    answer = server.call(fields=fields, raw=message(gzip.compress(bytes(size)), 1))
    assert answer.body == message(bytes(size))
    assert server.connection.budget.held == 0


def test_compressed_messages_of_a_stream_keep_their_place() -> None:
    reader = Reader()
    server = ServerUnderTest(reader.accept)
    stream = server.open([*request(), ("grpc-encoding", "gzip")])
    large = message(gzip.compress(bytes(3 * MiB)), 1)
    server.h2.send_data(stream, message(b"a") + large + message(gzip.compress(b"b"), 1) + message(b"c"))
    server.h2.end_stream(stream)
    server.pump()
    assert [len(body) for body in reader.got] == [1, 3 * MiB, 1, 1]
    assert reader.ends == 1


@pytest.mark.parametrize(
    "data", [gzip.compress(b"x" * 100)[:-1], b"junk", gzip.compress(b"x") + b"y"], ids=["cut", "junk", "more"]
)
def test_a_broken_compressed_message_ends_its_stream_alone(data: bytes) -> None:
    reader = Reader()
    server = ServerUnderTest(reader.accept)
    stream = server.open([*request(), ("grpc-encoding", "gzip")])
    server.h2.send_data(stream, message(data, 1))
    server.pump()
    assert server.answers[stream].status == str(Code.INTERNAL.value)
    assert reader.cancelled == 1
    assert not server.connection.closed


@pytest.mark.parametrize("end", ["answer", "cancel", "too large"])
def test_an_upstreams_answer_that_is_inflated_elsewhere_is_told_and_paid_back(end: str) -> None:
    """Its stream has ended long before."""
    client = ClientUnderTest(Limits(message_bytes=2 * MiB))
    steps: list[tuple[Inflater, Callable[[CallFailed | None], None]]] = []
    client.connection.elsewhere = lambda inflater, stepped: steps.append((inflater, stepped))
    call = client.start()
    ended: list[tuple[Code, int]] = []
    call.on_done = lambda done: ended.append((done.code, len(done.body)))
    client.respond(call, ("grpc-encoding", "gzip"))
    size = 3 * MiB if end == "too large" else MiB
    client.h2.send_data(call.id, message(gzip.compress(bytes(size)), 1))
    client.finish(call, ("grpc-status", "0"))
    assert ended == []
    assert not client.connection.streams
    if end == "cancel":
        call.cancel()
    while steps:
        inflater, stepped = steps.pop()
        try:
            inflater.step(MiB)
        except CallFailed as failure:
            stepped(failure)
        else:
            stepped(None)
    client.pump()
    want = {"answer": (Code.OK, MiB), "cancel": (Code.CANCELLED, 0), "too large": (Code.RESOURCE_EXHAUSTED, 0)}
    assert ended == [want[end]]
    assert client.connection.budget.held == 0


@pytest.mark.parametrize("late", [False, True], ids=["on a call that runs", "on a call that is over"])
def test_a_read_full_of_small_frames_is_taken_in_slices_and_all_of_it(late: bool) -> None:
    def accept(call: ServerCall) -> None:
        call.on_request = lambda done: done.reply(done.body)
        if late:
            call.finish(Code.UNIMPLEMENTED)

    server = ServerUnderTest(accept, Limits(tiny=(1_000_000, 0)))
    stream = server.open()
    server.pump()
    size = 20 * BODIES_AT_ONCE
    server.connection.receive(frame(DATA, 0, stream, message(bytes(size))[:5]), server.now)
    server.connection.receive(frame(DATA, 0, stream, b"\0") * size + frame(PING, 0, 0, bytes(8)), server.now)
    assert server.connection.is_late
    turns = 0
    while server.connection.has_work:
        before = server.connection.engine._units
        server.connection.advance()
        assert server.connection.engine._units - before <= BODIES_AT_ONCE
        turns += 1
    assert turns >= size // BODIES_AT_ONCE - 1
    assert frame(PING, ACK, 0, bytes(8)) in server.connection.output()
    if not late:
        server.connection.receive(frame(DATA, END_STREAM, stream), server.now)
        server.pump()
        assert server.answers[stream].body == message(bytes(size))


def test_what_was_not_read_of_a_connection_that_ends_is_forgotten() -> None:
    server = ServerUnderTest(Reader().accept)
    stream = server.open()
    server.pump()
    server.connection.receive(frame(DATA, 0, stream, b"\0") * (10 * BODIES_AT_ONCE), server.now)
    server.connection.close("lost")
    while server.connection.has_work:
        server.connection.advance()
    assert not server.connection.is_late
