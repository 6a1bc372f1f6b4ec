"""Messages that are collected whole are paid from a budget, of the connection and of the process."""

from __future__ import annotations

import gzip

import pytest
from h2_peers import REQUEST, ServerUnderTest, message
from hypothesis import given
from hypothesis import strategies as st

from gateway.status import Code
from gateway.wire.budget import SMALL_MESSAGE, Budget
from gateway.wire.codes import CallFailed
from gateway.wire.limits import KiB, Limits, MiB
from gateway.wire.server import ServerCall

LIMITS = Limits(collected_bytes=1 * MiB)


def streaming(call: ServerCall) -> None:
    call.streaming = True
    call.on_message = lambda body, compressed: call.reply(body)


def unary(call: ServerCall) -> None:
    call.on_request = lambda done: done.reply(b"%d" % len(done.body))


def send(server: ServerUnderTest, stream: int, whole: bytes, *, end: bool = True) -> None:
    """In frames, as long as there is no answer."""
    for at in range(0, len(whole), 16_384):
        if server.answers[stream].status is None:
            piece = whole[at : at + 16_384]
            server.h2.send_data(stream, piece, end_stream=end and at + len(piece) == len(whole))
            server.pump()


@pytest.mark.parametrize("accept", [unary, streaming], ids=["unary", "stream"])
def test_unfinished_messages_of_a_connection_are_refused_beyond_its_budget(accept: object) -> None:
    server = ServerUnderTest(accept, LIMITS)  # type: ignore[arg-type]
    streams = [server.open() for _ in range(24)]
    for stream in streams:
        send(server, stream, message(bytes(100 * KiB))[:-1], end=False)
    statuses = [server.answers[stream].status for stream in streams]
    assert statuses.count(None) == 10  # 10 × 100 KiB fit in 1 MiB
    assert set(statuses) == {None, str(Code.RESOURCE_EXHAUSTED.value)}
    assert "collected_bytes" in (server.answers[streams[-1]].text or "")
    assert server.connection.budget.held <= 1 * MiB
    for stream in streams:
        if server.answers[stream].status is None:
            server.h2.reset_stream(stream)
    server.pump()
    assert server.connection.budget.held == 0


def test_what_fits_is_whole_and_paid_back() -> None:
    server = ServerUnderTest(unary, LIMITS)
    for _ in range(5):
        stream = server.open()
        send(server, stream, message(bytes(900 * KiB)))
        assert server.answers[stream].body == message(b"%d" % (900 * KiB))
        assert server.connection.budget.held == 0


@pytest.mark.parametrize("end", ["answer", "reset", "close", "failure"])
def test_whatever_ends_a_call_pays_back(end: str) -> None:
    held: list[ServerCall] = []

    def accept(call: ServerCall) -> None:
        held.append(call)
        call.on_request = lambda done: None

    server = ServerUnderTest(accept, LIMITS)
    stream = server.open()
    server.h2.send_data(stream, message(bytes(10_000)), end_stream=True)
    server.pump()
    assert server.connection.budget.held == 10_000
    if end == "answer":
        held[0].reply(b"")
    elif end == "failure":
        held[0].fail(Code.INTERNAL, "")
    elif end == "reset":
        server.h2.reset_stream(stream)
    else:
        server.connection.close("lost")
    server.pump()
    assert server.connection.budget.held == 0


def test_what_compressed_messages_become_counts() -> None:
    server = ServerUnderTest(unary, LIMITS)
    fields = [*REQUEST, ("grpc-encoding", "gzip")]
    answer = server.call(fields=fields, raw=message(gzip.compress(bytes(2 * MiB)), 1))
    assert answer.status == str(Code.RESOURCE_EXHAUSTED.value)
    assert server.connection.budget.held == 0
    assert server.call(fields=fields, raw=message(gzip.compress(bytes(MiB // 2)), 1)).status == "0"


def test_a_method_may_have_small_messages_only() -> None:
    def accept(call: ServerCall) -> None:
        call.most_bytes = 1000
        unary(call)

    server = ServerUnderTest(accept)
    assert server.call(bytes(1000)).status == "0"
    stream = server.open()
    server.h2.send_data(stream, message(bytes(1001))[:5])  # from the prefix alone
    server.pump()
    assert server.answers[stream].status == str(Code.RESOURCE_EXHAUSTED.value)
    bomb = message(gzip.compress(bytes(1001)), 1)
    assert server.call(fields=[*REQUEST, ("grpc-encoding", "gzip")], raw=bomb).status == "8"


@given(cuts=st.lists(st.integers(1, 300), max_size=40), eager=st.booleans())
def test_messages_are_the_same_however_they_are_cut(cuts: list[int], eager: bool) -> None:
    got: list[bytes] = []

    def accept(call: ServerCall) -> None:
        call.streaming = True

        def taken(body: bytes, compressed: bool) -> None:
            got.append(body)
            call.hungry = eager

        call.on_message = taken

    server = ServerUnderTest(accept, Limits(collected_bytes=2000))
    sent = [bytes([n % 256]) * n for n in (0, 1, 200, 0, 0, 1500, 7, 300)]
    whole = b"".join(map(message, sent))
    stream = server.open()
    at = 0
    for cut in [*cuts, len(whole)]:
        if whole[at : at + cut]:
            server.h2.send_data(stream, whole[at : at + cut])
            server.pump()
        at += cut
    for _ in sent:
        server.calls[0].feed()
        server.pump()
    assert got == sent
    assert server.connection.budget.held == 0


# The budget itself


LARGE = SMALL_MESSAGE + 1


def test_a_budget_holds_up_to_its_limit_and_not_more() -> None:
    budget = Budget(100, "some_bytes")
    budget.take(100, LARGE)
    with pytest.raises(CallFailed, match="some_bytes") as refusal:
        budget.take(1, LARGE)
    assert refusal.value.code is Code.RESOURCE_EXHAUSTED
    budget.give(1)
    budget.take(1, LARGE)
    assert budget.held == 100


def test_a_connection_that_may_have_more_is_still_bounded_by_the_process() -> None:
    process = Budget(1000, "process")
    first, second = (Budget(800, "connection", process) for _ in range(2))
    first.take(700, LARGE)
    with pytest.raises(CallFailed, match="process"):
        second.take(700, LARGE)
    assert (first.held, second.held, process.held) == (700, 0, 700)
    first.give(700)
    second.take(700, LARGE)


def test_large_messages_leave_room_for_small_ones() -> None:
    process = Budget(800, "process")
    process.take(800, LARGE)
    with pytest.raises(CallFailed):
        process.take(1, LARGE)
    process.take(100, SMALL_MESSAGE)
    with pytest.raises(CallFailed):
        process.take(1, SMALL_MESSAGE)
