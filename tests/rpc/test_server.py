"""The server's end, with h2 as the client: what is served, what is refused, and that neighbours never notice."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import h2.events
import pytest
from h2_peers import Pair, ServerUnderTest, message, request
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http2.engine import client_engine
from gateway.http2.frames import ConnectionClosed, Event, GoAwayReceived, TrailersReceived
from gateway.http2.limits import KiB, Limits, MiB
from gateway.rpc.codes import CallFailed
from gateway.rpc.metadata import fields_from
from gateway.rpc.server import ServerCall
from gateway.status import Code

# Good calls


def test_a_unary_call_is_answered_with_head_message_and_trailers() -> None:
    server = ServerUnderTest()
    answer = server.call(b"hello")
    assert answer.heads[0] == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
    }
    assert answer.body == message(b"hello")
    assert answer.trailers == {"grpc-status": "0"}
    assert answer.ended
    assert server.connection.streams == {}


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 16_384, 1 * MiB, 5 * MiB])
def test_messages_of_every_size_come_back(size: int) -> None:
    body = bytes(i % 253 for i in range(size))
    server = ServerUnderTest()
    stream = server.open()
    left = message(body)
    while left:
        room = min(server.h2.local_flow_control_window(stream), server.h2.max_outbound_frame_size, len(left))
        server.h2.send_data(stream, left[:room])
        left = left[room:]
        server.pump()
    server.h2.end_stream(stream)
    server.pump()
    assert server.answers[stream].body == message(body)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 9, 10])
def test_bytes_may_be_cut_anywhere(chunk: int) -> None:
    server = ServerUnderTest()
    for number in range(3):
        stream = server.open(request(("x-n", str(number))))
        server.h2.send_data(stream, message(b"hello %d" % number), end_stream=True)
        server.pump(chunk)
        assert server.answers[stream].body == message(b"hello %d" % number)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_message_borders_have_nothing_to_do_with_data_borders(bodies: list[bytes], data: st.DataObject) -> None:
    got: list[bytes] = []

    def accept(call: ServerCall) -> None:
        call.streaming = True
        call.on_message = lambda body, _: (got.append(body), call.feed())[0]
        call.on_request = lambda done: done.finish(Code.OK)

    server = ServerUnderTest(accept)
    stream = server.open()
    rest = b"".join(map(message, bodies))
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        server.h2.send_data(stream, rest[:cut])
        rest = rest[cut:]
        if data.draw(st.booleans()):
            server.pump()
    server.h2.end_stream(stream)
    server.pump()
    assert got == bodies
    assert server.answers[stream].status == "0"


def test_metadata_reaches_the_call_and_reserved_fields_do_not() -> None:
    server = ServerUnderTest()
    server.call(fields=request(("x-a", "1"), ("x-b-bin", "AAE"), ("grpc-encoding", "gzip"), ("user-agent", "me")))
    (call,) = server.calls
    assert [tuple(field) for field in call.head.fields] == [
        (b"x-a", b"1"),
        (b"x-b-bin", b"AAE"),
        (b"user-agent", b"me"),
    ]
    assert (call.head.path, call.encoding) == (b"/test.Service/Echo", b"gzip")


def test_metadata_of_the_answer_reaches_the_client() -> None:
    def accept(call: ServerCall) -> None:
        initial, trailing = fields_from([("i", "1")]), fields_from([("t-bin", b"\0\1")])
        call.on_request = lambda done: done.reply(b"", initial, trailing)

    answer = ServerUnderTest(accept).call()
    assert answer.heads[0]["i"] == "1"
    assert base64.b64decode(answer.trailers["t-bin"] + "=") == b"\0\1"


def test_a_failure_is_trailers_only_with_its_text_percent_encoded() -> None:
    def accept(call: ServerCall) -> None:
        call.on_request = lambda done: done.finish(Code.NOT_FOUND, "100 % näh\n")

    answer = ServerUnderTest(accept).call()
    assert len(answer.heads) == 1
    assert answer.heads[0][":status"] == "200"
    assert answer.status == "5"
    assert answer.text == "100 %25 n%C3%A4h%0A"
    assert answer.ended


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc;charset=x"])
def test_every_grpc_content_type_is_served(content_type: str) -> None:
    fields = [(k, content_type if k == "content-type" else v) for k, v in request()]
    assert ServerUnderTest().call(fields=fields).status == "0"


@pytest.mark.parametrize(
    "fields",
    [
        request(("host", "test:1"), without=[":authority"]),
        request(("host", "Test:1")),
        request(("host", "test:1"), authority=""),
        request(without=[":authority"]),
    ],
    ids=["host alone, as nginx may send it", "both", "an empty authority", "neither"],
)
def test_host_says_what_authority_says(fields: list[Pair]) -> None:
    assert ServerUnderTest().call(fields=fields).status == "0"


def test_an_answer_before_the_end_of_the_request_stops_the_client_with_no_error() -> None:
    server = ServerUnderTest(lambda call: call.finish(Code.UNAUTHENTICATED, "who?"))
    stream = server.open()
    server.pump()
    answer = server.answers[stream]
    assert (answer.status, answer.reset) == ("16", 0)
    assert server.connection.streams == {}


# Bad input: the exact answer, and the neighbours live on (every case runs beside an honest call)

BAD_REQUESTS = [
    ("no content-type", request(without=["content-type"]), b"x", "http 415"),
    ("json", [(k, "application/json" if k == "content-type" else v) for k, v in request()], b"x", "http 415"),
    ("grpcfoo", [(k, "application/grpcfoo" if k == "content-type" else v) for k, v in request()], b"x", "http 415"),
    ("get", request(method="GET"), b"x", "http 405"),
    ("put", request(method="PUT"), b"x", "http 405"),
    ("other host", request(("host", "else:1")), b"x", "http 400"),
    ("two hosts", request(("host", "a"), ("host", "b"), without=[":authority"]), b"x", "http 400"),
    ("the same host twice", request(("host", "test:1"), ("host", "test:1")), b"x", "http 400"),
    ("no host's name", request(("host", "a/b c"), without=[":authority"]), b"x", "http 400"),
    ("timeout -1S", request(("grpc-timeout", "-1S")), b"x", Code.INTERNAL),
    ("timeout 10", request(("grpc-timeout", "10")), b"x", Code.INTERNAL),
    ("timeout abc", request(("grpc-timeout", "abc")), b"x", Code.INTERNAL),
    ("timeout empty", request(("grpc-timeout", "")), b"x", Code.INTERNAL),
    ("timeout 9 digits", request(("grpc-timeout", "123456789S")), b"x", Code.INTERNAL),
    ("timeout 0n", request(("grpc-timeout", "0n")), b"x", Code.DEADLINE_EXCEEDED),
    ("bad bin", request(("x-bin", "!!!")), b"x", Code.INTERNAL),
    ("odd key", request(("x!y", "v")), b"x", Code.INTERNAL),
    ("key with space", request(("x y", "v")), b"x", "reset 1"),
    ("upper-case key", request(("X-Key", "v")), b"x", "reset 1"),
    ("crlf in value", request(("x", "a\r\nb: c")), b"x", "reset 1"),
    ("nul in value", request(("x", "a\0b")), b"x", "reset 1"),
    ("connection", request(("connection", "close")), b"x", "reset 1"),
    ("te gzip", request(("te", "gzip"), without=["te"]), b"x", "reset 1"),
    ("two paths", [*request()[:1], (":path", "/a"), *request()[1:]], b"x", "reset 1"),
    ("no path", request(without=[":path"]), b"x", "reset 1"),
    ("late pseudo", request((":path", "/a"), without=[":path"]), b"x", "reset 1"),
    ("headers over limit", request(("x", "v" * 16 * KiB)), b"x", Code.RESOURCE_EXHAUSTED),
    ("too many fields", request(*[("x", "v")] * 101), b"x", Code.RESOURCE_EXHAUSTED),
]

BAD_BODIES = [
    ("nothing", b"", Code.INTERNAL),
    ("half a prefix", b"\0\0\0", Code.INTERNAL),
    ("half a message", message(b"hello")[:-1], Code.INTERNAL),
    ("two messages", message(b"a") + message(b"b"), Code.UNIMPLEMENTED),
    ("trailing byte", message(b"a") + b"x", Code.UNIMPLEMENTED),
    ("flag 2", message(b"a", flag=2), Code.INTERNAL),
    ("flag 255", message(b"a", flag=255), Code.INTERNAL),
    ("5 MiB declared", b"\0" + (5 * MiB).to_bytes(4, "big") + b"x", Code.RESOURCE_EXHAUSTED),
    ("4 GiB declared", b"\0\xff\xff\xff\xff", Code.RESOURCE_EXHAUSTED),
]


def honest_calls_work(server: ServerUnderTest, count: int = 1) -> bool:
    return all(server.call(b"%d" % i, request(("x-n", str(i)))).body == message(b"%d" % i) for i in range(count))


@pytest.mark.parametrize(
    ("fields", "body", "expected"), [case[1:] for case in BAD_REQUESTS], ids=[c[0] for c in BAD_REQUESTS]
)
def test_a_bad_request_gets_its_exact_answer_and_harms_nobody(
    fields: Sequence[Pair], body: bytes, expected: Code | str
) -> None:
    reached: list[ServerCall] = []

    def accept(call: ServerCall) -> None:
        reached.append(call)
        call.on_request = lambda done: done.reply(done.body)

    server = ServerUnderTest(accept)
    assert honest_calls_work(server)
    neighbour = server.open()
    reached.clear()
    for _ in range(20):
        answer = server.call(body, fields)
        if isinstance(expected, Code):
            assert (answer.status, answer.ended) == (str(int(expected)), True)
        elif expected.startswith("http"):
            assert answer.heads == [{":status": expected[5:]}]
        else:
            assert answer.reset == int(expected[6:])
    assert len(reached) <= 1  # the neighbour
    server.h2.send_data(neighbour, message(b"n"), end_stream=True)
    server.pump()
    assert server.answers[neighbour].body == message(b"n")
    assert honest_calls_work(server, 100)
    assert not server.bugs


@pytest.mark.parametrize(("body", "code"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES])
@pytest.mark.parametrize("whole", [True, False], ids=["at once", "byte by byte"])
def test_a_bad_message_gets_its_exact_answer_and_harms_nobody(body: bytes, code: Code, whole: bool) -> None:
    served: list[ServerCall] = []

    def accept(call: ServerCall) -> None:
        call.on_request = lambda done: (served.append(done), done.reply(done.body))[1]

    server = ServerUnderTest(accept, Limits(message_bytes=4 * MiB))
    for _ in range(20):
        stream = server.open()
        for piece in [body] if whole else [body[i : i + 1] for i in range(len(body))]:
            if server.answers[stream].reset is None:
                server.h2.send_data(stream, piece)
                server.pump()
        if server.answers[stream].reset is None:
            server.h2.end_stream(stream)
            server.pump()
        assert server.answers[stream].status == str(int(code))
    assert served == []
    assert honest_calls_work(server, 100)


def test_an_oversized_message_is_refused_before_any_of_it_is_kept() -> None:
    server = ServerUnderTest(limits=Limits(message_bytes=1000))
    stream = server.open()
    server.h2.send_data(stream, b"\0" + (1001).to_bytes(4, "big"))
    server.pump()
    answer = server.answers[stream]
    assert answer.status == "8"
    assert answer.text == "Message of 1001 bytes is larger than the limit of 1000 bytes (max_message_bytes)"
    assert answer.reset == 0


@pytest.mark.parametrize(("length", "status"), [(999, "0"), (1000, "0"), (1001, "8")])
def test_the_message_limit_is_exact(length: int, status: str) -> None:
    assert ServerUnderTest(limits=Limits(message_bytes=1000)).call(bytes(length)).status == status


def test_a_handler_that_raises_fails_its_own_call_only() -> None:
    def accept(call: ServerCall) -> None:
        def handle(done: ServerCall) -> None:
            if done.body == b"boom":
                raise RuntimeError("secret")
            if done.body == b"no":
                raise CallFailed(Code.ABORTED, "no")
            done.reply(done.body)

        call.on_request = handle

    server = ServerUnderTest(accept)
    neighbour = server.open()
    answer = server.call(b"boom")
    assert (answer.status, answer.text) == ("13", "Internal error")
    assert [str(bug) for bug in server.bugs] == ["secret"]
    assert server.call(b"no").status == "10"
    server.h2.send_data(neighbour, message(b"n"), end_stream=True)
    server.pump()
    assert server.answers[neighbour].status == "0"


# Deadlines, cancellation, waiting


def test_a_deadline_ends_the_call_for_both_sides() -> None:
    ends: list[Code] = []

    def accept(call: ServerCall) -> None:
        call.on_cancel = ends.append

    server = ServerUnderTest(accept)
    stream = server.open(request(("grpc-timeout", "3S")))
    server.h2.send_data(stream, message(b"x"), end_stream=True)
    server.pump()
    assert server.calls[0].deadline == pytest.approx(1003.0)
    server.tick(2)
    assert ends == []
    server.tick(2)
    assert ends == [Code.DEADLINE_EXCEEDED]
    assert server.answers[stream].status == "4"
    assert len(server.deadlines) == 0


def test_a_deadline_is_forgotten_once_the_call_is_answered() -> None:
    server = ServerUnderTest()
    server.call(fields=request(("grpc-timeout", "3S")))
    assert len(server.deadlines) == 0


@pytest.mark.parametrize("how", ["reset", "lost"])
def test_a_client_that_goes_away_cancels_its_calls_once(how: str) -> None:
    ends: list[Code] = []

    def accept(call: ServerCall) -> None:
        call.on_cancel = ends.append

    server = ServerUnderTest(accept)
    stream = server.open(request(("grpc-timeout", "3S")))
    server.h2.send_data(stream, message(b"x"), end_stream=True)
    server.pump()
    if how == "reset":
        server.h2.reset_stream(stream, 8)
        server.pump()
    else:
        server.connection.close("lost")
    assert ends == [Code.CANCELLED]
    call = server.calls[0]
    assert call.done
    call.reply(b"too late")
    call.finish(Code.OK)
    server.pump()
    server.tick(10)
    assert ends == [Code.CANCELLED]
    assert server.connection.streams == {}
    assert len(server.deadlines) == 0


def test_window_is_held_while_nobody_takes_a_streamed_message() -> None:
    def accept(call: ServerCall) -> None:
        call.streaming = True
        call.on_message = lambda body, compressed: None

    server = ServerUnderTest(accept, Limits(stream_window=65_535))
    stream = server.open()
    server.h2.send_data(stream, message(b"first"))
    server.pump()
    before = server.h2.local_flow_control_window(stream)
    while (room := server.h2.local_flow_control_window(stream)) > 0:
        server.h2.send_data(stream, message(bytes(min(room, 16_384) - 5)) if room > 5 else b"\0" * room)
        server.pump()
    server.tick(20)
    assert server.h2.local_flow_control_window(stream) == 0
    for _ in range(10):  # a message each
        server.calls[0].feed()
        server.pump()
    assert server.h2.local_flow_control_window(stream) >= before // 2  # what is told at once


def test_calls_that_wait_do_not_hold_up_another_on_their_connection() -> None:
    def accept(call: ServerCall) -> None:
        call.cut_through = True
        call.on_request = lambda done: setattr(done, "on_chunk", lambda data: None) if done.missing else done.reply(b"")

    server = ServerUnderTest(accept)
    for _ in range(server.connection.limits.max_streams - 1):
        stream = server.open()
        server.h2.send_data(stream, b"\0" + (16 * MiB).to_bytes(4, "big"))
        while room := min(server.h2.local_flow_control_window(stream), 16_384):
            server.h2.send_data(stream, bytes(room))
            server.pump()
    assert server.call(bytes(10_000)).status == "0"


def test_cut_through_hands_over_the_front_and_holds_the_window_for_the_rest() -> None:
    fronts: list[tuple[int, int]] = []
    rest: list[bytes] = []

    def handle(call: ServerCall) -> None:
        if call.missing:
            fronts.append((len(call.body), call.missing))
            call.on_chunk = rest.append
        else:
            call.finish(Code.OK)

    def accept(call: ServerCall) -> None:
        call.cut_through = True
        call.on_request = handle

    server = ServerUnderTest(accept, Limits(stream_window=65_535))
    stream = server.open()
    body = bytes(i % 251 for i in range(200_000))
    left = message(body)
    server.h2.send_data(stream, left[:16_384])
    left = left[16_384:]
    server.pump()
    assert fronts == [(16_384 - 5, 200_000 - 16_384 + 5)]
    while (room := min(server.h2.local_flow_control_window(stream), 16_384)) > 0:
        server.h2.send_data(stream, left[:room])
        left = left[room:]
        server.pump()
    assert left  # the window is closed until the other side takes the bytes
    taken = 0
    while left:
        server.calls[0].consume(sum(map(len, rest)) - taken)
        taken = sum(map(len, rest))
        server.pump()
        while left and (room := min(server.h2.local_flow_control_window(stream), 16_384)) > 0:
            server.h2.send_data(stream, left[:room])
            left = left[room:]
            server.pump()
    server.h2.end_stream(stream)
    server.pump()
    assert body[: fronts[0][0]] + b"".join(rest) == body
    assert server.answers[stream].status == "0"


def test_who_does_not_take_a_front_gets_the_whole_and_is_seldom_asked() -> None:
    shown: list[tuple[int, int]] = []

    def handle(call: ServerCall) -> None:
        shown.append((len(call.body), call.missing))
        if call.missing == 0:
            call.reply(call.body[-5:])

    def accept(call: ServerCall) -> None:
        call.cut_through = True
        call.on_request = handle

    server = ServerUnderTest(accept)
    stream = server.open()
    body = bytes(4 * MiB) + b"hello"
    left = message(body)
    while left:
        room = min(server.h2.local_flow_control_window(stream), 16_384, len(left))
        server.h2.send_data(stream, left[:room])
        left = left[room:]
        server.pump()
    server.h2.end_stream(stream)
    server.pump()
    assert server.answers[stream].body == message(b"hello")
    assert shown[-1] == (len(body), 0)
    assert len(shown) < 12


def test_small_messages_are_never_cut_through() -> None:
    seen: list[int] = []

    def accept(call: ServerCall) -> None:
        call.cut_through = True
        call.on_request = lambda done: (seen.append(done.missing), done.reply(b""))[1]

    server = ServerUnderTest(accept)
    stream = server.open()
    body = message(bytes(60_000))
    for at in range(0, len(body), 16_000):
        server.h2.send_data(stream, body[at : at + 16_000])
        server.pump()
    server.h2.end_stream(stream)
    server.pump()
    assert seen == [0]


def test_a_slow_reader_makes_its_producer_wait() -> None:
    told: list[str] = []
    server = ServerUnderTest(lambda call: call.send_headers())
    server.auto_window = False
    server.h2.update_settings({4: 1000})  # INITIAL_WINDOW_SIZE
    stream = server.open()
    server.pump()
    call = server.calls[0]
    call.send_message(bytes(100_000))
    server.pump()
    assert call.unsent == 100_005 - 1000
    call.when_writable(lambda: told.append("room"))
    server.pump()
    assert told == []
    server.h2.increment_flow_control_window(50_000, stream)
    server.pump()
    assert told == ["room"]
    assert call.unsent <= server.connection.limits.unsent_bytes


# Leaving


class Leaving:
    """A server connection with the engine itself as its client: h2 can't go on after a GOAWAY."""

    def __init__(self) -> None:
        self.server = ServerUnderTest(lambda call: None, greet=False)
        self.client = client_engine(Limits())
        self.events: list[Event] = []
        self.pump()

    def pump(self) -> None:
        while True:
            up, down = self.client.data_to_send(), self.server.read()
            if up:
                self.server.connection.receive(up, self.server.now)
            if down and not self.left:
                self.client.receive_data(down)
            self.events += self.client.events()
            if not up and not down:
                return

    @property
    def left(self) -> bool:
        return any(isinstance(event, ConnectionClosed) for event in self.events)

    def call(self) -> int:
        fields = [(str(name).encode(), str(value).encode()) for name, value in request()]
        stream = self.client.send_request(fields)
        self.client.send_data(stream, message(b"x"), end_stream=True)
        self.pump()
        return stream


