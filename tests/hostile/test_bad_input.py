"""Bad requests get an exact answer, and nobody else notices: not the connection, not its other calls, not the upstream.

Each row is sent on a connection that has another call open, on three fronts: the transport's callback lane, its
servicer lane, and the whole gateway, whose upstream must never hear of it.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from frames import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Answer,
    Pair,
    Peer,
    block,
    data,
    frame,
    headers,
    integer,
    literal,
    message,
    u32,
)
from processes import FAST, Honest, Served, head, request, target
from slowness import slowness
from upstreams import INFER, FakeTriton, infer_request

MiB = 1 << 20
PROTOCOL_ERROR = 1


def split_head(stream: int, whole: bytes) -> bytes:
    """HEADERS, and CONTINUATION where one frame can't hold it."""
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    last = len(pieces) - 1
    return b"".join(
        frame(CONTINUATION if number else HEADERS, END_HEADERS if number == last else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )


@dataclass(frozen=True)
class Front:
    """A served path that takes `body`."""

    served: Served
    path: bytes
    body: bytes
    executions: Callable[[], int]

    def good(self, stream: int, *extra: Pair) -> bytes:
        return request(self.path, self.body, *extra, stream=stream)

    def on(self, *fields: Pair, stream: int, body: bytes | None = None) -> bytes:
        """A request of exactly these fields, and the good message."""
        whole = message(self.body) if body is None else body
        return split_head(stream, block(fields)) + data(stream, whole, END_STREAM)


@pytest.fixture(params=["callback", "servicer", "gateway"])
def front(request: pytest.FixtureRequest, triton: FakeTriton) -> Front:
    if request.param == "gateway":
        return Front(request.getfixturevalue("product"), INFER, infer_request(), lambda: triton.executions)
    echo = request.getfixturevalue("echo")
    path = FAST if request.param == "callback" else b"/inference.GRPCInferenceService/ServerLive"
    return Front(echo, path, b"\x08\x01", lambda: int(echo.stats()["executions"]))


Send = Callable[[Front, int], bytes]


class Want(NamedTuple):
    """Of the answer; None is whatever."""

    http: str | None = None
    status: str | None = None
    reset: int | None = None
    text: str = ""

    def is_met_by(self, answer: Answer) -> bool:
        return (
            self.http in (None, answer.http)
            and self.status in (None, answer.status)
            and self.text in answer.text
            and (answer.reset == self.reset if self.reset is not None else answer.ended)
        )


OK, INTERNAL, UNIMPLEMENTED, EXHAUSTED, DEADLINE = (Want("200", code) for code in ("0", "13", "12", "8", "4"))
BROKEN = Want(reset=PROTOCOL_ERROR)
GRPC = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))


def pseudo(front: Front, method: bytes = b"POST", path: bytes | None = None) -> tuple[Pair, ...]:
    path = front.path if path is None else path
    return (b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"test")


def with_type(*fields: Pair) -> Send:
    return lambda front, stream: front.on(*pseudo(front), *fields, stream=stream)


def with_method(method: bytes) -> Send:
    return lambda front, stream: front.on(*pseudo(front, method), *GRPC, stream=stream)


def with_path(change: Callable[[bytes], bytes]) -> Send:
    return lambda front, stream: front.on(*pseudo(front, path=change(front.path)), *GRPC, stream=stream)


def with_fields(*extra: Pair, body: bytes | None = None) -> Send:
    return lambda front, stream: front.on(*pseudo(front), *GRPC, *extra, stream=stream, body=body)


def with_body(change: Callable[[bytes], bytes]) -> Send:
    """change: of the whole body, prefix included."""
    return lambda front, stream: front.on(*pseudo(front), *GRPC, stream=stream, body=change(message(front.body)))


def timeout(value: bytes) -> Send:
    return with_fields((b"grpc-timeout", value))


TE = (b"te", b"trailers")
FOUR_GIB = b"\0" + u32((1 << 32) - 1)

