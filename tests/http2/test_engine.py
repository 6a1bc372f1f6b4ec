"""The engine by itself: what it lets in, what it holds back, and how bodies share a connection."""

from __future__ import annotations

import random
from contextlib import nullcontext

import h2.connection
import h2.events
import hpack
import pytest
from h2_peers import lenient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.http2.engine import SMALL, Engine, client_engine, server_engine
from gateway.http2.frames import (
    ACK,
    PREFACE,
    WINDOW_UPDATE,
    ConnectionClosed,
    DataReceived,
    EngineError,
    Event,
    GoAwayReceived,
    RequestReceived,
    ResponseReceived,
    StreamClosed,
    TrailersReceived,
    frame,
    goaway_frame,
)
from gateway.http2.hpack import NeverIndexed
from gateway.http2.limits import Limits
from gateway.http2.states import MOST_STRAYS

HEAD = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"a")]


def exchange(left: Engine, right: Engine) -> None:
    while True:
        there, back = left.data_to_send(), right.data_to_send()
        if there:
            right.receive_data(there)
        if back:
            left.receive_data(back)
        if not there and not back:
            return


def pair(limits: Limits | None = None) -> tuple[Engine, Engine]:
    client, server = client_engine(limits or Limits()), server_engine(limits or Limits())
    exchange(client, server)
    client.events(), server.events()
    return client, server


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def test_a_stream_closes_when_its_last_frame_is_made() -> None:
    client, server = pair(Limits(stream_window=65_535))
    stream = client.send_request(HEAD, end_stream=True)
    server.receive_data(client.data_to_send())
    assert kinds(server.events()) == [RequestReceived]
    server.send_response(stream, [(b":status", b"200")])
    server.send_data(stream, bytes(1_000_000), end_stream=True)
    assert server.events() == []
    exchange(client, server)  # as far as the window goes
    assert server.events() == []
    client.acknowledge(1_000_000, stream)
    while server.queued_body_size():
        exchange(client, server)
        client.acknowledge(100_000, stream)
    assert StreamClosed in kinds(server.events())


def test_window_is_given_back_for_bytes_of_a_stream_that_has_closed() -> None:
    client, server = pair(Limits(stream_window=65_535, connection_window=65_535))
    for _ in range(5):  # 5 x 40,000 bytes through a window of 65,535
        stream = client.send_request(HEAD)
        client.send_data(stream, b"x" * 40_000)
        exchange(client, server)
        client.reset_stream(stream)
        exchange(client, server)
        got = [event for event in server.events() if isinstance(event, DataReceived)]
        assert sum(len(event.data) for event in got) == 40_000
        for event in got:
            server.acknowledge(len(event.data), event.stream_id)
        exchange(client, server)


def test_window_is_not_given_back_before_it_is_acknowledged() -> None:
    client, server = pair(Limits(stream_window=65_535, connection_window=65_535))
    stream = client.send_request(HEAD)
    client.send_data(stream, b"x" * 100_000)
    exchange(client, server)
    assert client.queued_body_size(stream) == 100_000 - 65_535
    server.acknowledge(65_535, stream)
    exchange(client, server)
    assert client.queued_body_size(stream) == 0


def test_a_stream_gets_no_window_that_what_is_left_of_it_does_not_need() -> None:
    client, server = pair(Limits(stream_window=100_000, connection_window=1_000_000))
    stream = client.send_request(HEAD)
    client.send_data(stream, bytes(80_000))
    exchange(client, server)
    server.acknowledge(80_000, stream, missing=20_000 - 256)
    assert not server.data_to_send()
    server.acknowledge(0, stream, missing=20_001 - 256)  # the last frame may have so much padding
    assert server.data_to_send()


def with_bytes_not_yet_given_back(limits: Limits | None = None) -> tuple[Engine, int]:
    """A server that has taken ten bytes of a request, too few for a WINDOW_UPDATE; and the request's stream."""
    client, server = pair(limits)
    stream = client.send_request(HEAD)
    client.send_data(stream, bytes(10))
    server.receive_data(client.data_to_send())
    server.acknowledge(10, stream)
    return server, stream


