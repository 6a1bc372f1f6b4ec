"""Hostile clients: each is cut within its named limit, which honest work just below it never touches.

Frames are written by hand here, so that no library on the attacker's side is polite. `cut_after` answers how many units
of an attack (frames, or groups of them) a connection bore.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest
from h2_peers import ServerUnderTest, message
from slowness import slowness

from gateway.http2.limits import Bucket, KiB, Limits
from gateway.rpc.server import ServerCall
from gateway.status import Code

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1

# :method POST, :scheme http, then literals without indexing
HEAD = b"\x83\x86\x04\x02/x\x01\x01a\x00\x0ccontent-type\x10application/grpc\x00\x02te\x08trailers"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


class Attacker:
    """A raw client of a server whose calls never end by themselves, unless `accept` says otherwise."""

    def __init__(self, limits: Limits | None = None, accept: Callable[[ServerCall], None] | None = None) -> None:
        self.server = ServerUnderTest(accept or (lambda call: None), limits, greet=False)
        self.received = b""
        self.stream = -1
        self.send(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0))

    def send(self, data: bytes) -> bytes:
        answer = self.server.raw(data)
        self.received += answer
        return answer

    def next(self) -> int:
        self.stream += 2
        return self.stream

    @property
    def cut(self) -> bool:
        return self.server.connection.closed

    def cut_after(self, unit: Callable[[], bytes], most: int, per_turn: int = 50) -> int:
        """Repeat the attack until we are cut; answers how often it took, fails if more than `most`."""
        for turn in range(0, most + per_turn, per_turn):
            self.send(b"".join(unit() for _ in range(per_turn)))
            if self.cut:
                return turn + per_turn
        pytest.fail(f"still there after {most}")

    @property
    def goaway_code(self) -> int | None:
        """Of the last GOAWAY we were sent."""
        code, data = None, self.received
        while len(data) >= 9:
            size = int.from_bytes(data[:3], "big")
            if data[3] == 7:
                code = int.from_bytes(data[13:17], "big")
            data = data[9 + size :]
        return code


def rapid_reset(attacker: Attacker, code: int = 8) -> Callable[[], bytes]:
    def unit() -> bytes:
        stream = attacker.next()
        return frame(HEADERS, END_HEADERS, stream, HEAD) + frame(RST, 0, stream, struct.pack(">I", code))

    return unit


def test_rapid_reset_is_cut_and_never_has_more_calls_than_streams() -> None:
    live, most = set[ServerCall](), list[int]()

    def accept(call: ServerCall) -> None:
        live.add(call)
        most.append(len(live))
        call.on_cancel = lambda code: live.discard(call)

    attacker = Attacker(accept=accept)
    assert attacker.cut_after(rapid_reset(attacker), most=1100) >= 1000
    assert attacker.goaway_code is not None
    assert max(most, default=0) <= 100
    assert live == set()


def test_honest_cancelling_below_the_rate_is_never_cut() -> None:
    attacker = Attacker(Limits(resets=(50, 10)))
    unit = rapid_reset(attacker)
    for _ in range(95):  # the engine keeps the same limit by the real clock, doubled
        attacker.send(unit())
        attacker.server.now += 0.2  # 5 a second
    assert not attacker.cut, attacker.server.connection.reason


@pytest.mark.parametrize("code", [0, 1, 2, 5, 7, 8, 11, 99, 0xFFFF_FFFF])
@pytest.mark.parametrize("in_one_read", [True, False])
def test_every_reset_counts_whatever_its_code(code: int, in_one_read: bool) -> None:
    attacker = Attacker()
    unit = rapid_reset(attacker, code)

    def in_two_reads() -> bytes:
        whole = unit()
        attacker.send(whole[:-13])
        attacker.server.now += 0.001
        attacker.send(whole[-13:])
        return b""

    assert attacker.cut_after(unit if in_one_read else in_two_reads, most=1100) >= 1000
    assert attacker.goaway_code == 11


def test_a_few_answered_calls_do_not_hide_a_rapid_reset() -> None:
    attacker = Attacker(accept=answering)
    reset = rapid_reset(attacker)
    attacker.cut_after(lambda: b"".join(reset() for _ in range(30)) + whole_call(attacker), most=100, per_turn=1)


def answering(call: ServerCall) -> None:
    call.on_request = lambda done: done.reply(b"x")


def whole_call(attacker: Attacker, *fields: bytes) -> bytes:
    stream = attacker.next()
    head = frame(HEADERS, END_HEADERS, stream, HEAD + b"".join(fields))
    return head + frame(DATA, END_STREAM, stream, message(b"hello"))


TIMEOUT = b"\x00\x0cgrpc-timeout\x0610000u"  # 10 ms


@pytest.mark.parametrize(
    ("given_up", "after", "timeout"),
    [
        pytest.param(8, 0.005, b"", id="eight of ten are hedged"),
        pytest.param(10, 0.009, TIMEOUT, id="all, just before their deadline"),
        pytest.param(10, 0.02, TIMEOUT, id="all, after their deadline"),
        pytest.param(10, 1.2, b"", id="all, after a second"),
    ],
)
def test_a_client_that_gives_up_many_calls_is_never_cut(given_up: int, after: float, timeout: bytes) -> None:
    """300 calls a second, for two minutes."""
    waiting: list[ServerCall] = []

    def accept(call: ServerCall) -> None:
        call.on_request = waiting.append
        call.on_cancel = lambda code: waiting.remove(call)

    attacker = Attacker(Limits(max_streams=1000), accept)
    attacker.send(frame(WINDOW_UPDATE, 0, 0, b"\x40\0\0\0"))
    resets: list[tuple[float, int]] = []
    for n in range(300 * 120):
        attacker.server.now += 1 / 300
        while resets and resets[0][0] <= attacker.server.now:
            attacker.send(frame(RST, 0, resets.pop(0)[1], struct.pack(">I", 8)))
        attacker.send(whole_call(attacker, timeout))
        if n % 10 < given_up:
            resets.append((attacker.server.now + after, attacker.stream))
        else:
            waiting.pop().reply(b"x")
        if attacker.cut:
            break
    assert not attacker.cut, attacker.server.connection.reason


def test_a_reset_after_the_answer_wastes_nothing() -> None:
    attacker = Attacker(accept=answering)
    for _ in range(3000):
        attacker.send(whole_call(attacker))
        attacker.send(frame(RST, 0, attacker.stream, bytes(4)))
    assert not attacker.cut, attacker.server.connection.reason


def test_what_we_end_ourselves_is_not_the_clients_doing() -> None:
    """As an answer that is not read until the call's deadline."""

    def accept(call: ServerCall) -> None:
        call.streaming = True
        call.on_message = lambda body, compressed: call.send_message(bytes(100_000))
        call.send_headers()

    attacker = Attacker(accept=accept)
    for _ in range(1000):
        attacker.send(whole_call(attacker, TIMEOUT))
        attacker.server.now += 0.02
        attacker.server.deadlines.expire(attacker.server.now)
    assert not attacker.cut, attacker.server.connection.reason


