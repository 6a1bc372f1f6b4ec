"""A call ends once, whatever happens in its callbacks, and takes no other with it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BUG_TEXT, GatewayError
from gateway.forwarding.call import Call
from gateway.forwarding.caller import PartsCaller, metadata_from_pairs
from gateway.forwarding.exchange import Request
from gateway.forwarding.inference import Inference
from gateway.forwarding.models import Models
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import CallEnded, CallObserver, CallStarted, NoHooks, NoObserver
from gateway.routing import Route, Routes, Split
from gateway.rpc.client import ClientCall
from gateway.rpc.deadlines import Deadlines
from gateway.status import Code, Meaning, Origin
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

REQUEST = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()
ANSWER = pb.ModelInferResponse(model_name="net", model_version="3", raw_output_contents=[b"y"]).SerializeToString()


class Fault(Exception):
    """Thrown in one place."""


class Connection:
    """An endpoint's, whose answer the test gives. fault: the method that throws."""

    losses = 0  # times that it broke

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.sent: list[ClientCall] = []

    def call(self, path: bytes, fields: Any, deadline: float | None) -> ClientCall:
        if self.fault == "connection.call":
            raise Fault
        return ClientCall(path, fields, Deadlines(), None, 0.0)

    def submit(self, call: ClientCall) -> None:
        if self.fault == "connection.submit":
            raise Fault
        self.sent.append(call)


class Asking(PartsCaller):
    """A caller that notes how its call ends."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.metadata = metadata_from_pairs(())
        self.peer, self.deadline, self.number = "ipv4:127.0.0.1:5", None, 1
        self.ends: list[Code] = []
        self.text = ""
        self.trailing: dict[bytes, bytes] = {}

    def reply(self, body: bytes, initial: Any, trailing: Any) -> None:
        if self.fault == "caller.reply":
            raise Fault
        self.ends.append(Code.OK)
        self.trailing = dict(trailing)

    def fail(self, error: GatewayError, trailing: Any) -> None:
        self.ends.append(error.code)
        self.text = error.text
        self.trailing = dict(trailing)

    @property
    def missing(self) -> int:
        return 0

    def collect_request(self) -> None: ...

    def request_so_far(self) -> bytes:
        raise AssertionError("it was here whole")

    def pass_request(self, upstream: Any, ending: bytes) -> None: ...

    def lay_request(self, take: Any, whole: Any) -> None: ...

    def maybe_take_back(self) -> bytes | None:
        return None

    def may_keep(self) -> bool:
        return True

    def keep_request(self, size: int) -> None: ...

    def reply_in_pieces(self, pieces: Any, size: int, initial: Any, trailing: Any) -> None: ...

    def drop_request(self) -> None: ...

    def pass_answer(self, upstream: Any, front: bytes, initial: Any) -> None: ...

    def finish(self, trailing: Any) -> None: ...


class Hooks(NoHooks):
    """Listeners that throw, against their contract."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.ended = 0
        self.last_ended: CallEnded | None = None
        self.meanings: list[Meaning | None] = []
        self.ends: list[str] = []  # of attempts and calls, in order

    def call_started(self, event: CallStarted) -> CallObserver:
        hooks = self
        if self.fault == "hooks.call_started":
            self.fault = ""  # once
            raise Fault

        class Observer(NoObserver):
            def attempt_started(self, event: Any) -> Any:
                if hooks.fault == "hooks.attempt_started":
                    raise Fault
                return ()

            def attempt_ended(self, event: Any) -> None:
                hooks.meanings.append(event.meaning)
                hooks.ends.append("attempt")
                if hooks.fault == "hooks.attempt_ended":
                    raise Fault

            def ended(self, event: Any) -> None:
                hooks.ended += 1
                hooks.ends.append("call")
                hooks.last_ended = event
                if hooks.fault == "hooks.ended":
                    raise Fault

        return Observer()


class BrokenRoutes(Routes):
    def lookup(self, model: str) -> Route | None:
        raise Fault


class World:
    def __init__(
        self, fault: str = "", clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random
    ) -> None:
        self.connection = Connection(fault)
        self.endpoint = Endpoint("u", "t:1", self.connection)
        self.endpoint.state = State.READY
        kind = BrokenRoutes if fault == "routes.lookup" else Routes
        routes = kind([Route("m", (Variant("größe 1", "u", "net"),), Split.all_to("größe 1"))])
        self.hooks = Hooks(fault)
        topology = CurrentTopology(Topology(routes, {"u": Pool("u", [self.endpoint])}))
        self.inference = Inference(topology, self.hooks, Sequences(idle=1, most=1), clock=clock, draw=draw)
        self.caller = Asking(fault)

    def begin(self, missing: int = 0) -> Call:
        head = self.inference.requests.peek(REQUEST)
        call = Call(self.inference, self.caller, "ModelInfer", REQUEST, head, missing)
        call.begin()
        return call

    def end(self, code: Code = Code.OK, body: bytes = ANSWER) -> None:
        for client in self.connection.sent:
            client.body = body
            client.end(code, "", Origin.SERVER)


AT_THE_BEGINNING = [
    "routes.lookup",
    "hooks.call_started",
    "connection.call",
    "connection.submit",
    "hooks.attempt_started",
]
AT_THE_END = ["caller.reply", "hooks.attempt_ended"]