def test_the_limit_of_streams_holds_whatever_window_is_not_given_back_yet() -> None:
    server, stream = with_bytes_not_yet_given_back(Limits(max_streams=1))
    block = hpack.Encoder().encode(HEAD)
    with pytest.raises(EngineError, match="more open streams"):
        server.receive_data(frame(HEADERS, END_HEADERS, stream + 2, block))


def test_settings_that_were_not_sent_are_not_acknowledged_whatever_window_is_not_given_back_yet() -> None:
    server, _ = with_bytes_not_yet_given_back()
    with pytest.raises(EngineError, match="acknowledgement of SETTINGS"):
        server.receive_data(frame(SETTINGS, ACK, 0))


def test_settings_may_be_acknowledged_after_a_window_was_given_back() -> None:
    client, server = client_engine(Limits()), server_engine(Limits(connection_window=65_535, stream_window=65_535))
    server.data_to_send()  # its SETTINGS are on their way
    stream = client.send_request(HEAD)
    client.send_data(stream, bytes(40_000))
    server.receive_data(client.data_to_send())
    server.acknowledge(40_000, stream)
    server.receive_data(frame(SETTINGS, ACK, 0))
    assert server.resize_windows(100_000)  # no SETTINGS are left to be acknowledged


def test_a_never_indexed_field_arrives_as_such_and_leaves_the_table_alone() -> None:
    client = client_engine(Limits())
    peer = h2.connection.H2Connection(lenient(client=False))
    sizes = []
    for number in range(3):
        client.send_request([*HEAD, NeverIndexed(b"x-secret", b"value-%d" % number)], end_stream=True)
        events = peer.receive_data(client.data_to_send())
        head = next(event for event in events if isinstance(event, h2.events.RequestReceived))
        field = next(field for field in head.headers if field[0] == b"x-secret")
        assert field == (b"x-secret", b"value-%d" % number)
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
        sizes.append(len(peer.decoder.header_table.dynamic_entries))
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_goaway_written_by_hand_is_understood() -> None:
    peer = h2.connection.H2Connection(lenient(client=True))
    peer.initiate_connection()
    peer.receive_data(server_engine(Limits()).data_to_send())
    (event,) = peer.receive_data(goaway_frame(7, 11, b"calm down"))
    assert isinstance(event, h2.events.ConnectionTerminated)
    assert (event.last_stream_id, event.error_code, event.additional_data) == (7, 11, b"calm down")


@pytest.mark.parametrize("size", [1, 16_384, 131_072, 131_073, 1_000_000])
def test_output_in_pieces_is_the_whole_body(size: int) -> None:
    client, server = pair()
    stream = client.send_request(HEAD)
    body = bytes(i % 251 for i in range(size))
    client.send_data(stream, body, end_stream=True)
    got = b""
    while len(got) < size:
        piece = client.data_to_send(131_072)
        assert len(piece) <= 131_072 + 65_536 + 100
        server.receive_data(piece)
        for event in server.events():
            if isinstance(event, DataReceived):
                got += event.data
                server.acknowledge(len(event.data), stream)
        client.receive_data(server.data_to_send())
    assert got == body