LARGE_VALUE = b"\x00\x01x\x7f\x81\xfc\x00" + b"v" * 16_128


@pytest.mark.parametrize("flags", [END_HEADERS, END_HEADERS | END_STREAM], ids=["open", "ended"])
@pytest.mark.parametrize(
    "rest",
    [LARGE_VALUE, b"\x00\x01x\x01\x01", b"\x00\x04host\x04else"],
    ids=["too large", "illegal metadata", "another host"],
)
def test_refused_heads_are_counted_whatever_flags_they_have(flags: int, rest: bytes) -> None:
    attacker = Attacker()
    attacker.cut_after(lambda: frame(HEADERS, flags, attacker.next(), HEAD + rest), most=500)


def test_heads_that_must_be_decoded_count_as_work() -> None:
    """So that others have their turn in between."""
    attacker = Attacker()
    connection = attacker.server.connection
    connection.advance()
    before = connection.turn_left
    large = HEAD + b"\x00\x01x\x7f\x81\x6d" + b"v" * 14_000
    connection.receive(frame(HEADERS, END_HEADERS, attacker.next(), large), attacker.server.now)
    assert before - connection.turn_left > 14_000 / 640
    connection.advance()
    before = connection.turn_left
    connection.receive(frame(HEADERS, END_HEADERS, attacker.next(), HEAD), attacker.server.now)
    assert before - connection.turn_left < 10


