"""Identical requests share one answer: each caller gets it as his own, and none harms another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_call import Asking, Connection, World
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.admission import AdmissionSettings
from gateway.forwarding.call import Call
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Request
from gateway.forwarding.exposures import Running
from gateway.forwarding.models import Models
from gateway.forwarding.sharing import ShareSettings
from gateway.routing import Route, Routes, Rule, Split, Sticky
from gateway.routing.match import AnyOf, Condition, Key
from gateway.rpc.client import ClientCall
from gateway.status import Code, Meaning, Origin
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


def request(**changes: Any) -> pb.ModelInferRequest:
    """A classification request, changed in one thing."""
    message = pb.ModelInferRequest(model_name="m", id=changes.get("id", ""), model_version=changes.get("version", ""))
    message.parameters["user"].string_param = changes.get("user", "u")
    tensor = message.inputs.add(
        name=changes.get("input", "x"), datatype=changes.get("datatype", "FP32"), shape=changes.get("shape", [1, 2])
    )
    if "typed" in changes:
        tensor.contents.fp32_contents.extend(changes["typed"])
    else:
        message.raw_input_contents.append(changes.get("raw", b"12345678"))
    output = message.outputs.add(name=changes.get("output", "y"))
    output.parameters["classification"].int64_param = changes.get("classes", 3)
    for key, value in changes.get("parameters", {}).items():
        message.parameters[key].int64_param = value
    for key, value in changes.get("input_parameters", {}).items():
        tensor.parameters[key].string_param = value
    return message


class Waiting(Asking):
    """A caller with metadata, that keeps its answer."""

    def __init__(self, metadata: Any = (), number: int = 1) -> None:
        super().__init__("")
        self.metadata = metadata_from_pairs(metadata)
        self.number = number
        self.body = b""

    def reply(self, body: bytes, initial: Any, trailing: Any) -> None:
        super().reply(body, initial, trailing)
        self.body = body


class Noting(Connection):
    """Notes the metadata that goes along."""

    losses = 0

    def __init__(self) -> None:
        super().__init__("")
        self.keys: list[list[bytes]] = []

    def call(self, path: bytes, fields: Any, deadline: float | None) -> ClientCall:
        self.keys.append([field[0] for field in fields])
        return super().call(path, fields, deadline)


class SharingWorld(World):
    """A model of two variants on two endpoints; the second is for testers."""

    def __init__(self, settings: ShareSettings | None = None) -> None:
        super().__init__()
        noting = Noting()
        self.connection = self.endpoint.connection = noting
        self.keys = noting.keys
        other = Endpoint("u", "t:2", self.connection)
        other.state = State.READY
        self.endpoints = [self.endpoint, other]
        variants = (Variant("a", "u", "net"), Variant("b", "u", "other"))
        testers = Rule("testers", (Condition(Key("metadata", "x-tester"), AnyOf(frozenset({"1"}))),), "b")
        route = Route("m", variants, Split.all_to("a"), rules=(testers,), fallback=("a", "b"))
        now = self.inference.current.now
        self.inference.current.now = replace(now, routes=Routes([route]), pools={"u": Pool("u", self.endpoints)})
        for endpoint in self.endpoints:
            self.probe(endpoint)
        self.settings = settings or ShareSettings(cache_bytes=1 << 20, seconds=10.0)
        self.inference.shares.apply({"m": self.settings})
        self.now = 100.0
        self.inference.clock = lambda: self.now

    def ask(self, message: pb.ModelInferRequest, metadata: Any = (), number: int = 1) -> tuple[Call, Waiting]:
        caller, body = Waiting(metadata, number), message.SerializeToString()
        call = Call(self.inference, caller, "ModelInfer", body, self.inference.requests.peek(body))
        call.begin()
        return call, caller

    @staticmethod
    def probe(endpoint: Endpoint) -> None:
        """As a probe does: learn the counts of its models."""
        for model in ("net", "other"):
            endpoint.known(model, "").counts = {"3": (0, 0, 0)}

    @property
    def sent(self) -> list[ClientCall]:
        return self.connection.sent

    def answer(self, number: int = -1, value: bytes = b"y") -> None:
        client = self.sent[number]
        asked = pb.ModelInferRequest.FromString(client.request)
        answer = pb.ModelInferResponse(
            model_name=asked.model_name, model_version="3", id=asked.id, raw_output_contents=[value]
        )
        client.body = answer.SerializeToString()
        client.end(Code.OK, "", Origin.SERVER)

    def fail(self, code: Code, text: str, origin: Origin = Origin.SERVER, number: int = -1) -> None:
        self.sent[number].end(code, text, origin)

    @property
    def counts(self) -> tuple[int, int, int]:
        [model] = self.inference.shares.now()
        return model.executed, model.coalesced, model.hits


def asked_for(id: str, value: bytes = b"y") -> bytes:
    """What the caller of a request with this id gets."""
    return pb.ModelInferResponse(
        model_name="m", model_version="3", id=id, raw_output_contents=[value]
    ).SerializeToString()


def test_the_attempt_is_reported_before_the_end_of_those_whom_it_answers() -> None:
    world = SharingWorld()
    for _ in range(2):
        world.ask(request())
    world.answer()
    assert world.hooks.ends == ["attempt", "call", "call"]


def test_an_identical_request_in_flight_is_waited_for_and_one_after_it_is_answered_from_memory() -> None:
    world = SharingWorld()
    _, first = world.ask(request(id="one"), [("x-request-id", "r1")])
    _, second = world.ask(request(id="two"), [("x-request-id", "r2")])
    assert len(world.sent) == 1
    world.answer()
    _, third = world.ask(request(), [("x-request-id", "r3")])
    assert len(world.sent) == 1
    assert [each.body for each in (first, second, third)] == [asked_for("one"), asked_for("two"), asked_for("")]
    assert [each.trailing.get(b"gateway-cache") for each in (first, second, third)] == [None, b"coalesced", b"hit"]
    assert [each.trailing[b"gateway-attempts"] for each in (first, second, third)] == [b"1", b"0", b"0"]
    assert [each.trailing[b"x-request-id"] for each in (first, second, third)] == [b"r1", b"r2", b"r3"]
    assert {each.trailing[b"gateway-variant"] for each in (first, second, third)} == {b"a"}
    assert world.counts == (1, 1, 1)
    assert world.hooks.ended == 3


DIFFERENT: dict[str, dict[str, Any]] = {
    "the version": {"version": "2"},
    "an input's name": {"input": "z"},
    "its datatype": {"datatype": "INT32"},
    "its shape": {"shape": [2, 1]},
    "its bytes": {"raw": b"12345679"},
    "its typed contents": {"typed": [1.0, 2.0]},
    "its parameters": {"input_parameters": {"scale": "2"}},
    "a requested output": {"output": "w"},
    "that output's parameters": {"classes": 4},
    "a parameter's value": {"user": "v"},
    "one more parameter": {"parameters": {"top": 1}},
    "priority": {"parameters": {"priority": 1}},
    "timeout": {"parameters": {"timeout": 1}},
}


@pytest.mark.parametrize("changes", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_each_part_of_the_request_keeps_answers_apart(changes: dict[str, Any]) -> None:
    world = SharingWorld()
    world.ask(request())
    world.ask(request(**changes))
    assert len(world.sent) == 2  # not the same in flight
    world.answer(0, b"one")
    world.answer(1, b"two")
    _, first = world.ask(request())
    _, second = world.ask(request(**changes))
    assert len(world.sent) == 2
    assert (first.body, second.body) == (asked_for("", b"one"), asked_for("", b"two"))


def test_variants_keep_answers_apart() -> None:
    world = SharingWorld()
    world.ask(request())
    world.ask(request(), [("x-tester", "1")])
    world.answer(0, b"one")
    world.answer(1, b"two")
    _, tester = world.ask(request(), [("x-tester", "1")])
    assert tester.body == asked_for("", b"two")
    assert tester.trailing[b"gateway-variant"] == b"b"


def test_metadata_that_reaches_the_server_keeps_answers_apart() -> None:
    world = SharingWorld()
    world.ask(request(), [("x-tenant", "a")])
    world.ask(request(), [("x-tenant", "b")])
    world.ask(
        request(), [("x-tenant", "a"), ("traceparent", "00-1-2-01"), ("x-forwarded-for", "h"), ("user-agent", "c")]
    )
    assert len(world.sent) == 2


def test_metadata_that_are_said_not_to_matter_do_not_reach_the_server() -> None:
    world = SharingWorld(ShareSettings(metadata=frozenset({"x-tenant"})))
    world.ask(request(), [("x-tenant", "a"), ("x-user", "1"), ("triton-grpc-protocol-key", "k")])
    world.ask(request(), [("x-tenant", "a"), ("x-user", "2"), ("triton-grpc-protocol-key", "k")])
    assert world.keys[0] == [b"x-tenant", b"triton-grpc-protocol-key"]
    assert len(world.sent) == 1
    world.ask(request(), [("x-tenant", "a"), ("triton-grpc-protocol-key", "wrong")])
    assert len(world.sent) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"sequence_id": 7}},
        {"parameters": {"sequence_id": 0}},
        {"input_parameters": {"shared_memory_region": "r"}},
    ],
)
def test_sequences_and_shared_memory_are_never_shared(changes: dict[str, Any]) -> None:
    world = SharingWorld()
    world.ask(request(**changes))
    world.ask(request(**changes))
    assert len(world.sent) == 2
    world.answer(0)
    world.answer(1)
    world.ask(request(**changes))
    assert len(world.sent) == 3


def test_a_leader_that_goes_takes_nobody_along() -> None:
    world = SharingWorld()
    leader, gone = world.ask(request(id="one"))
    _, follower = world.ask(request(id="two"))
    leader.cancelled(Code.CANCELLED)
    assert not world.sent[0].done
    world.answer()
    assert (gone.ends, follower.body) == ([], asked_for("two"))
    assert follower.trailing[b"gateway-cache"] == b"coalesced"
    assert world.hooks.meanings == [Meaning.ENDED]  # what the leader heard of its attempt
    assert world.endpoint.in_flight == 0


def test_when_all_have_gone_the_server_need_not_answer() -> None:
    world = SharingWorld()
    calls = [world.ask(request())[0] for _ in range(3)]
    for call in calls:
        assert not world.sent[0].done
        call.cancelled(Code.CANCELLED)
    assert world.sent[0].done
    assert sum(endpoint.in_flight for endpoint in world.endpoints) == 0
    world.ask(request())
    assert len(world.sent) == 2


def test_a_deadline_ends_its_own_call_only_and_newcomers_do_not_wait_for_what_is_late() -> None:
    world = SharingWorld()
    leader, _ = world.ask(request())
    _, follower = world.ask(request())
    leader.cancelled(Code.DEADLINE_EXCEEDED)
    _, newcomer = world.ask(request())
    assert len(world.sent) == 2
    world.answer(1, b"new")
    assert (newcomer.body, follower.ends) == (asked_for("", b"new"), [])
    world.answer(0, b"old")
    assert follower.body == asked_for("", b"old")


def test_a_deadline_that_passes_speaks_against_the_server_if_it_is_his_for_whom_it_was_asked() -> None:
    """Others who leave less time for the same request must not make it look slow for him."""
    world = SharingWorld()
    leader, _ = world.ask(request())
    hurried, _ = world.ask(request(), number=2)
    failures = lambda: sum(each.record("net", "").ever_failed for each in world.endpoints)  # noqa: E731
    world.now += 1.0
    hurried.cancelled(Code.DEADLINE_EXCEEDED)
    assert failures() == 0
    leader.cancelled(Code.DEADLINE_EXCEEDED)
    assert failures() == 1


def test_a_failure_is_all_members_and_names_each_ones_own_id_and_is_not_remembered() -> None:
    world = SharingWorld()
    _, first = world.ask(request(id="one"))
    _, second = world.ask(request(id="two"))
    _, third = world.ask(request())
    world.fail(Code.INVALID_ARGUMENT, "[request id: one] unexpected shape")
    assert [each.ends for each in (first, second, third)] == [[Code.INVALID_ARGUMENT]] * 3
    assert first.text == "[request id: one] unexpected shape"
    assert second.text == "[request id: two] unexpected shape"
    assert third.text == "[request id: <id_unknown>] unexpected shape"
    world.ask(request())
    assert len(world.sent) == 2


def test_a_fallbacks_answer_is_all_members_and_remembered_as_its_own() -> None:
    world = SharingWorld(ShareSettings(cache_bytes=1 << 20, metadata=frozenset()))
    for endpoint in world.endpoints:
        endpoint.models = {("net", ""): False}
    _, first = world.ask(request())
    _, second = world.ask(request())
    world.answer(-1, b"b")
    assert first.trailing[b"gateway-variant"] == second.trailing[b"gateway-variant"] == b"b"
    sent = len(world.sent)
    _, tester = world.ask(request(), [("x-tester", "1")])
    assert (tester.body, len(world.sent)) == (asked_for("", b"b"), sent)
    assert second.trailing[b"gateway-fallback-from"] == b"a"
    assert b"gateway-fallback-from" not in tester.trailing  # he is meant for it
    for endpoint in world.endpoints:
        endpoint.models = {}
    world.ask(request())  # the first variant's own answer is not known
    assert len(world.sent) == sent + 1


def test_a_rollout_learns_of_each_member_that_another_variant_has_answered() -> None:
    """Else a herd of identical requests hides a variant that can't answer."""
    world = SharingWorld(ShareSettings(metadata=frozenset()))
    [route] = world.inference.current.now.routes.public.values()
    routes = Routes([replace(route, sticky=Sticky((Key("metadata", "x-user"),), ""))])
    world.inference.current.now = replace(world.inference.current.now, routes=routes)
    measures = (("errors", "error"),)
    running = Running("r", "m", "only", frozenset("ab"), measures, sums=frozenset({"errors"}), counts_variant=True)
    world.inference.exposures.apply([running])
    for endpoint in world.endpoints:
        endpoint.models = {("net", ""): False}
    for user in "123":
        world.ask(request(), [("x-user", user)])
    assert len(world.sent) == 1
    world.answer()
    [book] = world.inference.exposures.table["m"]
    assert {unit: (tally.failed, tally.ended) for unit, tally in book.tallies.items()} == dict.fromkeys("123", (1, 1))


