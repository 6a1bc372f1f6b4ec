"""A stream's session between a caller and upstream streams that do as they are told: order, windows, pressure, ends."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from reports import Reports
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import GatewayError
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Request
from gateway.forwarding.inference import Inference
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.streams import StreamLimits, StreamSession
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Direct, Route, Routes
from gateway.rpc.budget import Budget
from gateway.status import Code, Origin
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

    def close(self) -> None:
        """The end of a decoupled answer, as Triton says it."""
        request = self.sent.popleft()
        response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        response.parameters["triton_final_response"].bool_param = True
        self.listener.message_arrived(pb.ModelStreamInferResponse(infer_response=response).SerializeToString())

    def answer(self, *, last: bool = True, text: str = "", size: int = 1, version: str = "1") -> None:
        """Answer the first request that has no answer yet."""
        request = self.sent.popleft() if last else self.sent[0]
        response = pb.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
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

    @property
    def losses(self) -> int:
        return 0


class World:
    """A caller of a transparent gateway, whose session is under test."""

    def __init__(self, limits: StreamLimits | None = None, metadata: Any = (), budget: Budget | None = None) -> None:
        self.connection = Connection()
        self.endpoint = Endpoint("triton", "t:1", self.connection)  # type: ignore[arg-type]
        self.reports = Reports()
        routes = Routes((), direct=Direct.ALL, default_upstream="triton")
        topology = Topology(routes, {"triton": Pool("triton", [self.endpoint])})
        self.current = CurrentTopology(topology)
        inference = Inference(self.current, self.reports, Sequences(idle=1, most=1))
        self.got: list[Any] = []
        self.ends: list[Exception | None] = []
        self.fed = 0
        self.reads = True
        self.budget = budget or Budget(1 << 30, "test")
        opening = Request(b"", metadata_from_pairs(metadata))
        self.session = StreamSession(inference, opening, self, limits or StreamLimits(), self.budget)

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

    def break_down(self) -> None:
        """Fail at whatever request is decided about next."""

        class Broken(Routes):
            def lookup(self, model: str) -> Route | None:
                raise RuntimeError("unforeseen")

        self.current.now = Topology(Broken(), self.current.now.pools)

    @property
    def ids(self) -> list[str]:
        return [answer.infer_response.id for answer in self.got]

    @property
    def calls(self) -> list[Call]:
        return self.connection.calls


def test_answers_keep_the_order_of_their_requests_over_upstream_streams() -> None:
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


def test_a_caller_that_reads_slowly_holds_up_the_upstream_streams() -> None:
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


def test_upstream_streams_are_not_read_while_many_bytes_wait_for_their_turn_but_the_one_they_wait_for_is() -> None:
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
    assert [end.code for end in world.reports.ended] == [Code.INVALID_ARGUMENT, Code.CANCELLED]


def with_parameter(entry: bytes) -> bytes:
    return pb.ModelInferRequest(model_name="m", id="2").SerializeToString() + bytes((0x22, len(entry))) + entry


REFUSED = {
    "no message": (b"\xff\xff", "", Code.INTERNAL),
    "a field cut": (pb.ModelInferRequest(model_name="m", id="2").SerializeToString() + b"\x2a\x05", "2", Code.INTERNAL),
    "an id": (pb.ModelInferRequest(model_name="m", id="9" * 5000).SerializeToString(), "", Code.INVALID_ARGUMENT),
    "a name": (
        pb.ModelInferRequest(model_name="m" * 2000, id="2").SerializeToString(),
        "2",
        Code.INVALID_ARGUMENT,
    ),
    "parameters": (
        pb.ModelInferRequest(
            id="2", parameters={str(number): pb.InferParameter(bool_param=True) for number in range(1100)}
        ).SerializeToString(),
        "2",
        Code.INVALID_ARGUMENT,
    ),
    "a key": (with_parameter(b"\x0a\x01\xff"), "2", Code.INVALID_ARGUMENT),
    "a string": (with_parameter(b"\x0a\x01a\x12\x03\x1a\x01\xff"), "2", Code.INVALID_ARGUMENT),
    "an entry cut": (with_parameter(b"\x0a\x05a"), "2", Code.INVALID_ARGUMENT),
}


def test_a_message_that_is_refused_for_its_parameters_is_reported_under_its_model() -> None:
    world = World()
    world.session.take(REFUSED["a key"][0])
    assert [(start.model, start.request_id) for start in world.reports.started] == [("m", "2")]


@pytest.mark.parametrize(("body", "id", "code"), REFUSED.values(), ids=REFUSED)
async def test_a_refused_message_is_answered_in_its_turn_and_ends_nothing(body: bytes, id: str, code: Code) -> None:
    world = World()
    world.ask("m", "1")
    assert world.session.take(body)
    world.ask("m", "3")
    (call,) = world.calls
    assert world.got == []
    call.answer()
    call.answer()
    world.session.end_of_requests()
    assert world.ids == ["1", id, "3"]
    assert [bool(answer.error_message) for answer in world.got] == [False, True, False]
    call.listener.ended(None)
    assert world.ends == [None]
    assert world.endpoint.in_flight == 0
    assert [(end.code, end.callers_fault) for end in world.reports.ended] == [
        (code, code is Code.INTERNAL),
        (Code.OK, False),
        (Code.OK, False),
    ]


def test_refused_messages_do_not_pile_up_before_a_caller_that_reads_slowly() -> None:
    world = World()
    world.reads = False
    assert [world.session.take(b"\xff") for _ in range(3)] == [False] * 3
    assert len(world.got) == 1
    world.reads = True
    world.session.caller_has_room()
    assert len(world.got) == 3


FINAL = "triton_enable_empty_final_response"


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        (None, True),
        (pb.InferParameter(bool_param=False), True),
        (pb.InferParameter(bool_param=True), True),
        (pb.InferParameter(int64_param=1), False),
        (pb.InferParameter(string_param="true"), False),
        (pb.InferParameter(), False),
    ],
    ids=["not", "false", "true", "int", "string", "no value"],
)
def test_who_asks_wrongly_for_the_empty_last_answer_is_left_to_triton_to_refuse(asked: Any, added: bool) -> None:
    world = World()
    parameters = {"other": pb.InferParameter(string_param=FINAL)} | ({FINAL: asked} if asked is not None else {})
    request = pb.ModelInferRequest(model_name="m", id="1", parameters=parameters)
    world.session.take(request.SerializeToString())
    sent = world.calls[0].sent[0].parameters[FINAL]
    assert sent == (pb.InferParameter(bool_param=True) if added else asked)


def test_a_decoupled_answer_with_an_error_in_it_counts_as_failed() -> None:
    """A model says error and then, without another word, that this was all."""
    world = World()
    world.ask("m", "1")
    (call,) = world.calls
    call.answer(last=False)
    call.answer(last=False, text="out of memory")
    call.close()
    assert [answer.error_message for answer in world.got] == ["", "out of memory"]
    assert [(end.code, end.text) for end in world.reports.ended] == [(Code.INTERNAL, "out of memory")]


@pytest.mark.parametrize("id", ["7", "a", "größe"])
def test_requests_of_one_id_go_side_by_side_and_keep_it_as_far_as_there_is_room(id: str) -> None:
    world = World()
    for _ in range(6):
        world.ask("m", id)
    sent = [request.id for call in world.calls for request in call.sent]
    assert len(world.calls) == 4
    assert sent.count(id) == 4
    assert len(set(sent)) == 3
    assert all(each.startswith(id) and each.isdigit() == id.isdigit() for each in sent)


def test_requests_of_a_sequence_stay_on_one_stream_whatever_their_ids_are() -> None:
    world = World()
    for number in range(3):
        request = pb.ModelInferRequest(model_name="m", id="7")
        request.parameters["sequence_id"].int64_param = 5
        request.parameters["sequence_start"].bool_param = number == 0
        world.session.take(request.SerializeToString())
    (call,) = world.calls
    assert len({request.id for request in call.sent}) == 3
    for _ in range(3):
        call.answer()
    assert world.ids == ["7"] * 3


def test_an_id_is_free_again_once_its_request_is_answered() -> None:
    world = World()
    for _ in range(5):
        world.ask("m", "7")
        world.calls[0].answer()
    assert len(world.calls) == 1
    assert world.ids == ["7"] * 5


def test_what_is_told_of_who_answered_is_bounded_whatever_versions_a_server_invents() -> None:
    world = World()
    for number in range(2000):
        world.ask("m", "1")
        world.calls[0].answer(version=f"version-{number}")
    told = dict(world.session.trailing_metadata())
    assert told["gateway-model-version"].startswith("version-0,version-1,")
    assert told["gateway-model-version"].endswith(",...")
    assert sum(len(str(value)) for value in told.values()) < 2048
    assert told["gateway-attempts"] == "2000"


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


BROKEN = CallFailed(Code.UNAVAILABLE, "gone", origin=Origin.CONNECTION)


def test_a_session_that_ends_while_it_moves_a_leg_s_messages_leaves_nothing_behind() -> None:
    """What waits is looked at when there is room again, and may be what ends the stream."""
    world = World(StreamLimits(requests=4))
    for id in "1234":
        world.ask("a", id)
    world.ask("b", "5")
    world.break_down()
    world.connection.calls[0].listener.ended(BROKEN)
    assert [str(end) for end in world.ends] == ["unforeseen"]
    assert world.endpoint.in_flight == 0


def test_no_leg_is_begun_after_the_end() -> None:
    world = World(StreamLimits(requests=4))
    other = Endpoint("triton", "t:2", world.connection)  # type: ignore[arg-type]
    pools: Any = world.current.now.pools
    pools["triton"] = Pool("triton", [world.endpoint, other])
    for _ in range(9):
        other.in_flight += 1
    for id in "1234":
        world.ask("a", id)
    [call] = world.connection.calls
    call.answer(last=False)  # so that the first can't be sent again
    world.ask("b", "5")
    world.break_down()
    call.listener.ended(BROKEN)
    assert len(world.ends) == 1
    assert all(each.is_cancelled for each in world.connection.calls[1:])
    assert (world.endpoint.in_flight, other.in_flight) == (0, 9)


async def test_a_leg_with_many_messages_ends_in_slices_and_keeps_their_order() -> None:
    """And what comes meanwhile does not overtake them."""
    world = World()
    for number in range(500):
        world.ask("m", str(number))
    lost = CallFailed(Code.UNAVAILABLE, "lost", (), origin=Origin.CONNECTION)
    world.calls[0].listener.ended(lost)
    assert len(world.got) + sum(len(call.sent) for call in world.calls[1:]) < 100
    world.ask("m", "late")
    for _ in range(50):
        await asyncio.sleep(0)
    again = [request.id for call in world.calls[1:] for request in call.sent]
    assert world.ids + again == [*map(str, range(500)), "late"]
    assert not world.ends


def test_an_answer_that_is_no_message_costs_the_messages_of_its_leg_and_no_others() -> None:
    world = World()
    world.ask("a", "1")
    world.ask("b", "2")
    first, second = world.calls
    first.listener.message_arrived(b"\0\0")
    second.answer()
    assert first.is_cancelled
    assert not world.ends
    told = ["The endpoint's answer can't be used: A field has number 0.", ""]
    assert [answer.error_message for answer in world.got] == told
    assert [end.code for end in world.reports.ended] == [Code.INTERNAL, Code.OK]
    assert world.endpoint.in_flight == 0


def test_sessions_stop_reading_when_they_hold_half_of_what_their_connection_may_and_each_goes_on_by_itself() -> None:
    process = Budget(100_000, "process")
    connection = Budget(10_000, "connection", process)
    first, second, other = (
        World(budget=connection),
        World(budget=connection),
        World(budget=Budget(10_000, "o", process)),
    )
    assert first.ask("m", "1", size=3000)
    assert not second.ask("m", "1", size=3000)
    assert not second.ask("m", "2", size=10)  # it was on its way
    assert other.ask("m", "1", size=3000)
    assert not first.ask("m", "2", size=10)
    second.calls[0].answer()
    assert len(second.calls[0].sent) == 1
    assert second.fed == 1
    second.calls[0].answer()
    first.calls[0].answer()
    first.calls[0].answer()
    assert first.fed == 1
    other.session.cancel()
    assert connection.held == process.held == 0


def test_what_all_sessions_hold_stops_at_half_of_what_the_process_may() -> None:
    process = Budget(10_000, "process")
    worlds = [World(budget=Budget(8000, "connection", process)) for _ in range(3)]
    assert [world.ask("m", "1", size=3000) for world in worlds] == [True, False, False]
    assert [len(world.calls[0].sent) for world in worlds] == [1, 1, 1]  # one message is always taken
    for world in worlds:
        world.session.cancel()
    assert process.held == 0


def test_answers_that_wait_for_their_turn_are_paid_from_the_connection_s_budget() -> None:
    connection = Budget(2000, "connection")
    world = World(budget=connection)
    world.ask("slow", "1")
    for number in range(3):
        world.ask("large", str(number + 2))
    slow, large = world.calls
    large.answer(size=1200)
    assert connection.held > 1200
    assert not large.hungry
    slow.answer()
    assert slow.hungry
    assert large.hungry
    large.answer()
    large.answer()
    assert world.ids == ["1", "2", "3", "4"]
    assert connection.held == 0


def test_a_session_that_is_cut_gives_back_what_it_holds_once() -> None:
    connection = Budget(10_000, "connection")
    world = World(StreamLimits(requests=1), budget=connection)
    for id in "123":
        world.ask("m", id, size=500)
    assert connection.held > 1500
    world.session.cancel()
    world.session.cancel()
    assert connection.held == 0


def test_answers_to_requests_that_were_not_sent_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.ask("m", "a")
    call = world.connection.calls[0]
    stray = pb.ModelInferResponse(model_name="m", id="nobody's")
    for _ in range(1000):
        call.listener.message_arrived(pb.ModelStreamInferResponse(infer_response=stray).SerializeToString())
    assert caplog.text.count("belong to no request") == 1
    world.endpoint.unasked_quiet_until = 0.0  # a minute later
    call.listener.message_arrived(pb.ModelStreamInferResponse(infer_response=stray).SerializeToString())
    assert "sent 1000 answers that belong to no request under way" in caplog.text
    call.answer()
    assert len(world.got) == 1
