"""The client's end, with h2 as the server: how calls end, and gRPC's own cases of servers that misbehave."""

from __future__ import annotations

from collections.abc import Callable

import h2.events
import hpack
import pytest
from h2_peers import ClientUnderTest, message

from gateway.http2.frames import frame
from gateway.http2.limits import UPSTREAM, Limits, MiB
from gateway.rpc.client import DISCARD_SECONDS, ClientCall
from gateway.rpc.metadata import fields_from
from gateway.status import Code, Meaning, Origin, classify

OK = ("grpc-status", "0")
LARGE, SMALL = b"h" * 4097, b"hello"


def requests(client: ClientUnderTest) -> list[h2.events.RequestReceived]:
    return [event for event in client.events if isinstance(event, h2.events.RequestReceived)]


def test_a_unary_call_ends_once_with_its_answer() -> None:
    client, ends = ClientUnderTest(), list[ClientCall]()
    call = client.start(b"hello")
    call.on_done = ends.append
    client.respond(call, ("i", "1"))
    client.h2.send_data(call.id, message(b"world"))
    client.finish(call, OK, ("t", "2"))
    assert ends == [call]
    assert (call.code, call.body, call.from_server) == (Code.OK, b"world", True)
    assert call.initial == ((b"i", b"1"),)  # nothing of the protocol's own
    assert (b"t", b"2") in call.trailing
    assert not call.is_just_ok
    assert client.connection.streams == {}


def test_nothing_but_ok_is_told() -> None:
    client = ClientUnderTest()
    call = client.start(b"hello")
    client.respond(call)
    client.h2.send_data(call.id, message(b"world"))
    client.finish(call, OK)
    assert (call.code, call.initial, call.is_just_ok) == (Code.OK, (), True)


def test_the_request_is_what_grpc_says() -> None:
    client = ClientUnderTest()
    client.start(b"hello", fields_from([("x-key", "v")]), deadline=client.now + 1.5)
    (event,) = requests(client)
    assert [(name.decode(), value.decode()) for name, value in event.headers] == [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "test:1"),
        (":path", "/test.Service/Echo"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "inference-gateway"),
        ("grpc-accept-encoding", "identity,deflate,gzip"),
        ("grpc-timeout", "1500000u"),
        ("x-key", "v"),
    ]
    data = b"".join(event.data for event in client.events if isinstance(event, h2.events.DataReceived))
    assert data == message(b"hello")
    assert any(isinstance(event, h2.events.StreamEnded) for event in client.events)


def test_no_field_that_a_caller_chose_enters_the_shared_table() -> None:
    client = ClientUnderTest()
    client.start()
    size = len(client.h2.decoder.header_table.dynamic_entries)
    for number in range(50):
        client.start(b"", fields_from([(f"x-{number}", "v" * number)]), deadline=client.now + number + 1)
    assert len(client.h2.decoder.header_table.dynamic_entries) == size
    last = requests(client)[-1].headers
    chosen = [field for field in last if field[0] in (b"grpc-timeout", b"x-49")]
    assert len(chosen) == 2
    assert all(isinstance(field, hpack.NeverIndexedHeaderTuple) for field in chosen)


@pytest.mark.parametrize(
    ("status", "fields", "code", "text"),
    [
        ("200", [("grpc-status", "5"), ("grpc-message", "no%20such")], Code.NOT_FOUND, "no such"),
        ("200", [("grpc-status", "99")], Code.UNKNOWN, ""),
        ("200", [("grpc-status", "x")], Code.UNKNOWN, ""),
        ("200", [("grpc-status", "0")], Code.INTERNAL, "The server ended the call without a whole message"),
        ("200", [], Code.UNKNOWN, "The server ended the call without a status"),
        ("503", [], Code.UNAVAILABLE, "The server answered with HTTP status 503"),
        ("404", [], Code.UNIMPLEMENTED, "The server answered with HTTP status 404"),
        ("404", [("grpc-status", "3")], Code.INVALID_ARGUMENT, ""),
    ],
)
def test_trailers_only_answers(status: str, fields: list[tuple[str, str]], code: Code, text: str) -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call, *fields, status=status, end=True)
    client.pump()
    assert (call.done, call.code, call.text) == (True, code, text)