ANSWER = [(b":status", b"200"), (b"content-type", b"application/grpc")]
LONG = [(b"x-long", bytes(40) * 1000)]
WHOLES = st.lists(
    st.tuples(st.sampled_from([0, 5, 100, SMALL, SMALL + 1, 70_000]), st.sampled_from([[], LONG]), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30)
@given(WHOLES)
@example([(5, [], 0), (SMALL, [], 1), (5, LONG, 2)])
def test_a_whole_request_and_answer_are_what_their_frames_one_by_one_are(
    calls: list[tuple[int, list[tuple[bytes, bytes]], int]],
) -> None:
    """Whatever their size, and whether the peer's windows have room for them."""
    limits = Limits(stream_window=65_535)
    (client, server), (other_client, other_server) = pair(limits), pair(limits)
    heard: list[list[object]] = [[], []]
    for size, fields, user in calls:
        body, more = bytes(size), (NeverIndexed(b"x-user", b"%d" % user),)
        own = [NeverIndexed(b"grpc-timeout", b"%dm" % size)]
        stream = client.send_call(HEAD, own, more, body)
        assert other_client.send_request([*HEAD, *own, *more]) == stream
        other_client.send_data(stream, body, end_stream=True)
        heard[0] += told(client, server)
        heard[1] += told(other_client, other_server)
        server.send_answer(stream, ANSWER, body, [(b"grpc-status", b"0"), *fields])
        other_server.send_response(stream, ANSWER)
        other_server.send_data(stream, body)
        other_server.send_trailers(stream, [(b"grpc-status", b"0"), *fields])
        with pytest.raises(EngineError):
            server.send_data(stream, b"more")
        heard[0] += told(server, client)
        heard[1] += told(other_server, other_client)
    assert heard[0] == heard[1]
    assert not client.want_write
    assert not server.want_write


def told(sender: Engine, receiver: Engine) -> list[object]:
    """What arrives, with bodies joined: headers, bytes, end of each stream."""
    found: list[object] = []
    while sender.want_write:
        receiver.receive_data(sender.data_to_send())
        for event in receiver.events():
            if isinstance(event, DataReceived):
                receiver.acknowledge(len(event.data), event.stream_id)
                if found and isinstance(found[-1], bytes):
                    found[-1] += event.data
                else:
                    found.append(event.data)
                found += [event.stream_id, "end"] if event.end_stream else []
            elif isinstance(event, RequestReceived | ResponseReceived | TrailersReceived):
                found.append((type(event), event.stream_id, event.headers))
        sender.receive_data(receiver.data_to_send())
        sender.events()
    return found


def data_frames(output: bytes) -> list[tuple[int, int]]:
    """(stream, length) of the DATA frames."""
    found, at = [], 0
    while at < len(output):
        length = int.from_bytes(output[at : at + 3], "big")
        if output[at + 3] == DATA:
            found.append((int.from_bytes(output[at + 5 : at + 9], "big"), length))
        at += 9 + length
    return found


def test_large_bodies_take_turns_and_a_small_one_does_not_wait_for_them() -> None:
    client, server = pair()
    streams = [client.send_request(HEAD) for _ in range(3)]
    exchange(client, server)
    for stream in streams[:2]:
        client.send_data(stream, bytes(200_000), end_stream=True)
    client.send_data(streams[2], b"small", end_stream=True)
    order = []
    while client.want_write:
        order += [stream for stream, _ in data_frames(client.data_to_send())]
    assert order[0] == streams[2]
    assert order[1:5] == [streams[0], streams[1], streams[0], streams[1]]


def test_a_body_of_many_pieces_fills_its_frames_and_ends_with_its_trailers() -> None:
    client, server = pair()
    stream = client.send_request(HEAD, end_stream=True)
    exchange(client, server)
    server.send_response(stream, [(b":status", b"200")])
    for _ in range(100):
        server.send_data(stream, bytes(5000))
    server.send_trailers(stream, [(b"grpc-status", b"0")])
    with pytest.raises(EngineError):
        server.send_data(stream, b"more")
    sizes, got, events = [], 0, []
    while server.want_write:
        output = server.data_to_send()
        sizes += [length for _, length in data_frames(output)]
        client.receive_data(output)
        for event in client.events():
            events.append(type(event))
            if isinstance(event, DataReceived):
                got += len(event.data)
                client.acknowledge(len(event.data), stream)
        server.receive_data(client.data_to_send())
    assert got == 500_000
    assert events[0] is ResponseReceived
    assert events[-2:] == [TrailersReceived, StreamClosed]
    assert max(sizes) == 65_536  # what the client says it takes


def test_a_head_larger_than_a_frame_is_continued() -> None:
    client, server = pair(Limits(header_list_bytes_hard=200_000))
    client.send_request([*HEAD, *((b"x-%d" % n, b"v" * 1000) for n in range(150))])
    server.receive_data(client.data_to_send())
    (event,) = server.events()
    assert isinstance(event, RequestReceived)
    assert len(event.headers) == 154


def test_white_space_around_a_value_is_not_part_of_it() -> None:
    """`perf_analyzer -H "name: value"` sends it."""
    client, server = pair()
    client.send_request([*HEAD, (b"x-user-id", b" u1\t"), NeverIndexed(b"x-secret", b" s")])
    server.receive_data(client.data_to_send())
    (event,) = server.events()
    assert isinstance(event, RequestReceived)
    assert event.headers[-2:] == ((b"x-user-id", b"u1"), (b"x-secret", b"s"))
    assert isinstance(event.headers[-1], NeverIndexed)


def test_after_a_goaway_only_what_came_before_it_is_served() -> None:
    client, server = pair()
    first = client.send_request(HEAD, end_stream=True)
    exchange(client, server)
    late = client.send_request(HEAD, end_stream=True)  # on its way when the server leaves
    server.send_goaway()
    assert kinds(server.events()) == [RequestReceived]
    server.receive_data(client.data_to_send())
    assert server.events() == []
    client.receive_data(server.data_to_send())
    goaway, closed = client.events()
    assert isinstance(goaway, GoAwayReceived)
    assert isinstance(closed, StreamClosed)
    assert (goaway.last_stream_id, closed.stream_id, closed.error_code) == (first, late, 7)
    with pytest.raises(EngineError):
        client.send_request(HEAD)
    server.send_response(first, [(b":status", b"200")], end_stream=True)
    exchange(server, client)
    assert kinds(server.events()) == [StreamClosed, ConnectionClosed]
    assert kinds(client.events()) == [ResponseReceived, StreamClosed, ConnectionClosed]


def test_a_window_that_shrinks_below_what_was_sent_holds_the_body_until_it_is_open_again() -> None:
    client, server = pair()
    stream = client.send_request(HEAD)
    client.send_data(stream, bytes(60_000))
    exchange(client, server)
    client.receive_data(frame(SETTINGS, 0, 0, b"\0\x04" + (10_000).to_bytes(4, "big")))
    client.send_data(stream, b"x", end_stream=True)
    assert data_frames(client.data_to_send()) == []
    assert client.queued_body_size(stream) == 1
    client.receive_data(frame(WINDOW_UPDATE, 0, stream, (400_000).to_bytes(4, "big")))
    assert data_frames(client.data_to_send()) == [(stream, 1)]


# Frames that a client may send, and that it may not

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, CONTINUATION, UNKNOWN = 0, 1, 2, 3, 4, 6, 9, 0xEE
END_STREAM, END_HEADERS = 1, 4
BLOCK = b"\x83\x86\x84\x01\x01a"  # POST, http, "/", :authority a
LAST = b"\x00\x01x\x01y"  # of trailers


def opened(stream: int, flags: int = 0, block: bytes = BLOCK) -> bytes:
    return frame(HEADERS, END_HEADERS | flags, stream, block)


def ended(stream: int) -> bytes:
    return opened(stream) + frame(DATA, END_STREAM, stream, b"x")


def begun() -> Engine:
    server = server_engine(Limits(max_streams=10_000))
    server.receive_data(PREFACE + frame(SETTINGS, 0, 0))
    return server


GOOD = {
    "calls one after the other": b"".join(ended(2 * n + 1) for n in range(20)),
    "calls at once": opened(1) + opened(3) + ended(5) + frame(DATA, END_STREAM, 1) + frame(DATA, END_STREAM, 3),
    "trailers": opened(1) + frame(DATA, 0, 1, b"x") + opened(1, END_STREAM, LAST),
    "a head in pieces": frame(HEADERS, 0, 1, BLOCK[:3]) + frame(CONTINUATION, END_HEADERS, 1, BLOCK[3:]),
    "resetting": opened(1) + frame(RST, 0, 1, bytes(4)) + ended(3) + frame(RST, 0, 3, bytes(4)),
    "priorities": frame(PRIORITY, 0, 1, b"\0\0\0\x03\x10") + frame(PRIORITY, 0, 3, b"\0\0\0\0\x10") + ended(5),
    "reserved bits": frame(HEADERS, END_HEADERS, 1 | 1 << 31, BLOCK) + frame(DATA, END_STREAM, 1),
    "frames of the connection": frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) + frame(UNKNOWN, 0xFF, 7, b"?"),
    "padding": opened(1) + frame(DATA, 8 | END_STREAM, 1, b"\x05abc" + bytes(5)),
    "padding, and more": opened(1) + frame(DATA, 8, 1, b"\x05abc" + bytes(5)) + frame(DATA, 9, 1, b"\x01\0") + ended(3),
}
BAD = {
    "DATA after the end": ended(1) + frame(DATA, 0, 1),
    "HEADERS after the end": ended(1) + opened(1),
    "trailers twice": opened(1) + opened(1, END_STREAM, LAST) + opened(1, END_STREAM, LAST),
    "DATA after a reset": opened(1) + frame(RST, 0, 1, bytes(4)) + frame(DATA, 0, 1),
    "a stream that was skipped": opened(5) + opened(3),
    "PRIORITY on stream 0": frame(PRIORITY, 0, 0, b"\0\0\0\x03\x10"),
    "PRIORITY on itself": frame(PRIORITY, 0, 3, b"\0\0\0\x03\x10"),
    "more padding than frame": opened(1) + frame(DATA, 8 | END_STREAM, 1, b"\x05abc"),
}


