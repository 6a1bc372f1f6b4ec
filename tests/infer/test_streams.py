"""A stream's session between a caller and legs that do as they are told: order, windows, pressure, ends."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import GatewayError, MalformedMessage
from gateway.hooks import CallEnded, CallObserver, CallStarted, NoHooks, NoObserver
from gateway.infer.exchange import Request
from gateway.infer.inference import Inference
from gateway.infer.sequences import Sequences
from gateway.infer.streams import StreamLimits, StreamSession
from gateway.infer.topology import Topology
from gateway.routing import Direct, Routes
from gateway.status import Code
from gateway.upstream.connection import CallFailed, StreamListener
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool


class Call:
    """An upstream stream; also the connection that gives it."""

    def __init__(self, listener: StreamListener) -> None:
        self.listener = listener
        self.sent: deque[Any] = deque()
        self.takes = True
        self.hungry = True
        self.said_all = False
        self.is_cancelled = False

    def send(self, body: bytes) -> bool:
        self.sent.append(pb.ModelInferRequest.FromString(body))
        return self.takes

    def done_writing(self) -> None:
        self.said_all = True

    def feed(self) -> None:
        self.hungry = True

    def cancel(self) -> None:
        self.is_cancelled = True

    def answer(self, *, last: bool = True, text: str = "", size: int = 1) -> None:
        """Answer the first request that has no answer yet."""
        request = self.sent.popleft() if last else self.sent[0]
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        response.parameters["triton_final_response"].bool_param = last
        if not text:
            response.outputs.add(name="y")
            response.raw_output_contents.append(bytes(size))
        message = pb.ModelStreamInferResponse(infer_response=response, error_message=text)
        self.hungry = self.listener.message_arrived(message.SerializeToString())


class Connection:
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.takes = True

    def stream(self, path: str, metadata: Any, timeout: float | None, listener: StreamListener) -> Call:
        self.calls.append(Call(listener))
        self.calls[-1].takes = self.takes
        return self.calls[-1]


class Reports(NoHooks):
    def __init__(self) -> None:
        self.ended: list[CallEnded] = []

    def call_started(self, event: CallStarted) -> CallObserver:
        reports = self

        class Observer(NoObserver):
            def ended(self, event: CallEnded) -> None:
                reports.ended.append(event)

        return Observer()


class World:
    """A caller of a transparent gateway, whose session is under test."""

    def __init__(self, limits: StreamLimits | None = None, metadata: Any = ()) -> None:
        self.connection = Connection()
        self.endpoint = Endpoint("triton", "t:1", self.connection)  # type: ignore[arg-type]
        self.reports = Reports()
        routes = Routes((), direct=Direct.ALL, default_upstream="triton")
        topology = Topology(routes, {"triton": Pool("triton", [self.endpoint])})
        inference = Inference(topology, self.reports, Sequences(idle=1, most=1))
        self.got: list[Any] = []
        self.ends: list[Exception | None] = []
        self.fed = 0
        self.reads = True
        self.session = StreamSession(inference, Request(b"", metadata), self, limits or StreamLimits())

    def send(self, body: bytes) -> bool:
        self.got.append(pb.ModelStreamInferResponse.FromString(body))
        return self.reads

    def feed(self) -> None:
        self.fed += 1

    def finish(self, error: Exception | None) -> None:
        self.ends.append(error)

    def ask(self, model: str, id: str = "", size: int = 1) -> bool:
        request = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[bytes(size)])
        return self.session.take(request.SerializeToString())

    @property
    def ids(self) -> list[str]:
        return [answer.infer_response.id for answer in self.got]

    @property
    def calls(self) -> list[Call]:
        return self.connection.calls


def test_answers_keep_the_order_of_their_requests_over_legs() -> None:
    world = World()
    for model, id in (("a", "1"), ("b", "2"), ("a", "3"), ("b", "4")):
        assert world.ask(model, id)
    first, second = world.calls
    second.answer()
    second.answer()
    assert world.ids == []
    first.answer()
    assert world.ids == ["1", "2"]
    first.answer()
    assert world.ids == ["1", "2", "3", "4"]
    assert world.endpoint.in_flight == 0
    assert [end.code for end in world.reports.ended] == [Code.OK] * 4


def test_a_decoupled_models_answers_pass_those_that_wait() -> None:
    world = World()
    world.ask("once", "1")
    world.ask("many", "2")
    many = world.calls[1]
    many.answer(last=False)
    many.answer()
    assert world.ids == ["2", "2"]
    world.calls[0].answer()
    assert world.ids == ["2", "2", "1"]


def test_so_many_requests_are_under_way_and_what_comes_beyond_waits() -> None:
    world = World(StreamLimits(requests=2))
    assert [world.ask("m", str(number)) for number in range(5)] == [True, False, False, False, False]
    (call,) = world.calls
    assert len(call.sent) == 2
    for number in range(5):
        assert world.fed == (number > 3)
        call.answer()
    assert world.ids == list("01234")
    assert world.fed == 1


def test_a_leg_that_takes_nothing_holds_up_the_caller() -> None:
    world = World()
    world.connection.takes = False
    assert not world.ask("m", "1")
    assert not world.ask("m", "2")
    (call,) = world.calls
    assert len(call.sent) == 1
    call.takes = True
    call.listener.has_room()
    assert len(call.sent) == 2
    assert world.fed == 1


def test_a_caller_that_reads_slowly_holds_up_the_legs() -> None:
    world = World()
    for number in range(3):
        world.ask("m", str(number))
    (call,) = world.calls
    world.reads = False
    call.answer()
    assert not call.hungry
    world.reads = True
    world.session.caller_has_room()
    assert call.hungry


def test_errors_made_here_do_not_pile_up_before_a_caller_that_reads_slowly() -> None:
    world = World()
    world.endpoint.close()
    assert world.ask("m", "1")
    world.reads = False
    assert not world.ask("m", "2")
    for number in range(100):
        assert not world.ask("m", str(number))
    assert len(world.got) == 2
    world.reads = True
    world.session.caller_has_room()
    assert len(world.got) == 102
    assert world.fed == 1


def test_legs_are_not_read_while_many_bytes_wait_for_their_turn_but_the_one_they_wait_for_is() -> None:
    world = World(StreamLimits(bytes=1000))
    world.ask("slow", "1")
    for number in range(4):
        world.ask("large", str(number + 2))
    slow, large = world.calls
    large.answer(size=600)
    assert large.hungry
    large.answer(size=600)
    assert not large.hungry
    slow.answer(size=600)
    assert slow.hungry
    assert large.hungry
    assert world.ids == ["1", "2", "3"]


def test_a_leg_that_breaks_fails_what_was_on_it_and_the_next_request_gets_a_new_one() -> None:
    world = World()
    world.ask("m", "1")
    world.ask("m", "2")
    first = world.calls[0]
    first.answer(last=False)
    first.listener.ended(CallFailed(Code.RESOURCE_EXHAUSTED, "Exceeds maximum queue size"))
    assert [bool(answer.error_message) for answer in world.got] == [False, True, True]
    assert world.endpoint.in_flight == 0
    assert world.ask("m", "3")
    assert len(world.calls) == 2


def test_a_caller_that_asks_for_it_gets_the_servers_status_and_nothing_is_left_in_flight() -> None:
    world = World(metadata=(("triton_grpc_error", "true"),))
    world.ask("m", "1")
    world.ask("other", "2")
    world.calls[0].listener.ended(CallFailed(Code.INVALID_ARGUMENT, "it broke"))
    (error,) = world.ends
    assert isinstance(error, GatewayError)
    assert (error.code, error.text) == (Code.INVALID_ARGUMENT, "it broke")
    assert world.endpoint.in_flight == 0
    assert world.calls[1].is_cancelled
    assert [end.code for end in world.reports.ended] == [Code.CANCELLED] * 2


def test_bytes_that_are_no_request_end_the_stream() -> None:
    world = World()
    world.ask("m", "1")
    assert not world.session.take(b"\xff\xff")
    (error,) = world.ends
    assert isinstance(error, MalformedMessage)
    assert world.endpoint.in_flight == 0


@pytest.mark.parametrize("asked", [0, 2])
async def test_a_stream_ends_well_once_all_is_answered_and_the_servers_have_ended_theirs(asked: int) -> None:
    world = World()
    for number in range(asked):
        world.ask("m", str(number))
    world.session.end_of_requests()
    for call in world.calls:
        assert not call.said_all
        call.answer()
        call.answer()
        assert call.said_all
        assert world.ends == []
        call.listener.ended(None)
        assert not call.is_cancelled
    assert world.ends == [None]


def test_a_cancelled_session_leaves_nothing() -> None:
    world = World(StreamLimits(requests=2))
    for number in range(4):
        world.ask("m", str(number))
    world.session.cancel()
    (call,) = world.calls
    assert call.is_cancelled
    assert world.endpoint.in_flight == 0
    assert [end.code for end in world.reports.ended] == [Code.CANCELLED] * 2
    assert world.ends == []
    assert not world.ask("m", "5")


BROKEN = CallFailed(Code.UNAVAILABLE, "gone", from_server=False)


def test_a_session_that_ends_while_it_moves_a_leg_s_messages_leaves_nothing_behind() -> None:
    """What waits is looked at when there is room again, and may be what ends the stream."""
    world = World(StreamLimits(requests=4))
    for id in "1234":
        world.ask("a", id)
    world.session.take(b"\xff")
    world.connection.calls[0].listener.ended(BROKEN)
    assert [type(end) for end in world.ends] == [MalformedMessage]
    assert world.endpoint.in_flight == 0


def test_no_leg_is_begun_after_the_end() -> None:
    world = World(StreamLimits(requests=4))
    other = Endpoint("triton", "t:2", world.connection)  # type: ignore[arg-type]
    pools: Any = world.session._inference.topology.pools
    pools["triton"] = Pool("triton", [world.endpoint, other])
    for _ in range(9):
        other.begin()
    for id in "1234":
        world.ask("a", id)
    [call] = world.connection.calls
    call.answer(last=False)  # so that the first can't be sent again
    world.session.take(b"\xff")
    call.listener.ended(BROKEN)
    assert len(world.ends) == 1
    assert all(each.is_cancelled for each in world.connection.calls[1:])
    assert (world.endpoint.in_flight, other.in_flight) == (0, 9)


async def test_a_leg_with_many_messages_ends_in_slices_and_keeps_their_order() -> None:
    """And what comes meanwhile does not overtake them."""
    world = World()
    for number in range(500):
        world.ask("m", str(number))
    lost = CallFailed(Code.UNAVAILABLE, "lost", (), from_server=False)
    world.calls[0].listener.ended(lost)
    assert len(world.got) + sum(len(call.sent) for call in world.calls[1:]) < 100
    world.ask("m", "late")
    for _ in range(50):
        await asyncio.sleep(0)
    again = [request.id.partition(":")[2] for call in world.calls[1:] for request in call.sent]
    assert world.ids + again == [*map(str, range(500)), "late"]
    assert not world.ends