ROWS: dict[str, tuple[Send, Want]] = {
    "no content-type": (with_type(TE), Want("415")),
    "content-type json": (with_type(TE, (b"content-type", b"application/json")), Want("415")),
    "content-type grpcfoo": (with_type(TE, (b"content-type", b"application/grpcfoo")), Want("415")),
    "content-type +proto": (with_type(TE, (b"content-type", b"application/grpc+proto")), OK),
    "GET": (with_method(b"GET"), Want("405")),
    "PUT": (with_method(b"PUT"), Want("405")),
    "no te": (with_type((b"content-type", b"application/grpc")), OK),
    "te gzip": (with_type((b"te", b"gzip"), GRPC[1]), BROKEN),
    "unknown method": (with_path(lambda path: path + b"x"), UNIMPLEMENTED),
    "unknown service": (with_path(lambda path: b"/x" + path[1:]), UNIMPLEMENTED),
    "path //": (with_path(lambda path: b"/" + path), UNIMPLEMENTED),
    "path ..": (with_path(lambda path: b"/x/.." + path), UNIMPLEMENTED),
    "path %2e": (with_path(lambda path: path.replace(b".", b"%2e")), UNIMPLEMENTED),
    "path in another case": (with_path(bytes.lower), UNIMPLEMENTED),
    "path with a query": (with_path(lambda path: path + b"?x"), UNIMPLEMENTED),
    "timeout negative": (timeout(b"-1S"), INTERNAL),
    "timeout without a unit": (timeout(b"10"), INTERNAL),
    "timeout in letters": (timeout(b"abc"), INTERNAL),
    "timeout empty": (timeout(b""), INTERNAL),
    "timeout of nine digits": (timeout(b"123456789n"), INTERNAL),
    "timeout of other digits": (timeout("١S".encode()), INTERNAL),
    "timeout 0": (timeout(b"0n"), DEADLINE),
    "flag 1 without an encoding": (with_body(lambda body: b"\1" + body[1:]), INTERNAL),
    "flag 2": (with_body(lambda body: b"\2" + body[1:]), INTERNAL),
    "flag 255": (with_body(lambda body: b"\xff" + body[1:]), INTERNAL),
    "no message": (with_body(lambda body: b""), INTERNAL),
    "half a prefix": (with_body(lambda body: body[:3]), INTERNAL),
    "half a message": (with_body(lambda body: body[:-1]), INTERNAL),
    "two messages": (with_body(lambda body: body * 2), UNIMPLEMENTED),
    "a message and a bit": (with_body(lambda body: body + b"x"), UNIMPLEMENTED),
    "4 GiB declared": (with_body(lambda body: FOUR_GIB), EXHAUSTED._replace(text="4294967295")),
    "a -bin that is not base64": (with_fields((b"x-bin", b"!!!")), INTERNAL),
    "a -bin of impossible length": (with_fields((b"x-bin", b"abcde")), INTERNAL),
    "control character": (with_fields((b"x-a", b"\x01")), BROKEN),
    "DEL": (with_fields((b"x-a", b"a\x7fb")), BROKEN),
    "not ASCII": (with_fields((b"x-a", "ä".encode())), OK),  # as Triton has it
    "CR LF": (with_fields((b"x-a", b"a\r\nb: c")), BROKEN),
    "NUL": (with_fields((b"x-a", b"a\0b")), BROKEN),
    "name in uppercase": (with_fields((b"X-a", b"b")), BROKEN),
    "name with a space": (with_fields((b"x a", b"b")), BROKEN),
    "name of nothing": (with_fields((b"", b"b")), BROKEN),
    "connection": (with_fields((b"connection", b"close")), BROKEN),
    "transfer-encoding": (with_fields((b"transfer-encoding", b"chunked")), BROKEN),
    "another host": (with_fields((b"host", b"other")), Want("400")),
    "two content-length": (with_fields((b"content-length", b"1"), (b"content-length", b"2")), BROKEN),
    "headers of 20 KB": (with_fields((b"x-a", b"v" * 15_000), (b"x-b", b"v" * 5000)), EXHAUSTED),
    "200 fields": (with_fields(*((b"x-%d" % n, b"v") for n in range(200))), EXHAUSTED),
    "trailers with a bad name": (
        lambda front, stream: (
            head(front.path, stream=stream)
            + data(stream, message(front.body))
            + headers(stream, literal(b"X", b""), END_HEADERS | END_STREAM)
        ),
        BROKEN,
    ),
}
GOOD = {"content-type +proto", "no te", "not ASCII"}


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_request_gets_its_answer_and_nobody_else_notices(row: str, front: Front) -> None:
    send, want = ROWS[row]
    before = front.executions()
    with front.served.connect() as peer:
        open_neighbour(peer, front, 1)
        for stream in range(3, 13, 2):
            peer.send(send(front, stream))
            answer = peer.answer(stream)
            assert want.is_met_by(answer), answer
        finish_neighbour(peer, front, 1)
        assert not peer.closed
        assert peer.goaway is None
    executed = front.executions() - before
    assert executed == 1 + (5 if row in GOOD else 0)


def open_neighbour(peer: Peer, front: Front, stream: int) -> None:
    """A call on the same connection that is under way: half of its message is here."""
    peer.send(head(front.path, stream=stream) + data(stream, message(front.body)[:-1]))


def finish_neighbour(peer: Peer, front: Front, stream: int) -> None:
    peer.send(data(stream, message(front.body)[-1:], END_STREAM))
    assert OK.is_met_by(peer.answer(stream))


def test_all_of_it_mixed_leaves_honest_callers_alone(front: Front) -> None:
    """Each row twenty times, in random order, on connections that live as long as they are let."""
    order = [send for send, _ in ROWS.values()] * 20
    random.Random(7).shuffle(order)
    before = front.executions()
    with Honest(front.served.port, front.path, front.body) as honest:
        for at in range(0, len(order), 50):
            with front.served.connect() as peer:
                streams = range(1, 101, 2)
                for stream, send in zip(streams, order[at : at + 50], strict=False):
                    peer.send(send(front, stream))
                assert all(peer.answer(stream).over for stream, _ in zip(streams, order[at : at + 50], strict=False))
    assert honest.held()
    assert front.executions() - before == len(honest.seconds) + 20 * len(GOOD)