def taken(server: Engine) -> bytes:
    return b"".join(event.data for event in server.events() if isinstance(event, DataReceived))


def test_data_comes_in_frames_of_a_mebibyte_each_delivered_as_it_arrives() -> None:
    server = server_engine(Limits())
    server.receive_data(PREFACE + frame(SETTINGS, 0, 0) + opened(1))
    whole = frame(DATA, 0, 1, bytes(1 << 20))
    server.receive_data(whole[:100])
    assert len(taken(server)) == 91
    server.receive_data(whole[100:])
    assert len(taken(server)) == (1 << 20) - 91
    with pytest.raises(EngineError, match="larger than 1048576"):
        server.receive_data(frame(DATA, 0, 1, bytes((1 << 20) + 1))[:9])


def test_a_body_with_padding_is_delivered_as_it_arrives() -> None:
    server = server_engine(Limits())
    server.receive_data(PREFACE + frame(SETTINGS, 0, 0) + opened(1))
    whole = frame(DATA, 8, 1, b"\xff" + b"x" * 700_000 + bytes(255))
    for at in range(0, len(whole), 65_536):
        server.receive_data(whole[at : at + 65_536])
        assert len(taken(server)) == min(at + 65_536, 700_010) - max(at, 10)


@pytest.mark.parametrize("kind", [HEADERS, CONTINUATION, PING, UNKNOWN])
def test_a_client_s_frame_that_must_be_here_whole_is_refused_by_its_head_if_it_is_large(kind: int) -> None:
    server = begun()
    with pytest.raises(EngineError, match="65537 bytes that is no DATA"):
        server.receive_data(frame(kind, 0, 1, bytes(65_537))[:9])