def test_an_error_page_is_not_taken_for_messages() -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call, status="502")
    client.h2.send_data(call.id, b"<html>Bad Gateway</html>" * 500, end_stream=True)
    client.pump()
    assert (call.code, call.text) == (Code.UNAVAILABLE, "The server answered with HTTP status 502")


@pytest.mark.parametrize(
    ("status", "code"), [("503", Code.UNAVAILABLE), ("404", Code.UNIMPLEMENTED), ("200", Code.UNKNOWN)]
)
def test_a_page_of_another_kind_keeps_the_meaning_of_its_status(status: str, code: Code) -> None:
    client = ClientUnderTest()
    call = client.start()
    client.h2.send_headers(call.id, [(":status", status), ("content-type", "text/html")])
    client.h2.send_data(call.id, b"<html>" * 100, end_stream=True)
    client.pump()
    assert call.code is code
    assert status in call.text


@pytest.mark.parametrize(
    ("error", "code"), [(7, Code.UNAVAILABLE), (8, Code.CANCELLED), (2, Code.INTERNAL), (11, Code.RESOURCE_EXHAUSTED)]
)
def test_resets_become_statuses(error: int, code: Code) -> None:
    client = ClientUnderTest()
    call = client.start()
    client.h2.reset_stream(call.id, error)
    client.pump()
    assert (call.code, call.from_server, call.unprocessed) == (code, False, error == 7)


def _headers(call: ClientCall, *fields: tuple[bytes, bytes], flags: int = 4) -> bytes:
    return frame(1, flags, call.id, hpack.Encoder().encode(fields))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda call: _headers(call, (b":status", b"20")), "a response has a :status of three digits"),
        (lambda call: _headers(call, (b":status", b"200"), (b"X", b"y")), "characters that are not allowed"),
        (
            lambda call: (
                _headers(call, (b":status", b"200"), (b"content-length", b"9"), flags=4) + frame(0, 1, call.id, b"")
            ),
            "content-length",
        ),
        (lambda call: frame(8, 0, call.id, bytes(4)), "WINDOW_UPDATE of 0 bytes"),
        (lambda call: frame(0, 0, call.id, b"early"), "DATA"),
    ],
    ids=["status", "name", "length", "window", "order"],
)
def test_a_call_whose_server_breaks_a_rule_of_http2_tells_which(
    answer: Callable[[ClientCall], bytes], fault: str
) -> None:
    client = ClientUnderTest()
    call = client.start()
    client.connection.receive(answer(call), client.now)
    assert (call.done, call.origin) == (True, Origin.ANSWER)
    assert call.text.startswith("The server broke the rules of HTTP/2 (")
    assert fault in call.text


def test_a_stream_that_the_client_resets_is_not_called_the_servers_fault() -> None:
    client = ClientUnderTest()
    call = client.start()
    call.reset()
    client.pump()
    assert (call.done, call.text) == (True, "Stream was reset by the client with HTTP/2 error 8")


def test_a_status_that_came_before_a_reset_counts() -> None:
    client = ClientUnderTest()
    call = client.start(None)
    call.send_chunk(b"\0\0\0\1\0")
    client.pump()
    client.respond(call, ("grpc-status", "8"), ("grpc-message", "full"), end=True)
    client.h2.reset_stream(call.id, 0)
    client.pump()
    assert (call.code, call.text) == (Code.RESOURCE_EXHAUSTED, "full")


def test_a_connection_that_is_lost_ends_its_calls() -> None:
    client = ClientUnderTest()
    calls = [client.start() for _ in range(3)]
    client.connection.close("cable cut")
    assert {(call.code, call.text) for call in calls} == {(Code.UNAVAILABLE, "Connection lost: cable cut")}
    assert not client.connection.has_room


