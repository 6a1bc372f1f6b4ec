"""A call whose server may read memory of ours runs to its end upstream, and says when that memory is free."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from typing import Any

import h2.events
import pytest
from h2_peers import ClientUnderTest, message
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http2.limits import Limits
from gateway.rpc.client import ClientCall
from gateway.rpc.connection import INFLATED_AT_ONCE
from gateway.status import Code, is_tritons_own

OK = ("grpc-status", "0")


class Client(ClientUnderTest):
    def __init__(self) -> None:
        super().__init__(Limits(stream_window=65_535), most_discarded=100)
        self.told: list[bool] = []
        self.ends: list[Code] = []

    def begin(self, **kw: float) -> ClientCall:
        call = ClientCall(b"/test.Service/Echo", (), self.deadlines, kw.get("deadline"), self.now)
        call.request = b"hello"
        call.on_done = lambda done: self.ends.append(done.code)
        call.keep_for_server(self.told.append, is_tritons_own)
        self.connection.start(call)
        self.pump()
        return call

    @property
    def resets(self) -> int:
        return sum(isinstance(event, h2.events.StreamReset) for event in self.events)

    def answer(self, call: ClientCall, body: bytes = b"world") -> None:
        self.respond(call)
        self.h2.send_data(call.id, message(body))
        self.finish(call, OK)


def test_an_answer_frees_it_after_the_call_has_its_answer() -> None:
    client = Client()
    call = client.begin()
    client.respond(call)
    client.h2.send_data(call.id, message(b"world"))
    client.pump()
    assert not client.told
    client.finish(call, OK)
    assert (client.ends, client.told, call.body) == ([Code.OK], [True], b"world")


def test_its_deadline_ends_it_here_and_is_no_affair_of_the_servers() -> None:
    client = Client()
    call = client.begin(deadline=client.now + 1)
    client.deadlines.expire(client.now + 2)
    client.deadlines.expire(client.now + 200)
    client.pump()
    (request,) = [event for event in client.events if isinstance(event, h2.events.RequestReceived)]
    assert b"grpc-timeout" not in dict(request.headers)
    assert (client.ends, client.told, client.resets) == ([Code.DEADLINE_EXCEEDED], [], 0)
    client.answer(call)
    assert (client.ends, client.told, client.resets) == ([Code.DEADLINE_EXCEEDED], [True], 0)
    assert client.connection.streams == {}


def test_a_call_that_is_given_up_runs_out_unheard_however_large_its_answer_is() -> None:
    client = Client()
    call = client.begin()
    call.cancel()
    client.respond(call)
    body = message(bytes(300_000))
    for at in range(0, len(body), 16_384):
        client.h2.send_data(call.id, body[at : at + 16_384])
        client.pump()
    assert not client.told
    client.finish(call, OK)
    assert (client.ends, client.told, call.body) == ([Code.CANCELLED], [True], b"")


def reset(client: Client, call: ClientCall) -> None:
    client.h2.reset_stream(call.id, 8)


def close(client: Client, call: ClientCall) -> None:
    client.connection.close("the server died")


CORE = b"\0\0\x06\x04\0\0\0\0\0" + b"\xfe\x03\0\0\0\x01"  # a SETTINGS frame, which h2 sends without the higher byte


def status(code: int, text: str = "", core: bool = False) -> Callable[[Client, ClientCall], None]:
    """core: is the peer made with gRPC's C core, as it says?"""

    def end(client: Client, call: ClientCall) -> None:
        if core:
            client.connection.receive(CORE, client.now)
        client.respond(call, ("grpc-status", str(code)), ("grpc-message", text), end=True)

    return end


def page(client: Client, call: ClientCall) -> None:
    client.respond(call, status="504", end=True)


def garbage(client: Client, call: ClientCall) -> None:
    client.respond(call)
    client.h2.send_data(call.id, b"\xff" * 10)


@pytest.mark.parametrize("is_given_up", [False, True])
@pytest.mark.parametrize(
    ("end", "is_known"),
    [
        (status(0), True),
        (status(3), True),
        (status(13, core=True), True),
        (status(13), False),  # a proxy may have made it
        (status(14, "Exceeds maximum queue size"), True),
        (status(14, "upstream connect error or disconnect/reset before headers"), False),
        (status(14, "failed to connect to all addresses", core=True), False),  # a proxy that is made with it, too
        (status(2, core=True), False),
        (status(4), False),  # its gRPC library, or a proxy, made this of time that had passed
        (status(1), False),
        (reset, False),
        (page, False),
        (close, False),
    ],
    ids=[
        *("ok", "refused", "failed", "failed, says somebody", "full", "unavailable", "unavailable, says gRPC"),
        *("unknown", "late", "cancelled", "reset", "a proxy's page", "closed"),
    ],
)
def test_only_the_servers_own_word_frees_it(
    end: Callable[[Client, ClientCall], None], is_known: bool, is_given_up: bool
) -> None:
    client = Client()
    call = client.begin()
    if is_given_up:
        call.cancel()
    end(client, call)
    client.pump()
    assert client.told == [is_known]
    assert len(client.ends) == 1