def test_error_texts_take_no_place_in_the_table_of_fields() -> None:
    texts = iter(range(1000))
    server = ServerUnderTest(
        lambda call: setattr(call, "on_request", lambda c: c.finish(Code.NOT_FOUND, f"{next(texts)}"))
    )
    for _ in range(100):
        assert server.call().status == "5"
    names = {name for name, _ in server.h2.decoder.header_table.dynamic_entries}
    assert b"grpc-message" not in names


# MadeYouReset: ways to have the server reset a stream


def _zero_window(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, HEAD) + frame(WINDOW_UPDATE, 0, stream, bytes(4))


def _window_overflow(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, HEAD) + frame(WINDOW_UPDATE, 0, stream, b"\x7f\xff\xff\xff")


def _data_after_end(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, HEAD) + frame(DATA, 0, stream, b"x")


def _headers_after_end(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, HEAD) + frame(HEADERS, END_HEADERS, stream, HEAD)


def _bad_priority(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, HEAD) + frame(PRIORITY, 0, stream, b"x")


def _malformed_head(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, HEAD + b"\x00\x01X\x01y")


@pytest.mark.parametrize(
    "unit",
    [_zero_window, _window_overflow, _data_after_end, _headers_after_end, _bad_priority, _malformed_head],
    ids=lambda unit: str(unit.__name__),
)
def test_made_you_reset_is_cut(unit: Callable[[int], bytes]) -> None:
    attacker = Attacker()
    assert attacker.cut_after(lambda: unit(attacker.next()), most=500) <= 500
    assert attacker.server.connection.streams == {}


def test_why_a_stream_was_reset_is_reported() -> None:
    attacker, faults = Attacker(), list[str]()
    attacker.server.connection.on_fault = faults.append
    attacker.send(_malformed_head(attacker.next()))
    attacker.send(_zero_window(attacker.next()))
    assert faults == ["a header field with characters that are not allowed", "WINDOW_UPDATE of 0 bytes"]


def test_answering_early_counts_as_resetting() -> None:
    attacker = Attacker(accept=lambda call: call.finish(Code.UNIMPLEMENTED))
    attacker.cut_after(lambda: frame(HEADERS, END_HEADERS, attacker.next(), HEAD), most=1100)


# Floods


@pytest.mark.parametrize(
    ("kind", "payload", "most"),
    [(SETTINGS, b"", 1200), (PING, bytes(8), 1200), (WINDOW_UPDATE, b"\0\0\0\1", 1200)],
    ids=["settings", "ping", "window update by 1"],
)
def test_control_frames_beyond_what_work_explains_are_cut(kind: int, payload: bytes, most: int) -> None:
    attacker = Attacker()
    attacker.cut_after(lambda: frame(kind, 0, 0, payload), most=most)
    assert attacker.goaway_code == 11  # ENHANCE_YOUR_CALM


@pytest.mark.parametrize("replies", ["read", "unread"])
def test_one_turn_full_of_pings_costs_less_than_a_stall(replies: str) -> None:
    flood = frame(PING, 0, 0, bytes(8)) * (256 * KiB // 17)  # all that one read can bring
    took = []
    for _ in range(5):  # the least counts: what else runs on the machine makes the same work cost more CPU time
        attacker = Attacker()
        started = time.thread_time()
        attacker.server.connection.receive(flood, attacker.server.now)
        if replies == "read":
            attacker.server.read()
        took.append(time.thread_time() - started)
        assert attacker.cut
    assert min(took) < 0.05 * slowness()


@pytest.mark.parametrize(
    "unit",
    [
        lambda stream: frame(DATA, 0, stream),
        lambda stream: frame(PRIORITY, 0, stream, b"\0\0\0\x03\x10"),
        lambda stream: frame(0xFA, 0, stream, b"unknown"),
        lambda stream: frame(0xFA, 0, 0),
    ],
    ids=["empty data", "priority", "unknown", "unknown empty"],
)
def test_frames_that_mean_nothing_are_cut(unit: Callable[[int], bytes]) -> None:
    attacker = Attacker()
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD))
    attacker.cut_after(lambda: unit(stream), most=1100)