@pytest.mark.parametrize(
    "body", [b"\2" + bytes(4), b"\0\xff\xff\xff\xff", message(b"a") + b"x"], ids=["flag", "huge", "two"]
)
def test_an_answer_that_is_no_message_fails_the_call_and_tells_the_server(body: bytes) -> None:
    client = ClientUnderTest(Limits(message_bytes=1000))
    call, other = client.start(), client.start()
    client.respond(call)
    client.h2.send_data(call.id, body)
    client.pump()
    assert call.code in (Code.INTERNAL, Code.RESOURCE_EXHAUSTED, Code.UNIMPLEMENTED)
    assert any(isinstance(event, h2.events.StreamReset) and event.stream_id == call.id for event in client.events)
    client.respond(other)
    client.h2.send_data(other.id, message(b"fine"))
    client.finish(other, OK)
    assert other.body == b"fine"


@pytest.mark.parametrize("when", ["before", "after head", "after message"])
def test_cancelling_resets_the_stream_and_ends_the_call_once(when: str) -> None:
    client, ends = ClientUnderTest(), list[ClientCall]()
    call = client.start()
    call.on_done = ends.append
    if when != "before":
        client.respond(call)
    if when == "after message":
        client.h2.send_data(call.id, message(b"late"))
    client.pump()
    call.cancel()
    call.cancel()
    client.pump()
    assert ends == [call]
    assert call.code is Code.CANCELLED
    assert any(isinstance(event, h2.events.StreamReset) and event.error_code == 8 for event in client.events)
    assert client.connection.streams == {}


def test_a_deadline_ends_the_call_here_even_if_the_server_is_silent() -> None:
    client = ClientUnderTest()
    call = client.start(deadline=client.now + 1)
    client.deadlines.expire(client.now + 2)
    client.pump()
    assert (call.code, call.text) == (Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert len(client.deadlines) == 0


def test_a_silent_server_with_calls_is_pinged_and_then_given_up() -> None:
    client = ClientUnderTest(Limits(keepalive_seconds=5, keepalive_timeout=2))
    call = client.start()
    for second in range(1, 7):
        client.connection.tick(client.now + second)
    while client.connection.output():
        pass  # the server never sees the PING
    assert not call.done
    for second in range(7, 10):
        client.connection.tick(client.now + second)
    assert (call.code, call.text) == (Code.UNAVAILABLE, "Connection lost: no answer to a keepalive PING")


def test_one_tick_after_a_long_turn_of_the_loop_gives_nobody_up() -> None:
    """The answer to the PING may be there, and not be read yet."""
    client = ClientUnderTest(Limits(keepalive_seconds=5, keepalive_timeout=2))
    call = client.start()
    client.connection.tick(client.now + 6)
    client.connection.tick(client.now + 60)
    assert not call.done
    client.pump()
    client.connection.tick(client.now + 61)
    assert not call.done


def test_a_server_that_only_answers_pings_is_not_pinged_again_for_long() -> None:
    """C-core's servers take three PINGs within five minutes without data for an attack."""
    client = ClientUnderTest(UPSTREAM)
    client.start()

    def pings(seconds: int) -> int:
        before = len(client.events)
        for _ in range(seconds):
            client.now += 1
            client.connection.tick(client.now)
            client.pump()
        return sum(isinstance(event, h2.events.PingReceived) for event in client.events[before:])

    assert pings(280) == 1
    assert pings(40) == 1
    client.respond(client.start(), ("grpc-status", "0"), end=True)
    client.pump()
    assert pings(10) == 1


def test_a_large_answer_is_cut_through_front_first() -> None:
    client, fronts, rest = ClientUnderTest(Limits(stream_window=65_535)), list[bytes](), list[bytes]()
    call = client.start()

    def front(call: ClientCall) -> None:
        fronts.append(call.body)
        call.on_chunk = rest.append

    call.on_front = front
    body = bytes(i % 251 for i in range(300_000))
    left = message(body)
    client.respond(call)
    while left:
        room = min(client.h2.local_flow_control_window(call.id), 16_384, len(left))
        if room:
            client.h2.send_data(call.id, left[:room])
            left = left[room:]
        else:
            call.consume(call._unacknowledged)
        client.pump()
    client.finish(call, OK)
    assert fronts[0] + b"".join(rest) == body
    assert call.code is Code.OK


# gRPC's cases of servers that misbehave (doc/http2-interop-test-descriptions.md)


def test_goaway_lets_running_calls_end_and_hands_back_those_not_looked_at() -> None:
    client, left, retried = ClientUnderTest(), list[str](), list[ClientCall]()
    client.connection.on_leave = lambda: left.append("leave")
    first, second = client.start(), client.start()
    second.on_unprocessed = lambda call: (retried.append(call), True)[1]
    client.respond(first)
    client.h2.send_data(first.id, message(b"one"))
    client.h2.send_headers(first.id, [OK], end_stream=True)
    sent = client.h2.data_to_send()
    goaway = (8).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + first.id.to_bytes(4, "big") + bytes(4)
    client.connection.receive(goaway, client.now)
    client.connection.receive(sent, client.now)
    client.connection.output()
    assert left == ["leave"]
    assert not client.connection.has_room
    assert (first.code, first.body) == (Code.OK, b"one")
    assert retried == [second]
    assert not second.done


def test_rst_after_header() -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call)
    client.h2.reset_stream(call.id, 0)
    client.pump()
    assert call.code is Code.INTERNAL