@pytest.mark.parametrize("what", ["load", "suspicion", "closing"])
def test_an_answer_is_forgotten_when_its_model_may_have_changed(what: str) -> None:
    world = SharingWorld()
    world.ask(request())
    _, follower = world.ask(request())
    served_by = next(endpoint for endpoint in world.endpoints if endpoint.in_flight)

    def change() -> None:
        if what == "load":
            served_by.forget("net")
        elif what == "suspicion":
            served_by.suspect("connection lost")
        else:
            served_by.close()

    change()
    for endpoint in world.endpoints:
        world.probe(endpoint)
    world.ask(request())
    assert len(world.sent) == 2  # nor does a request that comes after the change get what was asked before it
    world.answer(0, b"old")
    world.answer(1, b"new")
    assert follower.body == asked_for("", b"old")
    _, later = world.ask(request())
    assert later.body == asked_for("", b"new")
    for endpoint in world.endpoints:
        served_by = endpoint
        change()
    hits = world.counts[2]
    world.ask(request())
    assert world.counts[2] == hits


def test_nothing_is_remembered_until_a_reload_could_be_seen() -> None:
    world = SharingWorld()
    for endpoint in world.endpoints:
        endpoint.forget()
    world.ask(request())
    world.answer()
    world.ask(request())
    assert len(world.sent) == 2


