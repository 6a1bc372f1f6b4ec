"""Random frames, right and wrong, in both roles, cut anywhere: python-hyper's `h2` says what they mean.

Invariants: after each frame both have told the same of each stream, or both found a fault, unless `STRICTER` says why
not. At the end, once what is open has been ended, the engine has no stream, no byte and all of its window back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from hypothesis import event, given, settings
from hypothesis import strategies as st

from gateway.http2.engine import Engine, client_engine, server_engine
from gateway.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    DataReceived,
    EndedBy,
    EngineError,
    HeadersEvent,
    RequestReceived,
    ResponseReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    frame,
)
from gateway.http2.limits import Limits

LIMITS = Limits(stream_window=65_535, connection_window=65_535)
FIELDS = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"a")]
REQUEST, RESPONSE = b"\x83\x86\x04\x02/x\x01\x01a", b"\x88"
REQUESTS = [REQUEST, REQUEST + b"\x40\x01x\x01y", REQUEST + b"\x00\x01X\x01y", b"\x83\x86", b"\xff"]
RESPONSES = [RESPONSE, RESPONSE + b"\x40\x01x\x01y", b"\x48\x03100", RESPONSE + b"\x00\x01X\x01y", b"\x40\x01x\x01y"]
LAST = [b"\x00\x01x\x01y", b"\x88"]

Pieces = tuple[str, bytes]
STREAMS = st.sampled_from([1, 1, 3, 3, 5, 7])
ENDS = st.sampled_from([0, END_STREAM])


def heads(blocks: list[bytes]) -> st.SearchStrategy[Pieces]:
    plain = st.builds(
        lambda stream, block, ends: ("HEADERS", frame(HEADERS, END_HEADERS | ends, stream, block)),
        STREAMS,
        st.sampled_from([blocks[0], blocks[0], *blocks]),
        ENDS,
    )
    padded = st.builds(
        lambda stream, pad, ends: (
            "HEADERS, padded",
            frame(HEADERS, END_HEADERS | PADDED | ends, stream, bytes([pad]) + blocks[0] + bytes(5)),
        ),
        STREAMS,
        st.sampled_from([5, 5, 200]),
        ENDS,
    )
    ranked = st.builds(
        lambda stream, on, ends: (
            "HEADERS with priority",
            frame(HEADERS, END_HEADERS | WITH_PRIORITY | ends, stream, on.to_bytes(4, "big") + b"\x10" + blocks[0]),
        ),
        STREAMS,
        st.sampled_from([0, 9]),
        ENDS,
    )
    parts = st.builds(
        lambda stream, at, ends: (
            "HEADERS and CONTINUATION",
            frame(HEADERS, ends, stream, blocks[1][:at]) + frame(CONTINUATION, END_HEADERS, stream, blocks[1][at:]),
        ),
        STREAMS,
        st.integers(0, 5),
        ENDS,
    )
    return st.one_of(plain, plain, padded, ranked, parts)


def others() -> st.SearchStrategy[Pieces]:
    def made(
        name: str, kind: int, payloads: Iterable[bytes], streams: list[int], flags: int = 0
    ) -> st.SearchStrategy[Pieces]:
        return st.builds(
            lambda stream, payload: (name, frame(kind, flags, stream, payload)),
            st.sampled_from(streams),
            st.sampled_from(list(payloads)),
        )

    some = [1, 3, 5, 7]
    size = [n.to_bytes(4, "big") for n in (1, 1000, 0, (1 << 31) - 1)]
    return st.one_of(
        made("trailers", HEADERS, LAST[:1], some, END_HEADERS | END_STREAM),
        made("trailers", HEADERS, LAST, some, END_HEADERS | END_STREAM),
        made("DATA", DATA, [b"", b"x", bytes(3000)], some),
        made("DATA", DATA, [b"x", bytes(3000)], some),
        made("DATA that ends", DATA, [b"", b"x", bytes(3000)], some, END_STREAM),
        made("DATA, padded", DATA, [b"\x02xyz\0\0", b"\0", b"\x05x"], some, PADDED),
        made("RST_STREAM", RST_STREAM, [bytes(4), b"\0\0\0\x08", b"\0\0"], some),
        made("WINDOW_UPDATE", WINDOW_UPDATE, size, some),
        made("WINDOW_UPDATE of all", WINDOW_UPDATE, size, [0]),
        made("PRIORITY", PRIORITY, [b"\0\0\0\x09\x10", b"\0\0\0\x01\x10"], [3, 5]),
        made("SETTINGS", SETTINGS, [b"", b"\0\x04\0\0\x10\0", b"\0\x05\0\0\0\0", b"\0\x01\0\0\0\0", b"x"], [0]),
        made("PING", PING, [bytes(8), b"x"], [0]),
        made("GOAWAY", GOAWAY, [bytes(8)], [0]),
        made("unknown", 0xBE, [b"", b"x"], [0, 1]),
        made("CONTINUATION of nothing", CONTINUATION, [b""], some, END_HEADERS),
        made("PUSH_PROMISE", PUSH_PROMISE, [b"\0\0\0\x02" + REQUEST], some, END_HEADERS),
    )


class Told:
    """What one of the two has said of one frame."""

    def __init__(self) -> None:
        self.of: Counter[tuple[str, int]] = Counter()
        self.fault = False
        self.is_the_end = False  # of the connection


class Ours:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def hear(self, data: bytes, cut: int) -> Told:
        told = Told()
        try:
            for piece in (data[: cut % (len(data) + 1)], data[cut % (len(data) + 1) :]):
                self.engine.receive_data(piece)
        except EngineError:
            told.fault = told.is_the_end = True
        for came in self.engine.events():
            if isinstance(came, RequestReceived | ResponseReceived):
                told.of["head", came.stream_id] += 1
            elif isinstance(came, TrailersReceived):
                told.of["trailers", came.stream_id] += 1
            elif isinstance(came, DataReceived):
                told.of["bytes", came.stream_id] += len(came.data)
                self.engine.acknowledge(len(came.data), came.stream_id)
            elif isinstance(came, StreamReset):
                told.of["reset", came.stream_id] += 1
            elif isinstance(came, StreamClosed):
                told.fault = told.fault or came.by is EndedBy.FAULT
            if isinstance(came, HeadersEvent | DataReceived) and came.end_stream:
                told.of["end", came.stream_id] += 1
        self.engine.data_to_send()
        return told


class Judge:
    def __init__(self, connection: h2.connection.H2Connection) -> None:
        self.h2 = connection

    def hear(self, data: bytes) -> Told:
        told = Told()
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            told.fault = True
            return told
        for came in events:
            stream = getattr(came, "stream_id", 0) or 0
            if isinstance(came, h2.events.RequestReceived | h2.events.ResponseReceived):
                told.of["head", stream] += 1
            elif isinstance(came, h2.events.TrailersReceived):
                told.of["trailers", stream] += 1
            elif isinstance(came, h2.events.DataReceived):
                told.of["bytes", stream] += len(came.data or b"")
                self.h2.acknowledge_received_data(came.flow_controlled_length or 0, stream)
            elif isinstance(came, h2.events.StreamEnded):
                told.of["end", stream] += 1
            elif isinstance(came, h2.events.StreamReset):
                told.of["reset", stream] += 1
                told.fault = told.fault or not came.remote_reset
        self.h2.data_to_send()
        return told


def of_server() -> tuple[Ours, Judge]:
    ours, judge = Ours(server_engine(LIMITS)), Judge(h2.connection.H2Connection(h2.config.H2Configuration(False, None)))
    judge.h2.initiate_connection()
    for data in (PREFACE + frame(SETTINGS, 0, 0), frame(SETTINGS, 1, 0)):
        ours.hear(data, 0)
        judge.hear(data)
    return ours, judge


def of_client() -> tuple[Ours, Judge]:
    """With calls on 1, 3 and 5, of which the first has sent all."""
    ours, judge = Ours(client_engine(LIMITS)), Judge(h2.connection.H2Connection(h2.config.H2Configuration(True, None)))
    judge.h2.initiate_connection()
    for data in (frame(SETTINGS, 0, 0), frame(SETTINGS, 1, 0)):
        ours.hear(data, 0)
        judge.hear(data)
    for stream in (1, 3, 5):
        ours.engine.send_request(FIELDS, end_stream=stream == 1)
        judge.h2.send_headers(stream, FIELDS, end_stream=stream == 1)
    return ours, judge


def judged(pair: tuple[Ours, Judge], frames: list[tuple[Pieces, int]]) -> None:
    ours, judge = pair
    for (name, data), cut in frames:
        stream = int.from_bytes(data[5:9], "big")
        was_open = stream in ours.engine._streams
        mine, theirs = ours.hear(data, cut), judge.hear(data)
        if mine.fault or theirs.fault:
            event(f"fault: {name}")
            if not theirs.fault:
                assert name in STRICTER or (not was_open and stream <= ours.engine._last_id), name
            if not mine.fault:  # on a stream that is closed here: the peer may not know that yet
                assert ours.engine._is_client or name == "WINDOW_UPDATE", name
                assert not was_open, name
                assert not +mine.of
            if mine.is_the_end:
                return
            break
        if was_open or not ours.engine._is_client:
            assert +mine.of == +theirs.of, name
        else:  # a client's end of a call ends the stream, and h2 waits for the rest of the request
            assert not +mine.of
        if name == "GOAWAY":
            break  # h2 takes nothing after it; we serve what is open
    nothing_is_left(ours.engine)


STRICTER = {
    "PUSH_PROMISE": "we say that we take none",
    "RST_STREAM": "on an idle stream it is an error (RFC 9113 section 6.4)",
}
"""Where h2 finds no fault and we do; besides frames on streams that were closed or skipped (section 5.1.1)."""


def nothing_is_left(engine: Engine) -> None:
    for stream in list(engine._streams):
        engine.reset_stream(stream)
    for told in engine.events():
        if isinstance(told, DataReceived):
            engine.acknowledge(len(told.data), told.stream_id)
    assert engine._queued == 0
    assert engine._receive_window + engine._unacknowledged == LIMITS.connection_window
    assert engine.partial_unit == 0
    while engine.data_to_send():
        pass
    assert not engine.want_write


@given(st.lists(st.tuples(st.one_of(heads(REQUESTS), others(), others()), st.integers(0, 100)), max_size=12))
@settings(max_examples=1000, deadline=None)
def test_a_server_hears_what_h2_hears(frames: list[tuple[Pieces, int]]) -> None:
    judged(of_server(), frames)


@given(st.lists(st.tuples(st.one_of(heads(RESPONSES), others(), others()), st.integers(0, 100)), max_size=12))
@settings(max_examples=1000, deadline=None)
def test_a_client_hears_what_h2_hears(frames: list[tuple[Pieces, int]]) -> None:
    judged(of_client(), frames)