def test_honest_traffic_is_never_taken_for_a_flood() -> None:
    """Per call what C-core sends at most: window updates by a few bytes, a BDP ping, its acknowledgement."""
    attacker = Attacker(accept=lambda call: setattr(call, "on_request", lambda done: done.reply(b"x" * 100)))
    for _ in range(5000):
        stream = attacker.next()
        attacker.send(
            frame(HEADERS, END_HEADERS, stream, HEAD)
            + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\x6e")
            + frame(DATA, END_STREAM, stream, message(b"hello"))
            + frame(PING, 0, 0, bytes(8))
            + frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\x05")
        )
        attacker.server.now += 0.0001
    assert not attacker.cut, attacker.server.connection.reason
    assert attacker.server.connection.streams == {}


@pytest.mark.parametrize("piece", [b"", b"\x00\x01x\x01y" * 100], ids=["empty", "full"])
def test_a_continuation_flood_is_cut_before_anything_is_served(piece: bytes) -> None:
    attacker = Attacker()
    attacker.send(frame(HEADERS, 0, attacker.next(), HEAD))
    taken = attacker.cut_after(lambda: frame(CONTINUATION, 0, 1, piece), most=64, per_turn=1)
    assert taken <= 10
    assert attacker.server.calls == []


def test_an_hpack_bomb_is_cut_at_once() -> None:
    """One 4 KiB entry in the table, then a head that refers to it 16,000 times: 64 MiB decoded from 16 KiB."""
    attacker = Attacker()
    value = b"v" * 3900
    entry = b"\x40\x01x" + b"\x7f" + bytes([0x80 | ((len(value) - 127) & 0x7F), (len(value) - 127) >> 7]) + value
    attacker.send(frame(HEADERS, END_HEADERS, attacker.next(), HEAD + entry))
    started = time.thread_time()
    attacker.send(frame(HEADERS, END_HEADERS, attacker.next(), HEAD + b"\xbe" * 16_000))
    assert time.thread_time() - started < 0.05 * slowness()
    assert attacker.cut
    assert len(attacker.server.calls) == 1


@pytest.mark.parametrize(("size", "cut"), [(15_000, False), (17_000, False), (60_000, False), (70_000, True)])
def test_a_large_head_is_refused_and_only_a_giant_one_ends_the_connection(size: int, cut: bool) -> None:
    attacker = Attacker()
    value = b"v" * (size - 300)
    rest = len(value) - 127
    length = b"\x7f" + bytes([0x80 | (rest & 0x7F), 0x80 | (rest >> 7 & 0x7F), rest >> 14])
    block = HEAD + b"\x00\x01x" + length + value
    pieces = [block[i : i + 16_384] for i in range(0, len(block), 16_384)]
    frames = [
        frame(CONTINUATION if i else HEADERS, END_HEADERS if i == len(pieces) - 1 else 0, 1, piece)
        for i, piece in enumerate(pieces)
    ]
    attacker.send(b"".join(frames))
    assert attacker.cut is cut
    assert len(attacker.server.calls) == (1 if size < 16 * KiB else 0)


# Slowness


@pytest.mark.parametrize(
    "start",
    [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS, 0, 0)[:5]],
    ids=["silent", "half preface", "no settings", "half settings"],
)
def test_a_client_that_does_not_greet_is_closed(start: bytes) -> None:
    server = ServerUnderTest(greet=False)
    server.raw(start)
    for _ in range(9):
        server.now += 1
        server.connection.tick(server.now)
    assert not server.connection.closed
    for _ in range(3):
        server.now += 1
        server.connection.tick(server.now)
    assert server.connection.closed


