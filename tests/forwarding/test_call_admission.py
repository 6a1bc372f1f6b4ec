"""A call of a model whose calls are limited: it waits, goes, or is refused, and ends once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from test_call import ANSWER, REQUEST, Asking, World
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.admission import AdmissionSettings
from gateway.forwarding.call import Call
from gateway.forwarding.retry_budget import RetryBudget
from gateway.routing import Route, Routes, Split
from gateway.rpc.client import ClientCall
from gateway.status import Code, Origin
from gateway.types import Retry, Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

FULL = "[request id: <id_unknown>] Exceeds maximum queue size"


class Large(Asking):
    """A caller whose request may not be here whole."""

    def __init__(self, missing: int) -> None:
        super().__init__("")
        self.left = missing
        self.body = REQUEST
        self.is_collected = False
        self.passed: ClientCall | None = None

    @property
    def missing(self) -> int:
        return self.left

    def arrive(self, data: bytes) -> None:
        self.body += data
        self.left -= len(data)

    def collect_request(self) -> None:
        self.is_collected = True

    def request_so_far(self) -> bytes:
        return self.body

    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        self.passed = upstream


class LimitedWorld(World):
    """One call at a time may be in flight."""

    def __init__(self, limit: int = 1) -> None:
        super().__init__()
        self.now = 0.0
        self.inference.clock = lambda: self.now
        self.inference.gates.apply(AdmissionSettings({("u", "net"): limit}), 0.0)
        self.gate = self.inference.gates.table["u", "net"]

    def another(self, missing: int = 0) -> tuple[Call, Large]:
        caller = Large(missing)
        call = Call(self.inference, caller, "ModelInfer", REQUEST, self.inference.requests.peek(REQUEST), missing)
        call.begin()
        return call, caller

    def answer(self, number: int) -> None:
        client = self.connection.sent[number]
        client.body = ANSWER
        client.end(Code.OK, "", Origin.SERVER)


def test_a_call_without_a_place_waits_for_the_one_before_it() -> None:
    world = LimitedWorld()
    world.another()
    _, waiting = world.another()
    assert len(world.connection.sent) == 1
    assert world.endpoint.in_flight == 1  # who waits does not count there
    world.answer(0)
    world.answer(1)
    assert waiting.ends == [Code.OK]
    assert waiting.trailing[b"gateway-attempts"] == b"1"
    assert (world.gate.in_flight, world.endpoint.in_flight, world.hooks.ended) == (0, 0, 2)


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
def test_a_call_whose_caller_goes_while_it_waits_is_never_sent(code: Code) -> None:
    world = LimitedWorld()
    world.another()
    call, _ = world.another()
    call.cancelled(code)
    world.answer(0)
    assert len(world.connection.sent) == 1
    assert (world.gate.in_flight, world.hooks.ended) == (0, 2)


def test_a_place_is_given_back_however_a_call_ends() -> None:
    for end in (Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
        world = LimitedWorld()
        world.another()
        world.connection.sent[0].end(end, "", Origin.SERVER)
        assert world.gate.in_flight == 0
    world = LimitedWorld()
    call, _ = world.another()
    call.cancelled(Code.CANCELLED)
    assert world.gate.in_flight == 0


def test_too_many_are_refused_at_once_and_told_when_to_try_again() -> None:
    world = LimitedWorld()
    callers = [world.another()[1] for _ in range(60)]
    refused = [caller for caller in callers if caller.ends]
    assert refused
    assert {caller.ends[0] for caller in refused} == {Code.RESOURCE_EXHAUSTED}
    assert "there are more calls than its servers can answer; try again in" in refused[0].text
    assert b"grpc-status-details-bin" in refused[0].trailing
    assert int(refused[0].trailing[b"grpc-retry-pushback-ms"]) > 0
    assert b"gateway-endpoint" not in refused[0].trailing  # nobody was asked


def test_a_call_that_a_full_server_refused_waits_for_its_turn() -> None:
    world = LimitedWorld(2)
    world.another()
    _, caller = world.another()
    world.connection.sent[1].end(Code.UNAVAILABLE, FULL, Origin.SERVER)
    assert caller.ends == []
    assert len(world.connection.sent) == 2  # it is not sent again before an answer has come
    world.answer(0)
    world.answer(2)
    assert caller.ends == [Code.OK]
    assert world.gate.in_flight == 0


def test_a_call_that_is_refused_time_and_again_ends() -> None:
    world = LimitedWorld()
    _, caller = world.another()
    for number in range(4):
        world.connection.sent[number].end(Code.UNAVAILABLE, FULL, Origin.SERVER)
    assert caller.ends == [Code.RESOURCE_EXHAUSTED]
    assert "Exceeds maximum queue size" in caller.text
    assert (world.gate.in_flight, world.endpoint.in_flight) == (0, 0)


def test_a_return_to_a_full_server_is_a_retry_and_within_their_budget() -> None:
    """Else a server that is always full would get four times the calls."""
    world = LimitedWorld()
    budget = RetryBudget(share=0.0, per_second=0.2)  # two in ten seconds
    world.inference._retries["m"] = budget
    _, caller = world.another()
    for number in range(3):
        assert caller.ends == []
        world.connection.sent[number].end(Code.UNAVAILABLE, FULL, Origin.SERVER)
    assert caller.ends == [Code.RESOURCE_EXHAUSTED]
    assert len(world.connection.sent) == 3
    assert budget.balance(world.now) == 0.0
    assert (world.gate.in_flight, world.endpoint.in_flight) == (0, 0)


def test_a_model_that_must_not_run_twice_is_not_returned_to() -> None:
    """Its own error may read like a full queue."""
    world = LimitedWorld()
    [route] = world.inference.current.now.routes.public.values()
    routes = Routes([replace(route, retry=Retry(on=frozenset()))])
    world.inference.current.now = replace(world.inference.current.now, routes=routes)
    _, caller = world.another()
    world.connection.sent[0].end(Code.UNAVAILABLE, FULL, Origin.SERVER)
    assert caller.ends == [Code.RESOURCE_EXHAUSTED]
    assert len(world.connection.sent) == 1


def test_a_call_whose_endpoint_goes_down_while_it_waits_is_told_so() -> None:
    world = LimitedWorld()
    world.another()
    _, waiting = world.another()
    world.endpoint.state = State.DOWN
    world.answer(0)
    assert waiting.ends == [Code.UNAVAILABLE]
    assert world.gate.in_flight == 0


def test_a_large_request_is_collected_while_it_waits_and_sent_whole_if_it_has_come() -> None:
    world = LimitedWorld()
    world.another()
    _, waiting = world.another(missing=10)
    assert waiting.is_collected
    waiting.arrive(b"\x1a" + bytes(9))
    world.answer(0)
    client: ClientCall = world.connection.sent[1]
    assert client.request_more == 0
    assert client.request.startswith(b"\x0a\x03net")
    assert client.request.count(b"net") == 2  # its last bytes name the model once more
    world.answer(1)
    assert waiting.ends == [Code.OK]


def test_a_large_request_of_which_more_is_to_come_is_passed_on_from_where_it_is() -> None:
    world = LimitedWorld()
    world.another()
    _, waiting = world.another(missing=10)
    world.answer(0)
    client: ClientCall = world.connection.sent[1]
    assert client.request_more > 10
    assert waiting.passed == client


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_how_long_a_call_waited_for_its_turn_is_told(is_cancelled: bool) -> None:
    world = LimitedWorld()
    world.another()
    call, _ = world.another()
    world.now = 0.25
    if is_cancelled:
        call.cancelled(Code.CANCELLED)
        ended = world.hooks.last_ended
    else:
        world.answer(0)
        world.answer(1)
        ended = world.hooks.last_ended
    assert ended is not None
    assert ended.waited == pytest.approx(0.25)


async def test_calls_that_make_room_for_one_another_at_two_models_all_wait_or_are_refused() -> None:
    """Each of two callers fills one queue. A third one's call takes a place, whose call takes one at the other, and so
    on, until both have as many at each."""
    world = LimitedWorld()
    names = ("u", "v")
    endpoints = [Endpoint(name, f"{name}:1", world.connection) for name in names]
    for endpoint in endpoints:
        endpoint.state = State.READY
    pools = {endpoint.upstream: Pool(endpoint.upstream, [endpoint]) for endpoint in endpoints}
    variants = tuple([Variant(name, name, "net") for name in names])
    routes = Routes([Route(model, variants, Split.all_to(name)) for model, name in (("m", "u"), ("n", "v"))])
    inference = world.inference
    inference.current.now = replace(inference.current.now, routes=routes, pools=pools)
    inference.gates.apply(AdmissionSettings(dict.fromkeys(((name, "net") for name in names), 2000)), 0.0)
    callers: list[Asking] = []

    def ask(model: str, number: int) -> Asking:
        body = pb.ModelInferRequest(model_name=model, raw_input_contents=[b"x"]).SerializeToString()
        caller = Asking("")
        caller.number = number
        callers.append(caller)
        Call(inference, caller, "ModelInfer", body, inference.requests.peek(body)).begin()
        return caller

    for _ in range(3000):
        ask("m", 1)
        ask("n", 2)
    gates = [inference.gates.table[name, "net"] for name in names]
    assert [gate.now("", "").waiting for gate in gates] == [1000, 1000]
    third = ask("m", 3)
    for _ in range(3000):
        await asyncio.sleep(0)
    assert third.ends == []
    assert [gate.now("", "").waiting for gate in gates] == [1000, 1000]
    assert [caller.ends for caller in callers if caller.ends] == [[Code.RESOURCE_EXHAUSTED]]
