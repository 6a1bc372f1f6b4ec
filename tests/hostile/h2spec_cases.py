"""The cases that h2spec has for servers, as a table: what is sent, and which reactions the RFCs allow.

Ids are h2spec's group and number. Clauses without a number in front are of RFC 9113; "7541" is HPACK, "7540" marks what
RFC 9113 no longer asks for. Adapted to gRPC: requests are POST with content-type and te, and have a message wherever an
answer is needed.

The verdict is h2spec's: the first reaction that is allowed passes. An allowed set without CLOSE wants an answer, and
there the first frame of that kind decides; a set with CLOSE wants an error, and only silence fails it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import NamedTuple

from frames import (
    ACK,
    CODES,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME_SIZE,
    MAX_STREAMS,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH,
    RST,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    Peer,
    block,
    data,
    frame,
    goaway,
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

PATH = b"/inference.GRPCInferenceService/ServerLive"
BODY = b"\x08\x01\x10\x01"  # to protobuf two unknown fields, so any service takes it

PSEUDO = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", PATH), (b":authority", b"test"))
GRPC = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))
DUMMY = literal(b"x-dummy0", b"x" * 4000)


class Wait(NamedTuple):
    """A step: read until this comes."""

    what: str


class Skip(Exception):
    """The case says nothing about this server."""


Bytes = Callable[[Peer], bytes]
Step = bytes | Wait | Bytes


class Case(NamedTuple):
    id: str
    clause: str
    sent: str
    steps: tuple[Step, ...]
    allowed: frozenset[str]
    greet: bool = True  # preface and SETTINGS are exchanged before the steps


ACKED, ANSWERED, GOT_DATA = Wait("SETTINGS ACK"), Wait("END 1"), Wait("DATA *")


def request(*extra: tuple[bytes, bytes], method: bytes = b"POST") -> bytes:
    """A header block."""
    pseudo = ((b":method", method), *PSEUDO[1:])
    return block((*pseudo, *GRPC, *extra))


POST = request()
OPEN = headers(1, POST)
ENDED = headers(1, POST, END_HEADERS | END_STREAM)
MESSAGE = data(1, message(BODY), END_STREAM)
CALL = OPEN + MESSAGE


def priority(stream: int, depends_on: int = 0, weight: int = 255, exclusive: bool = False) -> bytes:
    return frame(PRIORITY, 0, stream, u32(depends_on | exclusive << 31) + bytes((weight,)))


def continuation(stream: int, fragment: bytes = DUMMY, flags: int = END_HEADERS) -> bytes:
    return frame(CONTINUATION, flags, stream, fragment)


def call(fragment: bytes) -> bytes:
    """A call whose header block is this."""
    return headers(1, fragment) + MESSAGE


def connection_error(*codes: str) -> frozenset[str]:
    return frozenset({"CLOSE", *(f"GOAWAY {code}" for code in codes)})


def stream_error(*codes: str) -> frozenset[str]:
    return connection_error(*codes) | {f"RST {code}" for code in codes}


def answer(what: str) -> frozenset[str]:
    return frozenset({what})


def _largest(more: int) -> Bytes:
    def size(peer: Peer) -> int:
        return peer.settings.get(MAX_FRAME_SIZE, 16_384) + more

    return lambda peer: data(1, message(bytes(size(peer) - 5)), END_STREAM)


def _large_head(peer: Peer) -> bytes:
    size = peer.settings.get(MAX_FRAME_SIZE, 16_384)
    return headers(1, POST + b"".join(literal(b"x-%d" % n, b"x" * 4000) for n in range(size // 4000 + 1)))


def _too_many(peer: Peer) -> bytes:
    most = peer.settings.get(MAX_STREAMS, 1 << 31)
    if most > 10_000:
        raise Skip("no limit is advertised")
    return b"".join(headers(2 * n + 1, POST) for n in range(most + 1))


def _table_too_large(peer: Peer) -> bytes:
    return call(integer(0x20, 5, peer.settings.get(HEADER_TABLE_SIZE, 4096) + 1) + POST)


def _indexings() -> Iterator[Case]:
    """Literal fields in all their forms (RFC 7541 section 6.2)."""
    number = 2
    for clause, kind, first, bits in (
        ("7541 6.2.1", "with incremental indexing", 0x40, 6),
        ("7541 6.2.2", "without indexing", 0x00, 4),
        ("7541 6.2.3", "never indexed", 0x10, 4),
    ):
        user_agent = integer(first, bits, 58)
        for name, field in (
            ("indexed name", user_agent + PLAIN),
            ("indexed name, Huffman", user_agent + HUFFMAN),
            ("new name", bytes((first,)) + b"\x06x-test" + PLAIN),
            ("new name, Huffman", bytes((first,)) + b"\x85\xf2\xb2\x4a\x84\xff" + HUFFMAN),
        ):
            yield Case(f"generic/5/{number}", clause, f"literal {kind}, {name}", (call(POST + field),), HEAD)
            number += 1


PROTOCOL, CLOSED, SIZE, FLOW = "PROTOCOL_ERROR", "STREAM_CLOSED", "FRAME_SIZE_ERROR", "FLOW_CONTROL_ERROR"
COMPRESSION = "COMPRESSION_ERROR"
HEAD, ONE_BYTE, ANY_DATA = answer("HEADERS 1"), answer("DATA 1"), answer("DATA *")
ACK_COMES, PONG = answer("SETTINGS ACK"), answer("PING ACK " + "00" * 8)
PONG_OR_CLOSE = PONG | {"CLOSE"}
BROKEN, BAD_STREAM = connection_error(PROTOCOL), stream_error(PROTOCOL)
BAD_SIZE, BAD_BLOCK = connection_error(SIZE), connection_error(COMPRESSION)
NOT_OPEN = stream_error(CLOSED)

START = PREFACE + settings([(INITIAL_WINDOW, 65_535)])
MOST = (1 << 31) - 1
UNKNOWN_FRAME = frame(0x16, 0, 0, bytes(8))
PLAIN, HUFFMAN = b"\x06h2spec", b"\x84\x9c\x48\xac\xa4"  # a value in both encodings
EVERY_SETTING = settings(zip(range(1, 7), (4096, 1, 100, 65_535, 16_384, 100), strict=True))
NO_WINDOW, WINDOW_1 = settings([(INITIAL_WINDOW, 0)]), settings([(INITIAL_WINDOW, 1)])
HALF_CLOSED = (NO_WINDOW, ACKED, CALL)  # and it stays so: the answer can't be sent
PADDED_DATA = data(1, b"\5" + message(BODY) + bytes(5), END_STREAM | PADDED)
PADDED_HEAD = headers(1, b"\x08" + POST + bytes(8), END_HEADERS | PADDED)
OVERPADDED_HEAD = headers(1, bytes((len(POST) + 2,)) + POST, END_HEADERS | PADDED | END_STREAM)
PRIORITISED_HEAD = headers(1, u32(0) + b"\xff" + POST, END_HEADERS | PRIORITISED)
SELFISH_HEAD = headers(1, u32(1) + b"\xff" + POST, END_HEADERS | PRIORITISED | END_STREAM)
UNFINISHED = headers(1, POST, 0)
UNFINISHED_END = headers(1, POST, END_STREAM)
FRONT = data(1, message(BODY)[:4])
BACK = data(1, message(BODY)[4:], END_STREAM)
X_TEST, METHOD = literal(b"x-test", b"ok"), literal(b":method", b"POST")
TRAILERS = headers(1, X_TEST, END_HEADERS | END_STREAM)
X_TEST_HUFFMAN = b"\0\x85\xf2\xb2\x4a\x84\xff"
BIG_PADDING = X_TEST_HUFFMAN + b"\x84\x49\x50\x9f\xff"
ZERO_PADDING = X_TEST_HUFFMAN + b"\x83\x49\x50\x90"
EOS = X_TEST_HUFFMAN + b"\x87\x49\x51\xff\xff\xff\xfa\x7f"
LENGTH_1 = headers(1, request((b"content-length", b"1")))


def with_head(*fields: tuple[bytes, bytes]) -> bytes:
    """A request of exactly these fields that is over."""
    return headers(1, block(fields), END_HEADERS | END_STREAM)


def without(name: bytes) -> bytes:
    return with_head(*(field for field in (*PSEUDO, *GRPC) if field[0] != name))


def doubled(name: bytes) -> bytes:
    return with_head(*PSEUDO, *(field for field in PSEUDO if field[0] == name), *GRPC)


GENERIC = (
    Case("generic/1/1", "3.4", "preface and SETTINGS", (START,), answer("SETTINGS"), greet=False),
    Case("generic/2/1", "5.1", "PRIORITY, idle", (priority(1), ping()), PONG),
    Case("generic/2/2", "5.1", "WINDOW_UPDATE, half-closed", (NO_WINDOW, CALL, window(1, 1)), ANY_DATA),
    Case("generic/2/3", "5.1", "PRIORITY, half-closed", (NO_WINDOW, CALL, priority(1), window(1, 1)), ANY_DATA),
    Case("generic/2/4", "5.1", "RST_STREAM, half-closed", (CALL, rst(1), ping()), PONG_OR_CLOSE),
    Case("generic/2/5", "5.1", "PRIORITY, closed", (CALL, ANSWERED, priority(1), ping()), PONG),
    Case("generic/3.1/1", "6.1", "DATA", (OPEN, MESSAGE), HEAD),
    Case("generic/3.1/2", "6.1", "two DATA", (OPEN, FRONT, BACK), HEAD),
    Case("generic/3.1/3", "6.1", "DATA with padding", (OPEN, PADDED_DATA), HEAD),
    Case("generic/3.2/1", "6.2", "HEADERS", (OPEN, MESSAGE), HEAD),
    Case("generic/3.2/2", "6.2", "HEADERS with padding", (PADDED_HEAD, MESSAGE), HEAD),
    Case("generic/3.2/3", "6.2", "HEADERS with priority", (PRIORITISED_HEAD, MESSAGE), HEAD),
    Case("generic/3.3/1", "6.3", "PRIORITY of weight 1", (priority(1, weight=0), CALL), HEAD),
    Case("generic/3.3/2", "6.3", "PRIORITY of weight 256", (priority(1, weight=255), CALL), HEAD),
    Case("generic/3.3/3", "6.3", "PRIORITY with a dependency", (priority(3, depends_on=1), CALL), HEAD),
    Case("generic/3.3/4", "6.3", "PRIORITY, exclusive", (priority(1, exclusive=True), CALL), HEAD),
    Case("generic/3.3/5", "6.3", "PRIORITY, then a lower stream", (priority(3), CALL), HEAD),
    Case("generic/3.4/1", "6.4", "RST_STREAM", (OPEN, rst(1), ping()), PONG_OR_CLOSE),
    Case("generic/3.5/1", "6.5", "every setting", (EVERY_SETTING,), ACK_COMES),
    Case("generic/3.7/1", "6.7", "PING", (ping(b"opaque__"),), answer(f"PING ACK {b'opaque__'.hex()}")),
    Case("generic/3.8/1", "6.8", "GOAWAY, then PING", (goaway(0, 0, b"bye"), ping()), PONG_OR_CLOSE),
    Case("generic/3.9/1", "6.9", "WINDOW_UPDATE, connection", (window(0, 1), ping()), PONG),
    Case("generic/3.9/2", "6.9", "WINDOW_UPDATE, stream", (OPEN, window(1, 1), MESSAGE), HEAD),
    Case("generic/3.10/1", "6.10", "CONTINUATION", (headers(1, POST[:5], 0), continuation(1, POST[5:]), MESSAGE), HEAD),
    Case(
        "generic/3.10/2",
        "6.10",
        "two CONTINUATION",
        (headers(1, POST[:5], 0), continuation(1, POST[5:10], 0), continuation(1, POST[10:]), MESSAGE),
        HEAD,
    ),
    Case("generic/4/1", "8.1", "GET", (headers(1, request(method=b"GET"), END_HEADERS | END_STREAM),), HEAD),
    Case("generic/4/2", "8.1", "HEAD", (headers(1, request(method=b"HEAD"), END_HEADERS | END_STREAM),), HEAD),
    Case("generic/4/3", "8.1", "POST", (CALL,), HEAD),
    Case("generic/4/4", "8.1", "POST with trailers", (OPEN, data(1, message(BODY)), TRAILERS), HEAD),
    Case("generic/5/1", "7541 6.1", "indexed field", (call(POST + b"\xba"),), HEAD),
    *_indexings(),
    Case("generic/5/14", "7541 6.3", "table size update", (call(b"\x3f\x61" + POST),), HEAD),
    Case("generic/5/15", "7541 4.2", "two table size updates", (call(b"\x3f\x61\x3f\xe1\x1f" + POST),), HEAD),
)

HTTP2 = (
    Case("http2/3.5/1", "3.4", "preface and SETTINGS", (START,), answer("SETTINGS"), greet=False),
    Case("http2/3.5/2", "3.4", "a wrong preface", (b"INVALID CONNECTION PREFACE\r\n\r\n",), BROKEN, greet=False),
    Case("http2/4.1/1", "4.1", "unknown frame", (UNKNOWN_FRAME, ping()), PONG),
    Case("http2/4.1/2", "4.1", "undefined flags", (ping(flags=0x16),), answer("PING ACK *")),
    Case("http2/4.1/3", "4.1", "reserved bit", (frame(PING, 0x16, 1 << 31, bytes(8)),), answer("PING ACK *")),
    Case("http2/4.2/1", "4.2", "DATA of the largest size", (OPEN, _largest(0)), HEAD),
    Case("http2/4.2/2", "4.2", "DATA one byte over it", (OPEN, _largest(1)), stream_error(SIZE)),
    Case("http2/4.2/3", "4.2", "HEADERS over it", (_large_head,), BAD_SIZE),
    Case("http2/4.3/1", "4.3", "broken header block", (headers(1, b"\x40", END_HEADERS | END_STREAM),), BAD_BLOCK),
    Case("http2/4.3/2", "4.3", "PRIORITY in a block", (UNFINISHED, priority(1), continuation(1)), BROKEN),
    Case("http2/4.3/3", "4.3", "other HEADERS in a block", (UNFINISHED, headers(3, POST), continuation(1)), BROKEN),
    Case("http2/5.1/1", "5.1", "DATA, idle", (MESSAGE,), stream_error(PROTOCOL, CLOSED)),
    Case("http2/5.1/2", "5.1", "RST_STREAM, idle", (rst(1),), BROKEN),
    Case("http2/5.1/3", "5.1", "WINDOW_UPDATE, idle", (window(1, 100),), BROKEN),
    Case("http2/5.1/4", "5.1", "CONTINUATION, idle", (continuation(1, POST),), BROKEN),
    Case("http2/5.1/5", "5.1", "DATA, half-closed", (*HALF_CLOSED, MESSAGE), NOT_OPEN),
    Case("http2/5.1/6", "5.1", "HEADERS, half-closed", (*HALF_CLOSED, ENDED), NOT_OPEN),
    Case(
        "http2/5.1/7",
        "5.1",
        "CONTINUATION, half-closed",
        (*HALF_CLOSED, continuation(1)),
        stream_error(CLOSED, PROTOCOL),
    ),
    Case("http2/5.1/8", "5.1", "DATA after RST_STREAM", (OPEN, rst(1), MESSAGE), NOT_OPEN),
    Case("http2/5.1/9", "5.1", "HEADERS after RST_STREAM", (OPEN, rst(1), ENDED), NOT_OPEN),
    Case(
        "http2/5.1/10",
        "5.1",
        "CONTINUATION after RST_STREAM",
        (OPEN, rst(1), continuation(1)),
        stream_error(CLOSED, PROTOCOL),
    ),
    Case("http2/5.1/11", "5.1", "DATA, closed", (CALL, ANSWERED, MESSAGE), NOT_OPEN),
    Case("http2/5.1/12", "5.1", "HEADERS, closed", (CALL, ANSWERED, ENDED), connection_error(CLOSED)),
    Case(
        "http2/5.1/13",
        "5.1",
        "CONTINUATION, closed",
        (CALL, ANSWERED, continuation(1)),
        connection_error(CLOSED, PROTOCOL),
    ),
    Case("http2/5.1.1/1", "5.1.1", "even stream", (headers(2, POST, END_HEADERS | END_STREAM),), BROKEN),
    Case("http2/5.1.1/2", "5.1.1", "lower stream", (headers(5, POST), headers(3, POST)), BROKEN),
    Case(
        "http2/5.1.2/1",
        "5.1.2",
        "one stream too many",
        (NO_WINDOW, _too_many),
        stream_error(PROTOCOL, "REFUSED_STREAM"),
    ),
    Case("http2/5.3.1/1", "7540 5.3.1", "HEADERS depending on itself", (SELFISH_HEAD,), BAD_STREAM),
    Case("http2/5.3.1/2", "7540 5.3.1", "PRIORITY depending on itself", (OPEN, priority(1, depends_on=1)), BAD_STREAM),
    Case("http2/5.4.1/1", "5.4.1", "broken PING, then close", (frame(PING, 0, 3, bytes(8)),), answer("CLOSE")),
    Case(
        "http2/5.4.1/2 strict", "5.4.1", "broken PING, GOAWAY first", (frame(PING, 0, 3, bytes(8)),), answer("GOAWAY *")
    ),
    Case("http2/5.5/1", "5.5", "unknown frame", (UNKNOWN_FRAME, ping()), PONG),
    Case("http2/5.5/2", "5.5", "unknown frame in a block", (UNFINISHED_END, UNKNOWN_FRAME), BROKEN),
    Case("http2/6.1/1", "6.1", "DATA on stream 0", (data(0, message(BODY), END_STREAM),), BROKEN),
    Case("http2/6.1/2", "6.1", "DATA, not open", (*HALF_CLOSED, MESSAGE), NOT_OPEN),
    Case("http2/6.1/3", "6.1", "padding longer than DATA", (OPEN, data(1, b"\6Test", PADDED | END_STREAM)), BROKEN),
    Case("http2/6.2/1", "6.2", "PRIORITY after half HEADERS", (UNFINISHED, priority(1), continuation(1)), BROKEN),
    Case("http2/6.2/2", "6.2", "HEADERS after half HEADERS", (UNFINISHED, headers(3, POST), continuation(1)), BROKEN),
    Case("http2/6.2/3", "6.2", "HEADERS on stream 0", (headers(0, POST, END_HEADERS | END_STREAM),), BROKEN),
    Case("http2/6.2/4", "6.2", "padding longer than HEADERS", (OVERPADDED_HEAD,), BAD_STREAM),
    Case("http2/6.3/1", "6.3", "PRIORITY on stream 0", (priority(0),), BROKEN),
    Case("http2/6.3/2", "6.3", "PRIORITY of 4 bytes", (OPEN, frame(PRIORITY, 0, 1, bytes(4))), stream_error(SIZE)),
    Case("http2/6.4/1", "6.4", "RST_STREAM on stream 0", (rst(0),), BROKEN),
    Case("http2/6.4/2", "6.4", "RST_STREAM, idle", (rst(1),), BROKEN),
    Case("http2/6.4/3", "6.4", "RST_STREAM of 3 bytes", (OPEN, frame(RST, 0, 1, bytes(3))), stream_error(SIZE)),
    Case("http2/6.5/1", "6.5", "SETTINGS ACK with payload", (frame(SETTINGS, ACK, 0, b"\0"),), BAD_SIZE),
    Case("http2/6.5/2", "6.5", "SETTINGS on a stream", (frame(SETTINGS, 0, 1, b"\0\3\0\0\0\x64"),), BROKEN),
    Case(
        "http2/6.5/3", "6.5", "SETTINGS of 3 bytes", (frame(SETTINGS, 0, 0, b"\0\3\0"),), stream_error(PROTOCOL, SIZE)
    ),
    Case("http2/6.5.2/1", "6.5.2", "ENABLE_PUSH 2", (settings([(ENABLE_PUSH, 2)]),), BROKEN),
    Case("http2/6.5.2/2", "6.5.2", "window of 2^31", (settings([(INITIAL_WINDOW, 1 << 31)]),), connection_error(FLOW)),
    Case("http2/6.5.2/3", "6.5.2", "MAX_FRAME_SIZE too small", (settings([(MAX_FRAME_SIZE, 16_383)]),), BROKEN),
    Case("http2/6.5.2/4", "6.5.2", "MAX_FRAME_SIZE too large", (settings([(MAX_FRAME_SIZE, 1 << 24)]),), BROKEN),
    Case("http2/6.5.2/5", "6.5.2", "unknown setting", (settings([(0xFF, 1)]), ping()), PONG),
    Case(
        "http2/6.5.3/1",
        "6.5.3",
        "two values in one SETTINGS: the last counts",
        (settings([(INITIAL_WINDOW, 100), (INITIAL_WINDOW, 1)]), ACKED, CALL),
        ONE_BYTE,
    ),
    Case("http2/6.5.3/2", "6.5.3", "SETTINGS", (settings([(ENABLE_PUSH, 0)]),), ACK_COMES),
    Case("http2/6.7/1", "6.7", "PING", (ping(b"opaque__"),), answer(f"PING ACK {b'opaque__'.hex()}")),
    Case("http2/6.7/2", "6.7", "PING ACK, PING", (ping(b"unasked_", ACK), ping()), PONG),
    Case("http2/6.7/3", "6.7", "PING on a stream", (frame(PING, 0, 1, bytes(8)),), BROKEN),
    Case("http2/6.7/4", "6.7", "PING of 6 bytes", (frame(PING, 0, 0, bytes(6)),), BAD_SIZE),
    Case("http2/6.8/1", "6.8", "GOAWAY on a stream", (frame(GOAWAY, 0, 1, bytes(8)),), BROKEN),
    Case("http2/6.9/1", "6.9", "WINDOW_UPDATE 0, connection", (window(0, 0),), BROKEN),
    Case("http2/6.9/2", "6.9", "WINDOW_UPDATE 0, stream", (OPEN, window(1, 0)), BAD_STREAM),
    Case("http2/6.9/3", "6.9", "WINDOW_UPDATE of 3 bytes", (frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"),), BAD_SIZE),
    Case("http2/6.9.1/1", "6.9.1", "window of 1", (settings([(INITIAL_WINDOW, 1)]), ACKED, CALL), ONE_BYTE),
    Case("http2/6.9.1/2", "6.9.1", "connection window over 2^31-1", (2 * window(0, MOST),), answer(f"GOAWAY {FLOW}")),
    Case("http2/6.9.1/3", "6.9.1", "stream window over 2^31-1", (OPEN, 2 * window(1, MOST)), answer(f"RST {FLOW}")),
    Case("http2/6.9.2/1", "6.9.2", "window of 0, then 1", (NO_WINDOW, ACKED, CALL, WINDOW_1), ONE_BYTE),
    Case(
        "http2/6.9.2/2",
        "6.9.2",
        "a window below 0, then 1",
        (settings([(INITIAL_WINDOW, 3)]), ACKED, CALL, GOT_DATA, settings([(INITIAL_WINDOW, 2)]), ACKED, window(1, 2)),
        ONE_BYTE,
    ),
    Case("http2/6.9.2/3", "6.9.2", "window of 2^31", (settings([(INITIAL_WINDOW, 1 << 31)]),), connection_error(FLOW)),
    Case(
        "http2/6.10/1",
        "6.10",
        "two CONTINUATION",
        (UNFINISHED, continuation(1, flags=0), continuation(1), MESSAGE),
        HEAD,
    ),
    Case("http2/6.10/2", "6.10", "CONTINUATION, DATA", (UNFINISHED, continuation(1, flags=0), MESSAGE), BROKEN),
    Case("http2/6.10/3", "6.10", "CONTINUATION on stream 0", (UNFINISHED_END, continuation(0)), BROKEN),
    Case("http2/6.10/4", "6.10", "CONTINUATION after END_HEADERS", (ENDED, continuation(1)), BROKEN),
    Case("http2/6.10/5", "6.10", "CONTINUATION after the last", (UNFINISHED_END, 2 * continuation(1)), BROKEN),
    Case("http2/6.10/6", "6.10", "CONTINUATION after DATA", (OPEN, FRONT, continuation(1, flags=0)), BROKEN),
    Case("http2/7/1", "7", "GOAWAY, unknown code", (goaway(0, 0xFF), ping()), PONG_OR_CLOSE),
    Case("http2/7/2", "7", "RST_STREAM, unknown code", (OPEN, rst(1, 0xFF), ping()), PONG_OR_CLOSE),
    Case("http2/8.1/1", "8.1", "trailers without END_STREAM", (OPEN, FRONT, headers(1, X_TEST)), BAD_STREAM),
    Case("http2/8.1.2/1", "8.2.1", "uppercase name", (with_head(*PSEUDO, *GRPC, (b"X-TEST", b"ok")),), BAD_STREAM),
    Case("http2/8.1.2.1/1", "8.3", "unknown pseudo-field", (with_head(*PSEUDO, (b":test", b"ok"), *GRPC),), BAD_STREAM),
    Case(
        "http2/8.1.2.1/2",
        "8.3",
        "pseudo-field of answers",
        (with_head(*PSEUDO, (b":status", b"200"), *GRPC),),
        BAD_STREAM,
    ),
    Case("http2/8.1.2.1/3", "8.3", "pseudo-field in trailers", (OPEN, FRONT, headers(1, METHOD)), BAD_STREAM),
    Case("http2/8.1.2.1/4", "8.3", "pseudo-fields last", (with_head((b"x-test", b"ok"), *PSEUDO, *GRPC),), BAD_STREAM),
    Case(
        "http2/8.1.2.2/1",
        "8.2.2",
        "connection field",
        (with_head(*PSEUDO, *GRPC, (b"connection", b"keep-alive")),),
        BAD_STREAM,
    ),
    Case(
        "http2/8.1.2.2/2",
        "8.2.2",
        "te of another value",
        (with_head(*PSEUDO, (b"te", b"trailers, deflate")),),
        BAD_STREAM,
    ),
    Case(
        "http2/8.1.2.3/1",
        "8.3.1",
        "empty :path",
        (with_head(*PSEUDO[:2], (b":path", b""), PSEUDO[3], *GRPC),),
        BAD_STREAM,
    ),
    Case("http2/8.1.2.3/2", "8.3.1", "no :method", (without(b":method"),), BAD_STREAM),
    Case("http2/8.1.2.3/3", "8.3.1", "no :scheme", (without(b":scheme"),), BAD_STREAM),
    Case("http2/8.1.2.3/4", "8.3.1", "no :path", (without(b":path"),), BAD_STREAM),
    Case("http2/8.1.2.3/5", "8.3.1", "two :method", (doubled(b":method"),), BAD_STREAM),
    Case("http2/8.1.2.3/6", "8.3.1", "two :scheme", (doubled(b":scheme"),), BAD_STREAM),
    Case("http2/8.1.2.3/7", "8.3.1", "two :path", (doubled(b":path"),), BAD_STREAM),
    Case("http2/8.1.2.6/1", "8.1.1", "content-length of less", (LENGTH_1, MESSAGE), BAD_STREAM),
    Case("http2/8.1.2.6/2", "8.1.1", "content-length of less, two DATA", (LENGTH_1, FRONT, BACK), BAD_STREAM),
    Case("http2/8.2/1", "8.4", "PUSH_PROMISE", (OPEN, frame(PUSH, END_HEADERS, 1, u32(3) + POST)), BROKEN),
)

HPACK = (
    Case("hpack/2.3.3/1", "7541 2.3.3", "index out of range", (call(POST + b"\xc6"),), BAD_BLOCK),
    Case("hpack/2.3.3/2", "7541 2.3.3", "name's index out of range", (call(POST + b"\x7f\x07\x00"),), BAD_BLOCK),
    Case("hpack/4.2/1", "7541 4.2", "table size update at the end", (call(POST + b"\x21"),), BAD_BLOCK),
    Case("hpack/5.2/1", "7541 5.2", "Huffman padding of over 7 bits", (call(POST + BIG_PADDING),), BAD_BLOCK),
    Case("hpack/5.2/2", "7541 5.2", "Huffman padding of zeros", (call(POST + ZERO_PADDING),), BAD_BLOCK),
    Case("hpack/5.2/3", "7541 5.2", "Huffman EOS", (call(POST + EOS),), BAD_BLOCK),
    Case("hpack/6.1/1", "7541 6.1", "index 0", (call(POST + b"\x80"),), BAD_BLOCK),
    Case("hpack/6.3/1", "7541 6.3", "table larger than allowed", (_table_too_large,), BAD_BLOCK),
)

CASES = (*GENERIC, *HTTP2, *HPACK)


def describe(got: Frame) -> str:
    if got.kind == SETTINGS:
        return "SETTINGS ACK" if got.flags & ACK else "SETTINGS"
    if got.kind == PING:
        return f"PING ACK {got.payload.hex()}" if got.flags & ACK else "PING"
    if got.kind == HEADERS:
        return f"HEADERS {got.stream}"
    if got.kind == DATA:
        return f"DATA {len(got.payload)}"
    if got.kind in (RST, GOAWAY):
        code = CODES[got.code] if got.code < len(CODES) else str(got.code)
        return f"{'RST' if got.kind == RST else 'GOAWAY'} {code}"
    return f"frame {got.kind}"


class Verdict(NamedTuple):
    passed: bool
    came: tuple[str, ...]  # what was received, in order, and how it ended


def run(case: Case, peer: Peer, seconds: float) -> Verdict:
    """Play a case. raises: Skip. seconds: of silence that count as no answer."""
    if case.greet:
        peer.greet()
    for step in case.steps:
        if isinstance(step, Wait):
            if not _comes(peer, step.what, seconds):
                return Verdict(False, (f"no {step.what}",))
        else:
            peer.send(step if isinstance(step, bytes) else step(peer))
    return _judge(case.allowed, peer, seconds)


def _comes(peer: Peer, what: str, seconds: float) -> bool:
    while True:
        try:
            got = peer.read(seconds)
        except TimeoutError:
            return False
        if got is None:
            return False
        if what == "END 1":
            if 1 in peer.answers and peer.answers[1].over:
                return True
        elif fnmatch(describe(got), what):
            return True


def _judge(allowed: frozenset[str], peer: Peer, seconds: float) -> Verdict:
    kinds = set() if "CLOSE" in allowed else {what.split()[0] for what in allowed}
    came: list[str] = []
    while True:
        try:
            got = peer.read(seconds)
        except TimeoutError:
            return Verdict(False, (*came, "SILENCE"))
        came.append("CLOSE" if got is None else describe(got))
        if any(fnmatch(came[-1], what) for what in allowed):
            return Verdict(True, tuple(came))
        if got is None or came[-1].split()[0] in kinds:
            return Verdict(False, tuple(came))