def test_draining_is_two_goaways_and_lets_calls_end() -> None:
    peers = Leaving()
    stream = peers.call()
    peers.server.connection.drain()
    peers.pump()
    goaways = [event.last_stream_id for event in peers.events if isinstance(event, GoAwayReceived)]
    assert goaways == [2**31 - 1, stream]
    assert not peers.server.connection.closed
    peers.server.calls[0].reply(b"done")
    peers.pump()
    assert any(isinstance(event, TrailersReceived) for event in peers.events)
    assert peers.server.connection.closed


def test_a_client_without_calls_leaves_at_once_when_asked_to() -> None:
    peers = Leaving()
    peers.server.connection.drain()
    peers.pump()
    assert peers.left


def test_a_connection_that_does_not_answer_the_drain_is_closed_all_the_same() -> None:
    server = ServerUnderTest()
    server.connection.drain()
    server.read()
    server.tick(3)
    assert server.connection.closed


@pytest.mark.parametrize(("limits", "seconds"), [(Limits(idle_seconds=50), 50), (Limits(), 3600)])
def test_a_connection_without_calls_is_asked_to_leave_after_its_idle_time(limits: Limits, seconds: float) -> None:
    server = ServerUnderTest(limits=limits)
    server.tick(seconds - 1)
    assert not server.connection.draining
    server.tick(5)
    assert server.connection.closed
    assert server.connection.reason == "idle"