def test_rst_during_data() -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call)
    client.h2.send_data(call.id, message(b"hello")[:-2])
    client.h2.reset_stream(call.id, 0)
    client.pump()
    assert call.code is Code.INTERNAL


def test_rst_after_data() -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call)
    client.h2.send_data(call.id, message(b"hello"))
    client.h2.reset_stream(call.id, 0)
    client.pump()
    assert call.code is Code.INTERNAL


def test_pings_are_answered_between_frames() -> None:
    client = ClientUnderTest()
    for number in range(5):
        call = client.start()
        client.h2.ping(b"%08d" % number)
        client.respond(call)
        client.h2.ping(b"%08d" % number)
        client.h2.send_data(call.id, message(b"x"))
        client.finish(call, OK)
        assert call.code is Code.OK
    assert len([event for event in client.events if isinstance(event, h2.events.PingAckReceived)]) == 10


def test_max_streams_is_learnt_from_settings() -> None:
    client, room = ClientUnderTest(), list[str]()
    client.h2.update_settings({3: 1})
    client.pump()
    client.connection.on_room = lambda: room.append("room")
    call = client.start()
    assert not client.connection.has_room
    client.respond(call)
    client.h2.send_data(call.id, message(b"x"))
    client.finish(call, OK)
    assert client.connection.has_room
    assert room == ["room"]


def test_data_frame_padding_does_not_use_up_the_window() -> None:
    client = ClientUnderTest(Limits(stream_window=65_535, connection_window=65_535))
    call = client.start()
    got: list[bytes] = []

    def take(body: bytes, compressed: bool) -> None:
        got.append(body)
        call.feed()

    call.on_message = take
    client.respond(call)
    for _ in range(2000):
        client.h2.send_data(call.id, message(b"hello"), pad_length=255)
        client.pump()
    client.finish(call, OK)
    assert (len(got), call.code) == (2000, Code.OK)


# Servers that are rude