@pytest.mark.parametrize("fault", [*AT_THE_BEGINNING, "caller.reply"])
def test_a_fault_in_a_callback_ends_its_call_with_internal(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    world = World(fault)
    world.begin()
    world.end()
    assert world.caller.ends == [Code.INTERNAL]
    assert world.endpoint.in_flight == 0
    assert world.hooks.ended == 1
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize("fault", ["", *AT_THE_END, "hooks.ended"])
def test_a_caller_that_goes_away_leaves_nothing_behind_whatever_listeners_throw(fault: str) -> None:
    world = World(fault)
    call = world.begin()
    try:
        call.cancelled(Code.CANCELLED)
    except Fault:
        assert fault
    assert world.endpoint.in_flight == 0
    assert call.is_over


@pytest.mark.parametrize("fault", ["hooks.attempt_ended", "hooks.ended"])
def test_a_listener_that_throws_at_the_end_takes_nobody_s_answer(fault: str) -> None:
    world = World(fault)
    world.begin()
    world.end()
    assert world.caller.ends == [Code.OK]


@pytest.mark.parametrize("end", [lambda w: w.end(), lambda w: w.end(Code.INVALID_ARGUMENT)], ids=["answer", "error"])
def test_answers_and_errors_name_the_variant_that_was_reached(end: Callable[[World], None]) -> None:
    """Percent-encoded: a variant of a transparent gateway is called as Triton calls its model."""
    world = World()
    world.begin()
    end(world)
    assert world.caller.trailing[b"gateway-variant"] == b"gr%C3%B6%C3%9Fe%201"
    assert world.caller.trailing[b"gateway-attempts"] == b"1"


class Arriving(Asking):
    """A caller whose request is large and has not arrived whole."""

    still = 100

    @property
    def missing(self) -> int:
        return self.still

    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        """The test does."""


def test_a_request_that_was_passed_on_is_not_sent_again_by_its_front_alone() -> None:
    """Even if it has arrived by now and its endpoint could not be reached: only its front is kept."""
    world = World()
    other = Endpoint("u", "t:2", world.connection)
    other.state = State.READY
    now = world.inference.current.now
    world.inference.current.now = replace(now, pools={"u": Pool("u", [world.endpoint, other])})
    world.caller = caller = Arriving("")
    world.begin(caller.still)
    [client] = world.connection.sent
    caller.still = client.request_more = 0
    client.end(Code.UNAVAILABLE, "no connection", Origin.CONNECTION)
    assert world.connection.sent == [client]
    assert caller.ends == [Code.UNAVAILABLE]


class Kept(Arriving):
    """What is passed on is kept, until there is no more room."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.kept: bytes | None = b"kept"

    def maybe_take_back(self) -> bytes | None:
        return self.kept


@pytest.mark.parametrize("has_room", [True, False], ids=["kept", "no room meanwhile"])
async def test_what_comes_in_a_pause_and_can_not_be_kept_leaves_no_hole_in_what_is_sent_again(has_room: bool) -> None:
    world = World()
    other = Endpoint("u", "t:2", world.connection)
    other.state = State.READY
    now = world.inference.current.now
    world.inference.current.now = replace(now, pools={"u": Pool("u", [world.endpoint, other])})
    world.caller = caller = Kept("")
    world.begin(caller.still)
    [client] = world.connection.sent
    client.trailing = ((b"grpc-retry-pushback-ms", b"20"),)
    client.end(Code.RESOURCE_EXHAUSTED, "full", Origin.SERVER)
    assert caller.ends == []  # it waits
    if not has_room:
        caller.kept = None
    await asyncio.sleep(0.1)
    assert len(world.connection.sent) == 1 + has_room
    assert caller.ends == ([] if has_room else [Code.RESOURCE_EXHAUSTED])
    assert world.endpoint.in_flight + other.in_flight == has_room


async def test_who_awaits_a_call_gets_the_fault_too() -> None:
    world = World("connection.call")
    with pytest.raises(GatewayError, match=BUG_TEXT):
        await Models(world.inference).infer(Request(REQUEST))


async def test_who_awaits_a_call_and_is_cancelled_ends_it() -> None:
    world = World()
    waiting = asyncio.ensure_future(Models(world.inference).infer(Request(REQUEST)))
    await asyncio.sleep(0)
    assert world.endpoint.in_flight == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert world.endpoint.in_flight == 0
    assert world.hooks.ended == 1


@pytest.mark.parametrize("is_large", [False, True], ids=["whole", "its front"])
def test_an_answer_that_is_no_message_is_its_server_s_fault(is_large: bool, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.begin()
    (client,) = world.connection.sent
    if is_large:
        client.body, client.missing = bytes(70_000), 130_000
        assert client.on_front is not None
        client.on_front(client)
    else:
        world.end(body=bytes(1000))
    assert world.caller.ends == [Code.INTERNAL]
    assert world.caller.text == "The endpoint's answer can't be used: A field has number 0."
    assert world.hooks.meanings == [Meaning.SERVER]
    assert world.hooks.ended == 1
    assert world.endpoint.in_flight == 0
    assert client.done
    assert not caplog.text


def test_a_fault_at_the_front_of_an_answer_is_not_taken_for_a_cancelled_call(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.begin()
    (client,) = world.connection.sent
    client.body, client.missing = ANSWER, 130_000
    world.caller.pass_answer = None  # type: ignore[assignment,method-assign]  # which throws
    assert client.on_front is not None
    client.on_front(client)
    assert (world.caller.ends, world.caller.text) == ([Code.INTERNAL], BUG_TEXT)
    assert client.done
    assert caplog.text.count("Traceback") == 1