def test_a_head_that_dribbles_in_is_closed() -> None:
    attacker = Attacker()
    data = frame(HEADERS, END_HEADERS, 1, HEAD)
    for second in range(12):
        attacker.send(data[second : second + 1])
        attacker.server.now += 1
        attacker.server.connection.tick(attacker.server.now)
    assert attacker.cut


def test_an_idle_client_that_has_greeted_stays() -> None:
    attacker = Attacker()
    for _ in range(600):
        attacker.server.now += 1
        attacker.server.connection.tick(attacker.server.now)
    assert not attacker.cut, attacker.server.connection.reason


@pytest.mark.parametrize("body", [b"", message(b"hello")[:3], message(b"hello")[:-1]], ids=["none", "prefix", "part"])
def test_a_unary_call_whose_message_does_not_come_is_ended(body: bytes) -> None:
    server = ServerUnderTest()
    stalled = server.open()
    if body:
        server.h2.send_data(stalled, body)
    server.pump()
    server.tick(4)
    assert server.answers[stalled].status is None
    server.tick(4)
    assert server.answers[stalled].status == "4"
    assert server.call(b"neighbour").status == "0"


def test_a_message_that_dribbles_in_below_the_rate_is_ended() -> None:
    server = ServerUnderTest(limits=Limits(min_rate=100))
    stalled = server.open()
    server.h2.send_data(stalled, b"\0\0\1\0\0")
    server.pump()
    for _ in range(8):
        if server.answers[stalled].status is None:
            server.h2.send_data(stalled, bytes(50))
        server.tick(1)
    assert server.answers[stalled].status == "4"


def test_a_slow_message_above_the_rate_is_taken() -> None:
    server = ServerUnderTest(limits=Limits(min_rate=100))
    slow = server.open()
    server.h2.send_data(slow, b"\0" + (4000).to_bytes(4, "big"))
    for _ in range(20):
        server.h2.send_data(slow, bytes(200))
        server.pump()
        server.tick(1)
    server.h2.end_stream(slow)
    server.pump()
    assert server.answers[slow].status == "0"


def test_an_open_stream_may_stay_silent_between_messages() -> None:
    def accept(call: ServerCall) -> None:
        call.streaming = True
        call.on_message = lambda body, compressed: call.feed()

    server = ServerUnderTest(accept)
    stream = server.open()
    server.pump()
    server.tick(600)
    assert not server.answers[stream].heads
    assert server.answers[stream].reset is None


def test_a_reader_that_takes_nothing_is_cut_off_and_the_call_cancelled() -> None:
    ends: list[Code] = []

    def accept(call: ServerCall) -> None:
        call.streaming = True
        call.on_message = lambda body, compressed: None
        call.on_cancel = ends.append
        call.send_headers()
        call.send_message(bytes(100_000))

    server = ServerUnderTest(accept, Limits(write_stall_seconds=10))
    server.auto_window = False
    server.h2.update_settings({4: 0})
    stream = server.open()
    server.pump()
    server.tick(8)
    assert server.answers[stream].reset is None
    server.tick(5)
    assert server.answers[stream].reset == 11
    assert ends == [Code.CANCELLED]
    assert server.connection.streams == {}
    assert server.connection.engine.queued_body_size() == 0


def test_a_bucket_is_exact_and_refills() -> None:
    bucket = Bucket((3, 2), 0.0)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [True, True, True, False]
    bucket = Bucket((3, 2), 0.0)
    assert bucket.take(3, 0.0)
    assert bucket.take(1, 0.5)
    assert not bucket.take(1, 0.9)
    assert Bucket((3, 2), 0.0).take(3, 1000.0)
    assert not Bucket((3, 2), 0.0).take(4, 1000.0)


def test_a_request_that_is_reset_in_the_same_read_is_never_begun() -> None:
    begun: list[int] = []
    attacker = Attacker(accept=lambda call: begun.append(call.id))
    unit = rapid_reset(attacker)
    attacker.send(b"".join(unit() for _ in range(100)) + frame(HEADERS, END_HEADERS, attacker.next(), HEAD))
    assert begun == [attacker.stream]
    assert not attacker.cut, attacker.server.connection.reason


# Small frames of bodies