def test_an_answer_is_remembered_for_its_time_and_space_only() -> None:
    world = SharingWorld(ShareSettings(cache_bytes=3000, seconds=10.0))
    for number in range(3):  # each takes a good kilobyte
        world.ask(request(raw=b"%08d" % number))
        world.answer()
    world.ask(request(raw=b"%08d" % 0))
    assert len(world.sent) == 4  # the oldest had to go
    world.ask(request(raw=b"%08d" % 2))
    assert len(world.sent) == 4
    [now] = world.inference.shares.now()
    assert (now.answers, now.evictions) == (2, 1)
    assert now.held <= now.most == 3000
    world.now += 10.0
    world.ask(request(raw=b"%08d" % 2))
    assert len(world.sent) == 5


def test_without_a_cache_nothing_is_remembered_and_without_coalescing_nothing_is_waited_for() -> None:
    world = SharingWorld(ShareSettings())
    world.ask(request())
    world.answer()
    world.ask(request())
    assert len(world.sent) == 2
    world = SharingWorld(ShareSettings(coalesce=False, cache_bytes=1 << 20))
    world.ask(request())
    world.ask(request())
    assert len(world.sent) == 2
    world.answer(0)
    world.ask(request())
    assert len(world.sent) == 2


def test_a_call_that_waits_for_anothers_turn_is_not_waited_for() -> None:
    world = SharingWorld()
    limits = AdmissionSettings({("u", "net"): 1}, caller="x-tenant-of-turns", priority="x-priority")
    world.inference.gates.apply(limits, world.now)
    world.ask(request(raw=b"busybusy"), number=1)
    _, hog = world.ask(request(), number=1)  # waits at the gate
    _, same = world.ask(request(), number=1)
    _, other = world.ask(request(), number=2)  # has its own turn
    world.answer(0)
    world.answer(1)
    world.answer(2)
    assert hog.ends == same.ends == other.ends == [Code.OK]
    assert world.counts[0] == 3


