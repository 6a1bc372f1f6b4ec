"""The engine is held to the table of stream states (RFC 9113 section 5.1): every input, every state, both roles."""

from __future__ import annotations

import re

import pytest

from gateway.http2.engine import Engine, client_engine, server_engine
from gateway.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    EndedBy,
    EngineError,
    ErrorCode,
    StreamClosed,
    frame,
)
from gateway.http2.limits import Limits
from gateway.http2.states import (
    AWAITING,
    AWAITING_HALF_CLOSED,
    BODY,
    BODY_END,
    CLOSED,
    HALF_CLOSED_LOCAL,
    HALF_CLOSED_REMOTE,
    HEAD,
    HEAD_END,
    INPUTS,
    NEXT,
    OPEN,
    RESET,
    STATES,
    TRAILERS,
    fault_text,
)

REQUEST = b"\x83\x86\x84\x01\x01a"
RESPONSE = b"\x88"
LAST = b"\x00\x01x\x01y"
FIELDS = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")]

SENDS = {  # what the peer sends, by what it is to the table
    HEAD: lambda head: frame(HEADERS, END_HEADERS, 1, head),
    HEAD_END: lambda head: frame(HEADERS, END_HEADERS | END_STREAM, 1, head),
    BODY: lambda head: frame(DATA, 0, 1, b"x"),
    BODY_END: lambda head: frame(DATA, END_STREAM, 1, b"x"),
    TRAILERS: lambda head: frame(HEADERS, END_HEADERS | END_STREAM, 1, LAST),
    RESET: lambda head: frame(RST_STREAM, 0, 1, bytes(4)),
}


def client_in(state: int) -> Engine:
    engine = client_engine(Limits())
    engine.receive_data(frame(SETTINGS, 0, 0))
    engine.send_request(FIELDS, end_stream=state in (AWAITING_HALF_CLOSED, HALF_CLOSED_LOCAL))
    if state in (OPEN, HALF_CLOSED_LOCAL):
        engine.receive_data(frame(HEADERS, END_HEADERS, 1, RESPONSE))
    return engine


def server_in(state: int) -> Engine:
    engine = server_engine(Limits())
    ended = END_STREAM if state == HALF_CLOSED_REMOTE else 0
    engine.receive_data(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS | ended, 1, REQUEST))
    if state == HALF_CLOSED_LOCAL:
        engine.send_response(1, [(b":status", b"200")], end_stream=True)
    return engine


CASES = [
    *(("client", state, what) for state in (AWAITING, AWAITING_HALF_CLOSED, OPEN, HALF_CLOSED_LOCAL) for what in SENDS),
    *(("server", state, what) for state in (OPEN, HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE) for what in SENDS),
]


@pytest.mark.parametrize(
    ("role", "state", "what"), CASES, ids=[f"{role}: {fault_text(state, what)}" for role, state, what in CASES]
)
def test_only_what_the_table_has_is_taken(role: str, state: int, what: int) -> None:
    engine = (client_in if role == "client" else server_in)(state)
    assert engine._streams[1].state == state
    engine.events()
    expected = NEXT.get(state + what, -1)
    if what == TRAILERS and state in (AWAITING, AWAITING_HALF_CLOSED):
        expected = -1  # a header list without a status is no head
    data = SENDS[what](RESPONSE if role == "client" else REQUEST)
    if (role, state) == ("server", HALF_CLOSED_REMOTE) and expected < 0:  # where the peer must know better
        shown = fault_text(state, HEAD_END if what == TRAILERS else what)
        with pytest.raises(EngineError, match=re.escape(shown)) as raised:
            engine.receive_data(data)
        assert raised.value.code is ErrorCode.STREAM_CLOSED
        return
    engine.receive_data(data)
    ends = [event for event in engine.events() if isinstance(event, StreamClosed)]
    if expected < 0:
        assert [event.by for event in ends] == [EndedBy.FAULT]
    elif expected == CLOSED or (
        role == "client" and expected == HALF_CLOSED_REMOTE
    ):  # nobody waits for the rest of a request
        assert [event.by for event in ends] == [EndedBy.PEER if what == RESET else EndedBy.BOTH]
        assert 1 not in engine._streams
    else:
        assert ends == []
        assert engine._streams[1].state == expected


def test_the_table_has_names_for_all_and_ways_out_of_all() -> None:
    for key, after in NEXT.items():
        assert key & 0xF0 in STATES
        assert key & 0x0F in INPUTS
        assert after in STATES
    for state in STATES:
        assert state == CLOSED or NEXT[state + RESET] == CLOSED
    assert not any(key & 0xF0 == CLOSED for key in NEXT)
    assert all((state + BODY in NEXT) == (state < AWAITING) for state in STATES)
    peers = (HEAD, HEAD_END, BODY, BODY_END, TRAILERS)
    assert all(any(state + what in NEXT for what in peers) == (state < HALF_CLOSED_REMOTE) for state in STATES)