def test_nothing_large_is_taken_before_settings() -> None:
    server = server_engine(Limits())
    with pytest.raises(EngineError):
        server.receive_data(PREFACE + frame(DATA, 0, 1, bytes(65_537))[:9])


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
    server = begun()
    with pytest.raises(EngineError) if name in BAD else nullcontext():
        for piece in cuts({**GOOD, **BAD}[name])[cut]:
            server.receive_data(piece)
    assert name in BAD or server.partial_unit == 0


def test_streams_that_the_client_leaves_open_are_forgotten_in_time_and_then_tolerated() -> None:
    """After we reset a stream, the client may send on it for a while, or never again."""
    server = begun()
    for n in range(3 * MOST_STRAYS):
        server.receive_data(opened(2 * n + 1))
        server.reset_stream(2 * n + 1)
        server.events(), server.data_to_send()
        assert len(server._strays) <= MOST_STRAYS
    server.receive_data(frame(DATA, 0, 1))
    last = 2 * (3 * MOST_STRAYS) + 1
    server.receive_data(ended(last))
    with pytest.raises(EngineError):
        server.receive_data(frame(DATA, 0, last))


@pytest.mark.parametrize(
    ("data", "is_partial"),
    [
        (frame(PING, 0, 0, bytes(8))[:5], True),
        (frame(PING, 0, 0, bytes(8))[:12], True),
        (ended(1) + frame(PING, 0, 0, bytes(8))[:12], True),
        (frame(HEADERS, 0, 1, BLOCK[:3]), True),
        (frame(HEADERS, 0, 1, BLOCK[:3]) + frame(CONTINUATION, 0, 1, BLOCK[3:]), True),
        (opened(1) + frame(DATA, 0, 1, bytes(1000))[:500], False),
        (ended(1), False),
    ],
    ids=["half a header", "half a frame", "behind others", "half a block", "more of it", "half DATA", "nothing"],
)
def test_what_is_half_here_is_told(data: bytes, is_partial: bool) -> None:
    server = begun()
    server.receive_data(data)
    assert bool(server.partial_unit) is is_partial