# What a refused head leaves behind


def test_after_a_refused_head_the_table_is_right_and_a_hundred_calls_succeed(front: Front) -> None:
    """The head that is too large puts a field in the table; a later head refers to it."""
    large = block((*pseudo(front), *GRPC, (b"x-a", b"v" * 15_000), (b"x-b", b"v" * 5000)))
    entry = literal(b"grpc-timeout", b"0n", kind=0x40)
    with front.served.connect() as peer:
        peer.send(split_head(1, large + entry) + data(1, message(front.body), END_STREAM))
        assert EXHAUSTED.is_met_by(peer.answer(1))
        newest = integer(0x80, 7, 62)
        peer.send(headers(3, block((*pseudo(front), *GRPC)) + newest) + data(3, message(front.body), END_STREAM))
        assert DEADLINE.is_met_by(peer.answer(3))
        for stream in range(5, 205, 2):
            peer.send(front.good(stream))
            assert OK.is_met_by(peer.answer(stream))


# Sizes


@pytest.mark.parametrize(("size", "want"), [(4 * MiB - 1, OK), (4 * MiB, OK), (4 * MiB + 1, EXHAUSTED)])
def test_a_message_is_judged_by_its_prefix_alone(size: int, want: Want) -> None:
    """Over the limit, the answer comes when five bytes are there, and names the limit."""
    with target(limits={"message_bytes": 4 * MiB}) as served, served.connect() as peer:
        peer.send(head(FAST) + data(1, b"\0" + u32(size)))
        if want is EXHAUSTED:
            assert EXHAUSTED._replace(text=str(4 * MiB)).is_met_by(peer.answer(1))
            return
        body = bytes(size)
        peer.send(b"".join(data(1, body[at : at + 16_384]) for at in range(0, 240 * 1024, 16_384)))
        peer.wait(lambda: peer.answers.get(1, Answer()).over, 0.3)
        assert 1 not in peer.answers or not peer.answers[1].over


def test_declared_bytes_that_never_come_take_no_memory(echo: Served) -> None:
    before = echo.memory
    with echo.connect() as peer:
        for stream in range(1, 201, 2):
            peer.send(head(FAST, stream=stream) + data(stream, b"\0" + u32(256 * MiB) + b"x"))
        assert OK.is_met_by(echo.ask(FAST, b"x"))
        assert echo.memory - before < 4 * MiB


def _bombs() -> Iterable[tuple[str, bytes, Want]]:
    plain = bytes(64 * MiB)
    bomb = gzip.compress(plain, 9)
    yield "gzip bomb", bomb, EXHAUSTED
    yield "deflate bomb", zlib.compress(plain, 9), EXHAUSTED
    yield "gzip with junk behind", gzip.compress(b"\x08\x01") + b"junk", INTERNAL
    yield "gzip cut short", gzip.compress(b"\x08\x01" * 100)[:-9], INTERNAL
    yield "not gzip", b"\x08\x01", INTERNAL


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    with target(limits={"message_bytes": 4 * MiB}) as served:
        yield served


@pytest.mark.parametrize(("name", "body", "want"), [pytest.param(*row, id=row[0]) for row in _bombs()])
def test_compressed_messages_are_bounded_while_they_are_inflated(
    name: str, body: bytes, want: Want, small: Served, product: Served
) -> None:
    """Up to what a message may have, however well it is compressed; ServerLive's may have little."""
    encoding = (b"grpc-encoding", b"deflate" if name.startswith("deflate") else b"gzip")
    path = b"/inference.GRPCInferenceService/ServerLive"
    for served in (small, product):
        memory, cpu = served.memory, served.cpu
        with served.connect() as peer, Honest(served.port, path, b"") as honest:
            for stream in range(1, 21, 2):
                peer.send(head(path, encoding, stream=stream) + split_body(stream, message(body, 1)))
                assert want.is_met_by(peer.answer(stream))
        assert honest.held()
        assert served.memory - memory < 32 * MiB  # twice the limit of 4 MiB, and what malloc keeps of two threads
        assert served.cpu - cpu < (10 * 0.05 + 0.2) * slowness()


def split_body(stream: int, whole: bytes) -> bytes:
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    return b"".join(data(stream, piece) for piece in pieces[:-1]) + data(stream, pieces[-1], END_STREAM)


def test_an_encoding_that_must_be_read_and_is_unknown_is_unimplemented(echo: Served, product: Served) -> None:
    field = (b"grpc-encoding", b"brotli")
    for served, path in ((echo, b"/inference.GRPCInferenceService/ServerLive"), (product, INFER)):
        with served.connect() as peer:
            peer.send(head(path, field) + data(1, message(b"\x08\x01", 1), END_STREAM))
            answer = peer.answer(1)
            assert UNIMPLEMENTED.is_met_by(answer)
            assert "gzip" in answer.heads[0]["grpc-accept-encoding"]
