"""An answer that is sent from memory of others gives that back, and one that many have in common is not copied."""

from __future__ import annotations

import tracemalloc
import weakref

import numpy as np
import pytest
from h2_peers import ServerUnderTest, message

from gateway.http2.limits import MiB
from gateway.rpc.connection import TURN
from gateway.rpc.server import ServerCall
from gateway.status import Code

SIZE = 1 * MiB
LENT = bytes(index % 251 for index in range(SIZE))


def lend(call: ServerCall) -> weakref.ref[object]:
    """Answer a call from memory that is lent; tells when nobody has a part of it any more."""
    array = np.frombuffer(bytearray(LENT), np.uint8)
    call.keep_until_closed(SIZE)
    call.send_headers()
    call.send_front(b"", SIZE)
    call.send_chunk(array.data)
    call.finish(Code.OK)
    return weakref.ref(array)


@pytest.mark.parametrize("full", [False, True], ids=["its window is used up", "the socket takes nothing"])
def test_what_a_slow_peer_has_not_taken_after_two_seconds_is_copied(full: bool) -> None:
    lent: list[weakref.ref[object]] = []

    def accept(call: ServerCall) -> None:
        call.on_request = lambda done: lent.append(lend(done))

    server = ServerUnderTest(accept)
    server.auto_window = False
    answer = server.call()
    assert len(answer.body) == 65_535
    server.connection.full = full
    server.tick(1)
    assert lent[0]() is not None
    server.tick(1)
    assert lent[0]() is None
    assert server.connection.budget.kept == SIZE
    server.connection.full = False
    (stream,) = server.connection.streams
    server.h2.increment_flow_control_window(SIZE)
    server.h2.increment_flow_control_window(SIZE, stream)
    server.pump()
    assert answer.body == message(LENT)
    assert server.connection.budget.kept == 0


def test_an_answer_that_many_are_slow_to_take_stays_one_answer() -> None:
    server = ServerUnderTest(lambda call: setattr(call, "on_request", lambda done: done.reply(LENT)))
    server.auto_window = False
    server.h2.increment_flow_control_window(MiB)
    for _ in range(10):
        server.call()
    tracemalloc.start()
    server.tick(3)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(call.unsent > 0 for call in server.connection.streams.values()) == 10
    assert grown < SIZE


def test_a_call_that_has_not_heard_yet_that_its_connection_has_closed_sends_nothing_more() -> None:
    server = ServerUnderTest(lambda call: None)
    for number in range(TURN + 1):
        server.h2.send_data(server.open(), message(b"hello"), end_stream=True)
        if number == TURN // 2:
            server.pump()
    server.pump()
    server.connection.turn_left = TURN
    server.connection.close("the socket is lost")
    (last,) = [call for call in server.calls if not call.done]
    lent = lend(last)
    assert lent() is None
    server.connection.advance()
    assert server.connection.budget.kept == 0