ONE_BYTE = b"\x01"
LONG = b"\0\x0f\xff\xff\xff"  # the prefix of a message that does not get whole


def refusing(call: ServerCall) -> None:
    call.finish(Code.UNIMPLEMENTED, "no")


def collecting(call: ServerCall) -> None:
    call.on_request = lambda done: None


def reading(call: ServerCall) -> None:
    call.streaming = True

    def take(body: bytes, compressed: bool) -> None:
        call.hungry = True

    call.on_message = take


def waiting(call: ServerCall) -> None:
    """Reads one message and wants no other."""
    call.streaming = True
    call.on_message = lambda body, compressed: None


@pytest.mark.parametrize(
    ("accept", "first", "payload"),
    [
        pytest.param(refusing, b"", ONE_BYTE, id="on a call that is over"),
        pytest.param(refusing, b"", b"\x00" * 1000, id="small ones on a call that is over"),
        pytest.param(collecting, LONG, ONE_BYTE, id="of one message"),
        pytest.param(collecting, LONG, b"\x01" * 255, id="tiny ones of one message"),
        pytest.param(reading, LONG, ONE_BYTE, id="of a stream's message"),
        pytest.param(waiting, message(b""), ONE_BYTE, id="to a reader that is slow"),
    ],
)
def test_small_frames_that_complete_nothing_are_cut(
    accept: Callable[[ServerCall], None], first: bytes, payload: bytes
) -> None:
    attacker = Attacker(Limits(tiny=(2000, 0)), accept)
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD) + frame(DATA, 0, stream, first))
    assert attacker.cut_after(lambda: frame(DATA, 0, stream, payload), most=2050) >= 1950
    assert attacker.goaway_code == 11
    assert attacker.server.connection.reason == "too many small frames that complete no message"


def test_heads_on_a_call_that_is_over_are_cut() -> None:
    attacker = Attacker(Limits(tiny=(2000, 0)), refusing)
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD))
    assert attacker.cut_after(lambda: frame(HEADERS, END_HEADERS, stream, b"\x83"), most=2050) >= 1950


NONE = Limits(tiny=(4, 0))


def test_small_messages_on_a_stream_are_never_cut() -> None:
    attacker = Attacker(NONE, reading)
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD))
    for _ in range(200):
        attacker.send(frame(DATA, 0, stream, message(b"x" * 60)) * 50)
    for _ in range(200):  # as some libraries write them: the prefix first
        attacker.send((frame(DATA, 0, stream, message(b"x" * 60)[:5]) + frame(DATA, 0, stream, b"x" * 60)) * 3)
    assert not attacker.cut, attacker.server.connection.reason


def test_small_messages_that_wait_for_a_slow_reader_are_never_cut() -> None:
    attacker = Attacker(NONE, waiting)
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD))
    for _ in range(100):
        attacker.send(frame(DATA, 0, stream, message(b"x" * 60)) * 100)
    assert not attacker.cut, attacker.server.connection.reason


@pytest.mark.parametrize("accept", [answering, refusing], ids=["answered", "refused early"])
def test_small_calls_are_never_cut_however_their_frames_are_cut(accept: Callable[[ServerCall], None]) -> None:
    attacker = Attacker(Limits(tiny=(10, 0), resets=(1_000_000, 0)), accept)
    for _ in range(3000):
        stream, body = attacker.next(), message(b"hello")
        for part in (
            frame(HEADERS, END_HEADERS, stream, HEAD),
            frame(DATA, 0, stream, body[:5]),
            frame(DATA, 0, stream, body[5:]) if accept is answering else b"",
            frame(DATA, END_STREAM, stream),
        ):
            attacker.send(part)
    assert not attacker.cut, attacker.server.connection.reason


def test_a_body_on_its_way_to_a_call_that_is_over_is_never_cut() -> None:
    attacker = Attacker(NONE, refusing)
    stream = attacker.next()
    attacker.send(frame(HEADERS, END_HEADERS, stream, HEAD))
    for _ in range(1000):
        attacker.send(frame(DATA, 0, stream, bytes(16_384)))
    assert not attacker.cut, attacker.server.connection.reason