def test_an_answer_that_can_t_be_read_frees_nothing() -> None:
    client = Client()
    garbage(client, client.begin())
    client.pump()
    assert client.told == [False]


LARGE = random.Random(1).randbytes(2 * INFLATED_AT_ONCE)


def begun_to_inflate(client: Client) -> tuple[ClientCall, list[Callable[[], None]]]:
    """A call whose large answer is compressed and here, and the step that is left on another thread."""
    steps: list[Callable[[], None]] = []

    def elsewhere(inflater: Any, then: Callable[[Any], None]) -> None:
        steps.append(lambda: then(inflater.step(1 << 30) and None))

    client.connection.elsewhere = elsewhere
    call = client.begin()
    client.respond(call, ("grpc-encoding", "gzip"))
    body = message(gzip.compress(LARGE), 1)
    for at in range(0, len(body), 16_384):
        client.h2.send_data(call.id, body[at : at + 16_384])
        client.pump()
    client.finish(call, OK)
    client.pump()
    assert (len(steps), client.ends) == (1, [])
    return call, steps


def test_an_answer_that_is_inflated_on_another_thread_frees_it() -> None:
    client = Client()
    call, (step,) = begun_to_inflate(client)
    step()
    client.connection.advance()
    assert (client.ends, client.told, call.body == LARGE) == ([Code.OK], [True], True)


def test_a_call_that_is_given_up_while_its_answer_is_inflated_frees_it() -> None:
    """And it is none that is left to finish: its server has finished it."""
    client = Client()
    call, (step,) = begun_to_inflate(client)
    call.cancel()
    step()
    client.connection.advance()
    assert (client.ends, client.told) == ([Code.CANCELLED], [True])
    assert client.connection.discarded == 0


def test_an_answer_that_is_too_large_frees_it() -> None:
    """It has been made, so its server reads nothing any more: it must not cost others the memory."""
    client = Client()
    call = client.begin()
    client.respond(call)
    client.h2.send_data(call.id, b"\0\xff\xff\xff\xff")
    client.pump()
    assert (client.ends, client.told) == ([Code.RESOURCE_EXHAUSTED], [True])


def test_a_call_that_was_never_sent_frees_it_at_once() -> None:
    client = Client()
    call = ClientCall(b"/test.Service/Echo", (), client.deadlines, None, client.now)
    call.keep_for_server(client.told.append, is_tritons_own)
    call.cancel()
    assert client.told == [True]


def test_a_call_that_the_server_did_not_look_at_keeps_it_for_the_next_try() -> None:
    client, tries = Client(), list[ClientCall]()
    call = client.begin()
    call.on_unprocessed = lambda again: (tries.append(again), again.rewind(), True)[2]
    client.h2.reset_stream(call.id, 7)
    client.pump()
    assert (tries, client.told, client.ends) == ([call], [], [])
    client.connection.start(call)
    client.pump()
    client.answer(call)
    assert (client.told, client.ends) == ([True], [Code.OK])


def test_a_call_that_no_server_looked_at_frees_it() -> None:
    client = Client()
    call = client.begin()
    client.h2.reset_stream(call.id, 7)
    client.pump()
    assert client.told == [True]


@given(steps=st.lists(st.sampled_from(["cancel", "late", "head", "data", "end", "reset", "close"]), max_size=7))
@settings(deadline=None, max_examples=200)
def test_whatever_happens_it_is_told_once_and_true_only_after_the_servers_end(steps: list[str]) -> None:
    client = Client()
    call = client.begin(deadline=client.now + 10)
    stream, head, data, ended, is_open = call.id, False, False, False, True
    for step in steps:
        if step == "cancel":
            call.cancel()
        elif step == "late":
            client.deadlines.expire(client.now + 1000)
        elif step == "close":
            client.connection.close("gone")
            is_open = False
        elif is_open and step == "head" and not head:
            client.h2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
            head = True
        elif is_open and step == "data" and head and not data:
            client.h2.send_data(stream, message(b"x"))
            data = True
        elif is_open and step == "end" and head:
            client.h2.send_headers(stream, [OK], end_stream=True)
            ended, is_open = True, False
        elif is_open and step == "reset":
            client.h2.reset_stream(stream, 2)
            is_open = False
        client.pump()
    assert client.told in ([[True]] if ended else [[], [False]])
    client.connection.close("end of test")
    assert len(client.told) == 1
    assert len(client.ends) == 1