GARBAGE = [
    ("http/1", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    ("zeros", bytes(1000)),
    ("giant frame", b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(100_000)),
    ("bad hpack", b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff"),
    ("data on stream 0", b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x"),
    ("push promise", b"\x00\x00\x05\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02\x88"),
]


@pytest.mark.parametrize("data", [data for _, data in GARBAGE], ids=[name for name, _ in GARBAGE])
def test_garbage_ends_the_connection_and_its_calls_with_a_status(data: bytes) -> None:
    client = ClientUnderTest()
    call = client.start()
    client.connection.receive(data, client.now)
    while client.connection.output():
        pass
    if not client.connection.closed:
        client.connection.close("end of file")
    assert call.done
    assert call.code in (Code.UNAVAILABLE, Code.INTERNAL)


def test_endless_empty_data_is_cut() -> None:
    client = ClientUnderTest()
    call = client.start()
    client.respond(call)
    client.pump()
    empty = bytes(3) + b"\x00\x00" + call.id.to_bytes(4, "big")
    client.connection.receive(empty * 5000, client.now)
    while client.connection.output():
        pass
    assert client.connection.closed
    assert call.done


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    client = ClientUnderTest()
    client.h2.update_settings({4: 8 * 1024 * 1024})
    client.h2.increment_flow_control_window(8 * 1024 * 1024)
    client.pump()
    calls = []
    for body in (bytes(2 * 1024 * 1024), b"small"):
        call = ClientCall(b"/x", (), client.deadlines, None, client.now)
        call.request = body
        client.connection.start(call)
        calls.append(call)
    client.pump()
    ended = [event.stream_id for event in client.events if isinstance(event, h2.events.StreamEnded)]
    assert ended == [calls[1].id, calls[0].id]
    data = [event for event in client.events if isinstance(event, h2.events.DataReceived)]
    assert sum(len(event.data) for event in data if event.stream_id == calls[0].id) == 2 * 1024 * 1024 + 5


@pytest.mark.parametrize("where", ["head", "trailers", "trailers only"])
@pytest.mark.parametrize("odd", [(b"x!y", b"v"), (b"x-bin", b"!")], ids=["key", "base64"])
def test_a_field_that_no_grpc_peer_takes_is_dropped_and_told_and_the_answer_stays(
    where: str, odd: tuple[bytes, bytes]
) -> None:
    client, dropped = ClientUnderTest(), list[bytes]()
    client.connection.on_dropped = dropped.append
    call = client.start()
    kept = (b"x-city", "São Paulo".encode())
    status = (b"grpc-status", b"5")
    if where == "trailers only":
        client.respond(call, status, odd, kept, end=True)
        client.pump()
    else:
        client.respond(call, *((odd, kept) if where == "head" else ()))
        client.finish(call, status, *((odd, kept) if where == "trailers" else ()))
    got = [*call.initial, *call.trailing]
    assert call.code is Code.NOT_FOUND
    assert dropped == [odd[0]]
    assert kept in got
    assert odd not in got


# Who ended it

LIMITS = Limits(stream_window=65_535, write_stall_seconds=3)


def stalled(client: ClientUnderTest, body: bytes | None) -> ClientCall:
    """A call whose request does not fit the window, which nobody opens any further."""
    call = client.start(None)
    if body is None:
        call.send_message(bytes(100_000))  # of a stream: its end is not sent either
    else:
        call.send_chunk(message(body))
        call.half_close()
    client.pump()
    assert call.unsent
    return call


@pytest.mark.parametrize("body", [bytes(100_000), None], ids=["unary", "stream"])
def test_a_server_that_takes_nothing_of_a_request_is_unreachable_and_not_an_answer_too_large(
    body: bytes | None,
) -> None:
    client = ClientUnderTest(LIMITS)
    call = stalled(client, body)
    for second in range(1, 6):
        client.connection.tick(client.now + second)
    client.pump()
    assert (call.code, call.origin, call.from_server) == (Code.UNAVAILABLE, Origin.CONNECTION, False)
    assert classify(call.code, call.text, call.origin).meaning is Meaning.UNREACHABLE
    assert any(isinstance(event, h2.events.StreamReset) and event.error_code == 8 for event in client.events)
    assert client.connection.streams == {}


@pytest.mark.parametrize("body", [bytes(100_000), None], ids=["unary", "stream"])
@pytest.mark.parametrize("answer", ["trailers", "trailers only", "error page", "no trailers"])
def test_an_answer_that_ends_before_the_request_is_sent_ends_the_call_at_once(body: bytes | None, answer: str) -> None:
    client, ends = ClientUnderTest(LIMITS), list[ClientCall]()
    call = stalled(client, body)
    call.on_done = ends.append
    expected = Code.RESOURCE_EXHAUSTED
    if answer == "trailers only":
        client.respond(call, ("grpc-status", "8"), end=True)
    elif answer == "trailers":
        client.respond(call)
        client.finish(call, ("grpc-status", "8"))
    else:
        expected = Code.UNAVAILABLE if answer == "error page" else Code.UNKNOWN
        client.respond(call, status="503" if answer == "error page" else "200")
        client.h2.send_data(call.id, b"", end_stream=True)
    client.pump()
    assert ends == [call]
    assert call.code is expected
    assert client.connection.streams == {}
    assert client.connection.engine.queued_body_size() == 0
    assert any(isinstance(event, h2.events.StreamReset) and event.error_code == 0 for event in client.events)


@pytest.mark.parametrize("is_all_sent", [True, False], ids=["half closed", "open"])
def test_a_stream_with_nothing_unsent_ends_with_its_trailers(is_all_sent: bool) -> None:
    client = ClientUnderTest()
    call = client.start(None)
    call.on_message = lambda body, compressed: None
    call.send_message(b"one")
    if is_all_sent:
        call.half_close()
    client.pump()
    client.respond(call)
    client.finish(call, OK)
    assert (call.done, call.code, call.origin) == (True, Code.OK, Origin.SERVER)
    assert client.connection.streams == {}
    resets = [event for event in client.events if isinstance(event, h2.events.StreamReset)]
    assert len(resets) == (0 if is_all_sent else 1)


ENDS: dict[str, tuple[Callable[[ClientUnderTest, ClientCall], None], Origin, Meaning]] = {
    "the server's status": (
        lambda client, call: client.respond(call, ("grpc-status", "14"), end=True),
        Origin.SERVER,
        Meaning.UNCLEAR,
    ),
    "reset: out of calm": (lambda client, call: client.h2.reset_stream(call.id, 11), Origin.PEER, Meaning.OVERLOADED),
    "reset: cancelled": (lambda client, call: client.h2.reset_stream(call.id, 8), Origin.PEER, Meaning.SERVER),
    "reset: refused": (lambda client, call: client.h2.reset_stream(call.id, 7), Origin.PEER, Meaning.UNREACHABLE),
    "a proxy's 503": (
        lambda client, call: client.respond(call, status="503", end=True),
        Origin.LOST,
        Meaning.LOST,
    ),
    "lost": (lambda client, call: client.connection.close("cable cut"), Origin.LOST, Meaning.LOST),
    "cancelled here": (lambda client, call: call.cancel(), Origin.GIVEN_UP, Meaning.ENDED),
    "late": (lambda client, call: client.deadlines.expire(client.now + 99), Origin.GIVEN_UP, Meaning.ENDED),
    "breaks the rules": (
        lambda client, call: client.connection.receive(bytes(4) + b"\0" + call.id.to_bytes(4, "big"), client.now),
        Origin.ANSWER,
        Meaning.SERVER,
    ),
}


@pytest.mark.parametrize(("end", "origin", "meaning"), ENDS.values(), ids=ENDS)
def test_who_ended_a_call_is_a_fact_and_decides_what_it_means(
    end: Callable[[ClientUnderTest, ClientCall], None], origin: Origin, meaning: Meaning
) -> None:
    client = ClientUnderTest()
    call = client.start(deadline=client.now + 60)
    end(client, call)
    client.pump()
    assert call.done
    assert call.origin is origin
    assert classify(call.code, call.text, call.origin).meaning is meaning


def test_an_answer_too_large_is_refused_here_and_never_repeated() -> None:
    client = ClientUnderTest(Limits(message_bytes=1000))
    call = client.start()
    client.respond(call)
    client.h2.send_data(call.id, b"\0\0\1\0\0")
    client.pump()
    assert (call.code, call.origin) == (Code.RESOURCE_EXHAUSTED, Origin.ANSWER)
    assert classify(call.code, call.text, call.origin).elsewhere is False


def test_a_server_whose_clock_is_ahead_does_not_turn_a_deadline_into_a_cancelled_call() -> None:
    """C-core's servers reset a call with CANCEL once its deadline has passed."""
    client = ClientUnderTest()
    call = client.start(deadline=client.now + 1)
    client.now += 1.001
    client.h2.reset_stream(call.id, 8)
    client.pump()
    assert (call.code, call.origin) == (Code.DEADLINE_EXCEEDED, Origin.GIVEN_UP)


def resets(client: ClientUnderTest) -> list[int]:
    return [event.stream_id or 0 for event in client.events if isinstance(event, h2.events.StreamReset)]


@pytest.mark.parametrize("body", [SMALL, LARGE], ids=["small", "large"])
def test_a_call_that_is_given_up_may_finish_and_its_answer_is_dropped(body: bytes) -> None:
    client, ends = ClientUnderTest(most_discarded=100), list[ClientCall]()
    calls = [client.start(body, deadline=client.now + 100) for _ in range(3)]
    for call in calls:
        call.on_done = ends.append
        call.cancel()
    assert ends == calls
    client.respond(calls[0])
    client.h2.send_data(calls[0].id, message(b"late"))
    client.finish(calls[0], OK)
    assert (calls[0].code, calls[0].body, resets(client)) == (Code.CANCELLED, b"", [])
    assert [call.request for call in calls] == [b"", b"", b""]  # nobody needs it any more
    assert len(client.connection.streams) == client.connection.discarded == 2  # still in flight
    client.now += 0.25
    client.deadlines.expire(client.now)
    client.pump()
    assert sorted(resets(client)) == [calls[1].id, calls[2].id]
    assert len(client.deadlines) == 0
    assert client.connection.streams == {}
    assert client.connection.discarded == 0
    assert ends == calls


@pytest.mark.parametrize("how", ["its deadline", "its caller"])
def test_a_call_that_is_given_up_has_its_time_to_finish_however_long_nothing_has_arrived(how: str) -> None:
    """As on a connection with few calls, which learns the time by what arrives."""
    client = ClientUnderTest(most_discarded=100)
    client.deadlines.clock = lambda: client.now
    call = client.start(SMALL, deadline=client.now + 0.5 if how == "its deadline" else None)
    client.now += 0.51
    if how == "its caller":
        call.cancel()
    client.deadlines.expire(client.now)
    client.pump()
    assert call.done
    assert resets(client) == []
    client.now += 0.25
    client.deadlines.expire(client.now)
    client.pump()
    assert resets(client) == [call.id]


def test_a_call_that_is_left_to_finish_is_reset_also_if_its_own_deadline_is_at_that_moment() -> None:
    client = ClientUnderTest(most_discarded=100)
    client.start(SMALL, deadline=client.now + DISCARD_SECONDS).cancel()
    client.deadlines.expire(client.now + 1)
    client.pump()
    assert client.connection.discarded == 0
    assert client.connection.streams == {}


@pytest.mark.parametrize(("body", "told"), [(SMALL, b"200000u"), (LARGE, b"200000u"), (None, b"20000u")])
def test_the_server_sees_no_short_deadline_of_a_unary_call(body: bytes | None, told: bytes) -> None:
    """It is kept here; a Triton that sees very many pass may crash."""
    client = ClientUnderTest(most_discarded=100)
    call = client.start(body, deadline=client.now + 0.02)
    (event,) = requests(client)
    assert dict(event.headers)[b"grpc-timeout"] == told
    client.deadlines.expire(client.now + 0.03)
    assert call.code is Code.DEADLINE_EXCEEDED


def test_only_so_many_calls_are_left_to_finish() -> None:
    client = ClientUnderTest(most_discarded=100)
    client.h2.update_settings({3: 1000})
    client.pump()
    calls = [client.start(SMALL) for _ in range(150)]
    for call in calls:
        call.cancel()
    client.pump()
    assert len(resets(client)) == 50
    client.connection.close("end of test")
    assert client.connection.discarded == 0


def test_an_answer_that_is_dropped_gets_no_more_window() -> None:
    client = ClientUnderTest(Limits(stream_window=65_535), most_discarded=100)
    call = client.start(SMALL)
    call.cancel()
    client.respond(call)
    client.h2.send_data(call.id, message(bytes(60_000))[:50_000])
    client.pump()
    assert client.h2.local_flow_control_window(call.id) == 15_535
    assert client.h2.outbound_flow_control_window > 15_535


@pytest.mark.parametrize("how", ["in part", "stream", "unsent"])
def test_other_calls_that_are_given_up_are_reset(how: str) -> None:
    client = ClientUnderTest(most_discarded=100)
    if how == "unsent":
        client.h2.update_settings({4: 0})
        client.pump()
    call = ClientCall(b"/test.Service/Echo", (), client.deadlines, None, client.now)
    call.request = None if how == "stream" else LARGE if how == "in part" else SMALL
    call.request_more = 5 if how == "in part" else 0
    client.connection.start(call)
    if how == "stream":
        call.on_message = lambda body, compressed: None
    call.cancel()
    client.pump()
    assert resets(client) == [call.id]


@pytest.mark.parametrize(("size", "huffman"), [(70_000, False), (70_000, True), (3_000_000, False)])
@pytest.mark.parametrize("part", ["trailers", "headers", "trailers only"])
def test_an_answer_with_too_large_a_header_list_ends_its_own_call_and_no_other(
    size: int, part: str, huffman: bool
) -> None:
    client, ends = ClientUnderTest(), list[ClientCall]()
    neighbour = client.start(b"h" * 4097)
    calls = [client.start(b"hello") for _ in range(3)]
    encode = client.h2.encoder.encode
    client.h2.encoder.encode = lambda headers, huffman_=True: encode(headers, huffman)  # type: ignore[method-assign]
    for call in calls:
        call.on_done = ends.append
        text = [("grpc-status", "3"), ("grpc-message", "Q" * size), ("x-new", str(call.id))]
        if part == "trailers":
            client.respond(call)
            client.h2.send_headers(call.id, text, end_stream=True)
        else:
            client.respond(call, *text, end=part == "trailers only")
    client.pump(chunk=10_000)
    assert ends == calls
    for call in calls:
        assert call.code is Code.RESOURCE_EXHAUSTED
        what = "trailers" if part == "trailers" else "headers"
        assert call.text == f"The {what} of the server's answer are larger than the limit of 65536 bytes"
        verdict = classify(call.code, call.text, call.origin)
        assert (verdict.meaning, verdict.elsewhere, verdict.ejects) == (Meaning.SERVER, False, False)
    client.respond(neighbour, ("x-new", str(calls[0].id)))
    client.h2.send_data(neighbour.id, message(b"world"))
    client.finish(neighbour, OK, ("x-new", str(calls[1].id)))
    assert (neighbour.code, neighbour.body) == (Code.OK, b"world")
    assert (b"x-new", str(calls[0].id).encode()) in neighbour.initial
    assert (b"x-new", str(calls[1].id).encode()) in neighbour.trailing
    assert not client.connection.closed
    assert client.connection.streams == {}
    assert client.connection.has_room


def test_a_header_block_without_end_ends_its_call_at_once_and_the_connection_in_time() -> None:
    """In little memory; no new call waits for its end, nor do the others for ever."""
    client, leaves, ends = ClientUnderTest(), list[int](), list[ClientCall]()
    client.connection.on_leave = lambda: leaves.append(size)
    call, neighbour = client.start(b"hello"), client.start(b"hello")
    call.on_done = neighbour.on_done = ends.append
    size = 0
    client.connection.receive(frame(1, 0, call.id, b"\x00\x01x\x01y"), client.now)
    for _ in range(13):
        for _ in range(100):
            client.connection.receive(frame(9, 0, call.id, b"\x00\x01x\x7f\x81\x7d" + bytes(16_128)), client.now)
            size += 16_134
            client.connection.advance()  # the next turn of the loop
            assert len(client.connection.engine._block) < 200_000
            assert client.connection.closed or size < 66_000 or (ends == [call] and not client.connection.has_room)
        client.now += 1
        client.connection.tick(client.now)
    client.connection.advance()
    assert (call.code, neighbour.code) == (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
    assert leaves
    assert 15 * MiB < leaves[0] < 17 * MiB
    assert client.connection.closed
