"""What a caller's own deadline says of the endpoint that had the call when it passed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_call import ANSWER, World
from test_pauses import with_peer

from gateway.forwarding.call import Call
from gateway.rpc.client import ClientCall
from gateway.status import Code, Origin
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool

USUAL = 0.02  # seconds


class Timed(World):
    """Two endpoints, which take `USUAL` for the model."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.inference.clock = lambda: self.now
        self.both = (self.endpoint, with_peer(self))
        pools = {"u": Pool("u", self.both, clock=self.inference.clock)}
        self.inference.current.now = replace(self.inference.current.now, pools=pools)
        for _ in range(20):
            self.begin()
            self.pass_time(USUAL)
            self.last.body = ANSWER
            self.last.end(Code.OK, "", Origin.SERVER)

    @property
    def last(self) -> ClientCall:
        return self.connection.sent[-1]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def begin_at(self, wanted: Endpoint) -> Call:
        """A call at this endpoint: others, which go to the other one by chance, are answered."""
        while True:
            call = self.begin()
            if wanted.in_flight:
                return call
            self.pass_time(USUAL)
            self.last.body = ANSWER
            self.last.end(Code.OK, "", Origin.SERVER)


@pytest.mark.parametrize("patience", [0.0, 0.001, USUAL])
def test_a_caller_who_gives_too_little_time_says_nothing_of_a_server(patience: float) -> None:
    """However unlucky one endpoint is with such callers."""
    world = Timed()
    for _ in range(300):
        call = world.begin_at(world.endpoint)
        world.pass_time(patience)
        call.cancelled(Code.DEADLINE_EXCEEDED)
    assert not world.endpoint.has_ejections


def test_a_server_that_hangs_is_left_alone_by_the_deadlines_that_pass_there() -> None:
    world = Timed()
    calls = 0
    while not world.endpoint.has_ejections:
        call = world.begin_at(world.endpoint)
        world.pass_time(10 * USUAL)
        call.cancelled(Code.DEADLINE_EXCEEDED)
        calls += 1
        assert calls < 40
    assert not world.both[1].has_ejections


def test_who_goes_away_says_nothing_of_a_server() -> None:
    world = Timed()
    for _ in range(300):
        call = world.begin_at(world.endpoint)
        world.pass_time(10 * USUAL)
        call.cancelled(Code.CANCELLED)
    assert not world.endpoint.has_ejections


def test_a_deadline_that_passes_while_a_request_is_sent_says_nothing_of_a_server() -> None:
    """How long that takes is its caller's affair."""
    world = Timed()
    for _ in range(300):
        call = world.begin_at(world.endpoint)
        attempt = call.maybe_slow()
        assert attempt is not None
        attempt.began = 0.0
        world.pass_time(10 * USUAL)
        call.cancelled(Code.DEADLINE_EXCEEDED)
    assert not world.endpoint.has_ejections