def test_callers_who_ask_by_turns_wait_for_their_own_turn_once_each() -> None:
    world = SharingWorld()
    world.inference.gates.apply(AdmissionSettings({("u", "net"): 1}), world.now)
    world.ask(request(raw=b"busybusy"))
    callers = [world.ask(request(), number=number)[1] for number in (1, 2, 1, 2, 1, 2)]
    for number in range(3):
        world.answer(number)
    assert [each.ends for each in callers] == [[Code.OK]] * 6
    assert world.counts[0] == len(world.sent) == 3
    assert not world.inference.shares.table["m"]._flights


def test_a_short_deadline_is_not_why_others_are_shed() -> None:
    world = SharingWorld()
    world.inference.gates.apply(AdmissionSettings({("u", "net"): 1}), world.now)
    world.ask(request(raw=b"busybusy"))
    hurried = Waiting()
    hurried.deadline = world.now + 0.001
    body = request().SerializeToString()
    Call(world.inference, hurried, "ModelInfer", body, world.inference.requests.peek(body)).begin()
    _, patient = world.ask(request())
    world.now += 0.002
    world.answer(0)
    world.answer(1)
    assert patient.ends == [Code.OK]


async def test_who_awaits_a_call_shares_too() -> None:
    world = SharingWorld()
    world.ask(request(id="one"))
    world.answer()
    reply = await Models(world.inference).infer(Request(request(id="two").SerializeToString()))
    assert (reply.body, reply.served.reused) == (asked_for("two"), "hit")


def test_a_fault_of_one_caller_is_not_the_others() -> None:
    world = SharingWorld()
    broken, body = Asking("caller.reply"), request().SerializeToString()
    Call(world.inference, broken, "ModelInfer", body, world.inference.requests.peek(body)).begin()
    _, follower = world.ask(request())
    world.answer()
    assert (broken.ends, follower.ends) == ([Code.INTERNAL], [Code.OK])