def test_calls_that_outlast_the_grace_of_a_drain_are_cut() -> None:
    ends: list[Code] = []

    def accept(call: ServerCall) -> None:
        call.on_cancel = ends.append

    server = ServerUnderTest(accept)
    server.open(end=True)
    server.open()
    server.pump()
    server.connection.drain(5.0)
    server.tick(4)
    assert not server.connection.closed
    server.tick(2)
    assert server.connection.closed
    assert ends == [Code.CANCELLED, Code.CANCELLED][: len(ends)]
    assert server.connection.streams == {}


def test_a_peer_that_ignores_the_stream_limit_loses_its_connection() -> None:
    server = ServerUnderTest(lambda call: None, Limits(max_streams=3))
    for _ in range(3):
        server.open()
    server.pump()
    server.h2.remote_settings[3] = 100
    server.h2.remote_settings.acknowledge()
    server.open()
    server.pump()
    assert len(server.calls) == 3
    assert server.connection.closed


def test_work_that_outlives_its_call_keeps_its_place() -> None:
    server = ServerUnderTest(lambda call: None, Limits(max_streams=1))
    server.connection.hold()
    refused = server.open()
    server.pump()
    assert server.answers[refused].reset == 7
    server.connection.release()
    server.open()
    server.pump()
    assert len(server.calls) == 1


def test_a_large_answer_does_not_hold_up_a_small_one() -> None:
    server = ServerUnderTest(lambda call: None)
    server.h2.update_settings({4: 8 * MiB})
    server.h2.increment_flow_control_window(8 * MiB)
    large, small = server.open(end=False), server.open(end=False)
    for stream in (large, small):
        server.h2.send_data(stream, message(b"x"), end_stream=True)
    server.pump()
    server.calls[0].reply(bytes(2 * MiB))
    server.calls[1].reply(b"small")
    order = []
    while piece := server.connection.output():
        order += [e.stream_id for e in server.h2.receive_data(piece) if isinstance(e, h2.events.StreamEnded)]
    assert order == [small, large]


def test_error_texts_enter_no_table() -> None:
    """Behind a proxy several callers share a connection: one's errors must not fill what serves the others."""
    texts = iter(f"no such city: {number}" for number in range(100))
    server = ServerUnderTest(lambda call: call.finish(Code.NOT_FOUND, next(texts)))
    server.call()
    entries = len(server.h2.decoder.header_table.dynamic_entries)
    answers = [server.call() for _ in range(50)]
    assert answers[-1].text == "no such city: 50"
    assert len(server.h2.decoder.header_table.dynamic_entries) == entries