def test_bytes_that_dribble_in_do_not_make_a_half_frame_younger() -> None:
    server = begun()
    data = frame(HEADERS, 0, 1, BLOCK[:3]) + frame(CONTINUATION, 0, 1, BLOCK[3:])
    units = set()
    for n in range(len(data)):
        server.receive_data(data[n : n + 1])
        units.add(server.partial_unit)
    assert len(units) == 1


USERS = st.sampled_from([b"u1", b"u2"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["good", "late", "malformed", "reset", "late trailers"]), USERS), max_size=40
)


@example([("good", b"u1"), ("good", b"u1"), ("late trailers", b"u1"), ("late", b"u1")], 4096)
@given(STEPS, st.sampled_from([4096, 300]))
def test_whatever_came_between_a_head_says_what_its_client_wrote(steps: list[tuple[str, bytes]], table: int) -> None:
    """Heads that repeat are known by their bytes, which refer to a table that every other head may change."""
    server, encoder = begun(), hpack.Encoder()
    encoder.header_table_size = table
    stream = -1
    for kind, user in steps:
        stream += 2
        name = b"X-Late" if kind == "malformed" else b"x-late" if kind == "late" else b"x-user"
        fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (name, user)]
        server.receive_data(opened(stream, END_STREAM if kind in ("good", "late") else 0, encoder.encode(fields)))
        heads = [event.headers for event in server.events() if isinstance(event, RequestReceived)]
        assert heads == ([] if kind == "malformed" else [tuple(fields)])
        if kind == "reset":
            server.receive_data(frame(RST, 0, stream, bytes(4)))
        elif kind == "late trailers":
            server.reset_stream(stream)
            server.receive_data(opened(stream, END_STREAM, encoder.encode([(b"x-late", user)])))
        server.events(), server.data_to_send()


def test_nothing_is_queued_on_a_connection_that_is_over() -> None:
    """Also not for the stream that was asked for last."""
    client, server = pair()
    stream = client.send_request(HEAD)
    exchange(client, server)
    server.send_response(stream, [(b":status", b"200")])
    server.send_data(stream, bytes(1 << 20))
    server.drop_output()
    assert server.queued_body_size() == server.queued_body_size(stream) == 0
    with pytest.raises(EngineError):
        server.send_data(stream, b"more")
    assert not server.want_write
