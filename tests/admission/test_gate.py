"""What a gate decides, call by call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2

from gateway.forwarding.admission import FULL, TOO_LATE, AdaptiveLimit, AdmissionSettings, Gate, Gates, Refused
from gateway.forwarding.admission.server_room import ServerRoom, has_bound, maybe_room


@dataclass(eq=False)
class Call:
    turn: str = "a"
    until: float | None = None
    gate: Gate | None = None  # left at once if admitted
    told: list[str] = field(default_factory=list)

    def admitted(self) -> None:
        self.told.append("admitted")
        if self.gate is not None:
            self.gate.leave(0.0)

    def shed(self, reason: str, retry_after: float) -> None:
        self.told.append(reason)


def gate_of(limit: int) -> Gate:
    return Gate(0.0, adaptive=AdaptiveLimit(limit, 0.0), fixed=limit)


def enter_many(gate: Gate, calls: int, turn: str = "a") -> None:
    for _ in range(calls):
        gate.enter(Call(turn), False, 0.0)


def test_calls_up_to_the_limit_go_and_the_next_ones_wait_for_their_places() -> None:
    gate, calls = gate_of(2), [Call() for _ in range(4)]
    assert [gate.enter(call, False, 0.0) for call in calls] == [True, True, False, False]
    gate.leave(0.1)
    assert [call.told for call in calls] == [[], [], ["admitted"], []]
    gate.leave(0.1)
    assert calls[3].told == ["admitted"]
    assert gate.in_flight == 2


def test_callers_take_turns() -> None:
    gate = gate_of(1)
    gate.enter(Call(), False, 0.0)
    many, one = [Call("many") for _ in range(3)], Call("one")
    for call in (*many, one):
        gate.enter(call, False, 0.0)
    gate.leave(0.1)
    gate.leave(0.1)
    assert [*(call.told for call in many), one.told] == [["admitted"], [], [], ["admitted"]]


def test_of_one_callers_calls_the_one_goes_whose_deadline_is_nearest() -> None:
    gate = gate_of(1)
    gate.enter(Call(), False, 0.0)
    never, late, soon = Call(), Call(until=9.0), Call(until=5.0)
    for call in (never, late, soon):
        gate.enter(call, False, 0.0)
    order = []
    for _ in range(3):
        gate.leave(0.1)
        order += [call for call in (never, late, soon) if call.told and call not in order]
    assert order == [soon, late, never]


def test_calls_of_the_batch_class_go_when_no_others_wait() -> None:
    gate = gate_of(1)
    gate.enter(Call(), False, 0.0)
    batch, other = Call(), Call()
    gate.enter(batch, True, 0.0)
    gate.enter(other, False, 0.0)
    gate.leave(0.1)
    assert (batch.told, other.told) == ([], ["admitted"])


def test_a_call_that_no_longer_waits_takes_no_place() -> None:
    gate, gone = gate_of(1), Call()
    gate.enter(Call(), False, 0.0)
    gate.enter(gone, False, 0.0)
    gate.abandon(gone)
    gate.abandon(gone)
    gate.leave(0.1)
    assert gone.told == []
    assert gate.in_flight == 0


def test_what_cannot_be_answered_before_its_deadline_is_refused_at_once() -> None:
    gate = gate_of(1)
    now = 0.0
    for _ in range(40):  # with one more that waits each time, so that the rate is the servers'
        gate.enter(Call(), False, now)
        now += 0.1
        gate.answered(0.1, now)
        while gate.in_flight:
            gate.leave(now)
        gate.enter(Call(), False, now)
        gate.enter(Call(), False, now)
        gate.leave(now)
        gate.leave(now)
    gate.enter(Call(), False, now)
    with pytest.raises(Refused) as refused:
        gate.enter(Call(until=now + 0.15), False, now)
    assert refused.value.reason == TOO_LATE
    assert 0.05 <= refused.value.retry_after <= 0.2
    assert gate.enter(Call(until=now + 1.0), False, now) is False


def test_a_queue_is_bounded_and_says_when_to_try_again() -> None:
    gate = gate_of(1)
    gate.enter(Call(), False, 0.0)
    with pytest.raises(Refused) as refused:
        enter_many(gate, 1_000)
    assert refused.value.reason == FULL
    assert refused.value.retry_after > 0
    assert gate.now("upstream", "model").refused == {FULL: 1, TOO_LATE: 0}


def crowded() -> tuple[Gate, list[Call]]:
    """A gate with as many in flight and waiting as there may be, of one caller; and those that wait."""
    gate, many = gate_of(2000), [Call("many", until=float(n)) for n in range(1000, 2000)]
    for _ in range(2000):
        gate.enter(Call("many"), False, 0.0)
    for call in many:
        assert not gate.enter(call, False, 0.0)
    return gate, many


def test_one_caller_who_fills_the_queue_refuses_himself_and_nobody_else() -> None:
    gate, many = crowded()
    with pytest.raises(Refused):
        gate.enter(Call("many"), False, 0.0)
    others = [Call(str(number)) for number in range(10)]
    for call in others:
        assert not gate.enter(call, False, 0.0)
    assert [call.told for call in many[-10:]] == [[FULL]] * 10  # those that would have gone last
    assert not any(call.told for call in many[:-10])
    assert gate.refusals[FULL] == 11
    assert gate.now("u", "m").waiting == 1000
    for _ in range(20):
        gate.leave(0.0)
    assert [call.told for call in others] == [["admitted"]] * 10


def test_callers_who_share_a_full_queue_alike_are_refused_alike() -> None:
    gate = gate_of(2000)
    enter_many(gate, 2000)
    for number in range(1000):
        assert not gate.enter(Call(str(number % 10)), False, 0.0)
    for number in range(10):
        with pytest.raises(Refused):
            gate.enter(Call(str(number)), False, 0.0)


def test_calls_of_the_batch_class_take_no_room_from_others() -> None:
    gate, batch = gate_of(2000), [Call("batch") for _ in range(1000)]
    enter_many(gate, 2000)
    for call in batch:
        assert not gate.enter(call, True, 0.0)
    with pytest.raises(Refused):
        gate.enter(Call("batch"), True, 0.0)
    assert not gate.enter(Call("other"), True, 0.0)
    for _ in range(990):
        assert not gate.enter(Call("one"), False, 0.0)
    assert [call.told for call in batch].count([FULL]) == 991
    enter_many(gate, 1)
    with pytest.raises(Refused):  # nothing of the batch class is left to make room
        enter_many(gate, 10, "one")


def test_after_a_servers_refusal_nobody_else_is_sent_before_an_answer_has_come() -> None:
    gate, waiting = gate_of(3), Call()
    for _ in range(3):
        gate.enter(Call(), False, 0.0)
    gate.enter(waiting, False, 0.0)
    gate.server_refused()
    gate.leave(0.1)
    assert waiting.told == []
    gate.answered(0.1, 0.2)
    gate.leave(0.2)
    assert waiting.told == ["admitted"]


def test_a_thousand_calls_that_end_as_they_are_admitted_end_one_after_the_other() -> None:
    """And not one inside the other, which Python bounds."""
    gate = gate_of(900)
    for _ in range(900):
        gate.enter(Call(), False, 0.0)
    calls = [Call(gate=gate) for _ in range(900)]
    for call in calls:
        gate.enter(call, False, 0.0)
    for _ in range(900):
        gate.leave(0.1)
    assert all(call.told == ["admitted"] for call in calls)
    assert gate.in_flight == 0


def test_a_model_is_limited_from_the_first_refusal_of_a_server_on_and_not_for_ever() -> None:
    gates = Gates(lambda seconds, act: None)
    assert not gates.table
    gates.overloaded("gpu", "m", 9, 0.0)
    gate = gates.maybe_gate("gpu", "m", 0.0)
    assert gate is not None
    assert gate.limit == 9
    assert gates.maybe_gate("gpu", "other", 0.0) is None
    assert gates.maybe_gate("gpu", "m", 100.0) is None  # it was not reached since
    assert not gates.table


def test_calls_that_were_on_their_way_before_there_was_a_gate_take_places_for_a_moment() -> None:
    later: list[Callable[[float], None]] = []
    gates = Gates(lambda seconds, act: later.append(act))
    gates.overloaded("gpu", "m", 5, 0.0)  # of which three are of another model
    gate = gates.table["gpu", "m"]
    calls = [Call() for _ in range(3)]
    assert [gate.enter(call, False, 0.0) for call in calls] == [False, False, False]
    gates.left("gpu", "m", False, 0.1)
    assert [bool(call.told) for call in calls] == [True, False, False]
    later[0](0.25)
    assert gate.in_flight == 3


def test_limits_of_the_config_hold_at_once_and_none_means_none() -> None:
    gates = Gates(lambda seconds, act: None)
    gates.apply(AdmissionSettings({("gpu", "fixed"): 4, ("gpu", "free"): 0}), 0.0)
    gates.overloaded("gpu", "free", 9, 0.0)
    assert [(now.model, now.limit) for now in gates.now()] == [("fixed", 4)]


def test_a_limit_that_is_raised_or_goes_lets_those_go_who_wait() -> None:
    gates, calls = Gates(lambda seconds, act: None), [Call() for _ in range(5)]
    gates.apply(AdmissionSettings({("gpu", "m"): 1}), 0.0)
    gate = gates.table["gpu", "m"]
    for call in calls:
        gate.enter(call, False, 0.0)
    gates.apply(AdmissionSettings({("gpu", "m"): 3}), 0.0)
    assert [bool(call.told) for call in calls] == [False, True, True, False, False]
    gates.apply(AdmissionSettings(), 0.0)
    assert all(call.told for call in calls[1:])


def test_callers_are_told_apart_by_a_metadata_key_or_else_by_their_connection() -> None:
    gates = Gates(lambda seconds, act: None)
    assert gates.turn_of({"x-tenant": "t"}, 7) == 7
    assert not gates.is_batch({"x-priority": "batch"})
    gates.apply(AdmissionSettings(caller="x-tenant", priority="x-priority"), 0.0)
    assert gates.turn_of({"x-tenant": "t"}, 7) == "t"
    assert gates.turn_of({}, 7) == 7
    assert gates.is_batch({"x-priority": "batch"})
    assert not gates.is_batch({"x-priority": "high"})


def test_servers_that_say_what_room_they_have_are_never_sent_more_and_may_change_their_minds() -> None:
    gates = Gates(lambda seconds, act: None)
    gates.learn(("gpu", "m"), ServerRoom(best=2, most=9), 0.0)
    gate = gates.table["gpu", "m"]
    calls = [Call() for _ in range(4)]
    assert [gate.enter(call, False, 0.0) for call in calls] == [True, True, False, False]
    assert gates.maybe_gate("gpu", "m", 1e9) is gate  # it stands without overload, too
    gates.learn(("gpu", "m"), ServerRoom(best=3, most=10), 0.1)
    assert [bool(call.told) for call in calls] == [False, False, True, False]
    gates.learn(("gpu", "m"), None, 0.2)
    assert [bool(call.told) for call in calls] == [False, False, True, True]
    assert not gates.table


def test_what_servers_say_counts_only_where_the_limit_is_automatic() -> None:
    gates = Gates(lambda seconds, act: None)
    gates.apply(AdmissionSettings({("gpu", "m"): 7, ("gpu", "n"): 0}), 0.0)
    for model in "mn":
        gates.learn(("gpu", model), ServerRoom(1, 9), 0.0)
    assert [(key, gate.limit) for key, gate in gates.table.items()] == [(("gpu", "m"), 7)]


def test_between_an_answer_and_the_next_call_a_server_that_bounds_its_queue_gets_a_breath() -> None:
    later: list[tuple[float, Callable[[float], None]]] = []
    gate = Gate(0.0, adaptive=AdaptiveLimit(1, 0.0), later=lambda seconds, act: later.append((seconds, act)))
    gate.know(1, 9, 0.0)
    calls = [Call() for _ in range(3)]
    gate.enter(calls[0], False, 0.0)
    gate.answered(0.02, 0.02)
    gate.leave(0.02)
    assert not gate.enter(calls[1], False, 0.0201)
    ((seconds, breathed),) = later
    assert seconds == pytest.approx(0.001)
    breathed(0.021)
    assert calls[1].told == ["admitted"]
    gate.answered(0.52, 0.54)  # it slept for half a second, so it gets a longer one
    gate.leave(0.54)
    assert later[1][0] == pytest.approx(0.002)


def model_config(**changes: object) -> Any:
    config = model_config_pb2.ModelConfig(max_batch_size=4)
    config.instance_group.add(count=2)
    config.dynamic_batching.default_queue_policy.max_queue_size = 16
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_models_config_tells_what_room_it_has() -> None:
    assert maybe_room(model_config()) == ServerRoom(best=16, most=24)
    assert maybe_room(model_config(max_batch_size=0)) == ServerRoom(best=2, most=18)
    unbounded, decoupled, sequences = model_config(), model_config(), model_config()
    unbounded.dynamic_batching.default_queue_policy.max_queue_size = 0
    decoupled.model_transaction_policy.decoupled = True
    sequences.sequence_batching.SetInParent()
    assert [maybe_room(each) for each in (unbounded, decoupled, sequences)] == [None, None, None]


def test_a_model_can_be_full_if_a_queue_of_its_own_or_of_its_parts_has_a_bound() -> None:
    by_priority, ensemble, sequences = model_config(), model_config(), model_config()
    by_priority.dynamic_batching.default_queue_policy.max_queue_size = 0
    assert not has_bound(by_priority)
    by_priority.dynamic_batching.priority_queue_policy[1].max_queue_size = 4
    ensemble.ensemble_scheduling.SetInParent()
    sequences.sequence_batching.SetInParent()
    configs = (model_config(), by_priority, ensemble, sequences, model_config_pb2.ModelConfig())
    assert [has_bound(each) for each in configs] == [True, True, True, False, False]


def test_a_workers_part_of_the_room_may_keep_the_servers_busy_if_all_calls_come_to_it() -> None:
    assert ServerRoom(best=16, most=72).shared(4) == ServerRoom(best=16, most=18)
    assert ServerRoom(best=16, most=24).shared(4) == ServerRoom(best=6, most=6)
    assert ServerRoom(best=1, most=3).shared(8) == ServerRoom(best=1, most=1)
