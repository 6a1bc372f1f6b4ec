"""What is told of units that met an arm, and of their calls."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.exposures import Exposures, Member, Met, Running, Taken, rounded, short
from gateway.forwarding.metadata import REPLAYED
from gateway.routing import Arms, Key, Sticky
from gateway.status import Code, Meaning
from gateway.types import Facts
from gateway.v2.outputs import AnswerReader
from gateway.v2.peek import Head, peek_response
from gateway.v2.scores import top_score

STICKY = Sticky((Key("metadata", "x-user"),), "salt")
SPRING = Running(
    "spring",
    "photos",
    "experiment:spring",
    frozenset({"a", "b"}),
    (("latency", "latency"), ("errors", "error"), ("bytes", "size")),
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def exposures(most: int = 100) -> tuple[Exposures, Clock]:
    clock = Clock()
    made = Exposures(clock, lambda: 1000.0, most)
    made.apply([SPRING])
    return made, clock


def begin(made: Exposures, user: str = "anna", reason: str = "experiment:spring", arm: str = "a", request: str = ""):  # type: ignore[no-untyped-def]
    return made.begun("photos", reason, arm, STICKY, Facts({"x-user": user}), request)


def singly(made: Exposures) -> dict[tuple[str, str, float], int]:
    """Calls by unit, outcome and value, to two digits, of what is counted value by value."""
    return {
        (unit, each.outcomes[at], round(value, 2)): calls
        for each in made.take_measured()
        for unit, tally in each.tallies.items()
        for (at, value), calls in (tally.values or {}).items()
    }


def added(made: Exposures) -> dict[tuple[str, str], tuple[float, int]]:
    """Sum and number of calls by unit and outcome, of what is added up."""
    return {
        (unit, outcome): (round(total, 6), calls)
        for each in made.take_measured()
        for unit, tally in each.tallies.items()
        for outcome, total, calls in zip(each.outcomes, tally.sums, tally.counts, strict=True)
        if calls
    }


def test_a_unit_is_told_of_once_for_each_arm() -> None:
    made, _ = exposures()
    for _ in range(3):
        begin(made)
        begin(made, "ben", arm="b")
    assert made.take().exposures == [
        Met("spring", "a", "anna", 1000.0, False),
        Met("spring", "b", "ben", 1000.0, False),
    ]
    begin(made)
    begin(made, arm="b")
    assert made.take().exposures == [Met("spring", "b", "anna", 1000.0, False)]
    assert made.units == {"spring": 3}


def test_a_bandits_unit_is_told_with_its_epoch_and_propensity_however_long_its_key_is() -> None:
    made, _ = exposures()
    arms = Arms("spring", {"a": 1.0, "b": 1.0}, "a", "l", slices=1, epochs=({"a": 0.25, "b": 0.75},))
    made.apply([dataclasses.replace(SPRING, bandit=arms)])
    long = "x" * 1000
    begin(made)
    begin(made, long, arm="b")
    begin(made, "tester", "rule:testers", "b")
    assert made.take().exposures == [
        Met("spring", "a", "anna", 1000.0, False, 0, 0.25),
        Met("spring", "b", short(long), 1000.0, False, 0, 0.75),
        Met("spring", "b", "tester", 1000.0, True),
    ]


@pytest.mark.parametrize(
    ("reason", "arm", "told"),
    {
        "its epoch of a bandit is to come": ("waiting:spring", "a", []),
        "a rule sent it to an arm: forced": ("rule:testers", "b", [True]),
        "a rule sent it elsewhere": ("rule:testers", "old", []),
        "it was held out": ("holdout:spring", "a", []),
        "the experiment has ended": ("stopped:spring", "a", []),
        "it came without a key": ("split", "a", []),
    }.values(),
)
def test_who_takes_part_by_another_way_is_forced_or_not_told_of(reason: str, arm: str, told: list[bool]) -> None:
    made, _ = exposures()
    assert begin(made, reason=reason, arm=arm) is None
    assert [each.is_forced for each in made.take().exposures] == told


def test_requests_that_are_replayed_take_no_part() -> None:
    made, _ = exposures()
    facts = Facts({"x-user": "anna", REPLAYED: "1"})
    assert made.begun("photos", "experiment:spring", "a", STICKY, facts, "r-1") is None
    assert made.take() == Taken()


def test_calls_are_counted_by_unit_and_value() -> None:
    made, clock = exposures()
    for seconds in (0.1, 0.1001, 5.0):
        exposed = begin(made)
        clock.now += seconds
        made.ended(exposed, Code.OK, None, False, 300)
    assert singly(made) == {
        ("anna", "latency", 0.1): 2,
        ("anna", "latency", 4.97): 1,
        ("anna", "errors", 0.0): 3,
        ("anna", "bytes", 299.81): 3,
    }
    assert singly(made) == {}


def test_where_a_mean_is_enough_the_calls_of_a_unit_are_added_up() -> None:
    made, clock = exposures()
    made.apply([dataclasses.replace(SPRING, sums=frozenset({"latency", "errors"}))])
    for user, seconds in (("anna", 0.1), ("anna", 0.3), ("ben", 5.0)):
        exposed = begin(made, user)
        clock.now += seconds
        made.ended(exposed, Code.OK, None, False, 300)
    (taken,) = made.take_measured()
    assert taken.records == 2 + 2  # units, and the values of those that are counted singly
    made._books["spring"].tallies = taken.tallies
    assert added(made) == {
        ("anna", "latency"): (0.4, 2),
        ("anna", "errors"): (0.0, 2),
        ("ben", "latency"): (5.0, 1),
        ("ben", "errors"): (0.0, 1),
    }
    assert made.take_measured() == []


def test_what_was_measured_under_another_config_is_not_lost() -> None:
    made, _clock = exposures()
    before, sums = begin(made), frozenset({"latency", "errors", "bytes"})
    made.ended(begin(made), Code.OK, None, False, 300)
    made.apply([dataclasses.replace(SPRING, measures=SPRING.measures[1:], sums=sums)])
    made.ended(before, Code.OK, None, False, 300)
    made.ended(begin(made), Code.OK, None, False, 300)
    assert [(each.outcomes, each.records) for each in made.take_measured()] == [
        (("latency", "errors", "bytes"), 1 + 3),
        (("errors", "bytes"), 1),
    ]
    made.ended(before, Code.OK, None, False, 300)
    made.apply([])
    made.ended(before, Code.OK, None, False, 300)
    assert [(unit, calls) for (unit, _, _), calls in singly(made).items()] == [("anna", 2)] * 3


@pytest.mark.parametrize(
    ("code", "meaning", "callers_fault", "errors"),
    [
        (Code.OK, None, False, [0.0]),
        (Code.UNAVAILABLE, Meaning.UNREACHABLE, False, [1.0]),
        (Code.DEADLINE_EXCEEDED, None, False, [1.0]),
        (Code.RESOURCE_EXHAUSTED, Meaning.OVERLOADED, False, [1.0]),
        (Code.INTERNAL, Meaning.CALLER, False, []),
        (Code.INTERNAL, None, True, []),
        (Code.INVALID_ARGUMENT, Meaning.CALLER, False, []),
        (Code.CANCELLED, None, False, []),
    ],
)
def test_an_error_is_one_that_the_arm_is_at_fault_for(
    code: Code, meaning: Meaning | None, callers_fault: bool, errors: list[float]
) -> None:
    made, _ = exposures()
    made.ended(begin(made), code, meaning, callers_fault, 0)
    measured = singly(made)
    assert [value for _, outcome, value in measured if outcome == "errors"] == errors
    assert any(outcome == "latency" for _, outcome, _ in measured) == (code is Code.OK)


def test_a_request_is_known_by_its_unit() -> None:
    made, _ = exposures()
    begin(made, request="r-1")
    begin(made, request="r-2")
    assert made.take().requests == {"r-1": ("anna", 1000.0), "r-2": ("anna", 1000.0)}
    made.apply([dataclasses.replace(SPRING, knows_requests=False)])
    begin(made, request="r-3")
    assert made.take().requests == {}


def test_what_nobody_takes_is_bounded_and_a_unit_that_found_no_room_is_told_of_later() -> None:
    made, _ = exposures(most=10)
    for number in range(20):
        made.ended(begin(made, f"user {number}", request=f"r-{number}"), Code.OK, None, False, 10)
    taken = made.take()
    assert (len(taken.exposures), len(taken.requests)) == (10, 10)
    assert sum(each.records for each in made.take_measured()) == 10
    assert taken.dropped == 10 + 10 + (3 - 1) + 3 * 17  # of the third unit one value of three was counted
    for number in range(20):
        begin(made, f"user {number}")
    assert [each.unit for each in made.take().exposures] == [f"user {number}" for number in range(10, 20)]


def test_what_is_added_up_is_bounded_as_well() -> None:
    made, _ = exposures(most=10)
    made.apply([dataclasses.replace(SPRING, sums=frozenset({"latency", "errors", "bytes"}))])
    for number in range(20):
        made.ended(begin(made, f"user {number}"), Code.OK, None, False, 10)
    taken = made.take()
    assert ({calls for _, calls in added(made).values()}, taken.dropped) == ({1}, 10 + 3 * 10)


def test_all_are_told_of_again_once_some_were_lost() -> None:
    made, _ = exposures()
    begin(made)
    made.take()
    made.forget()
    begin(made)
    assert len(made.take().exposures) == 1


def test_what_is_remembered_of_a_unit_holds_until_what_is_known_has_changed() -> None:
    made, clock = exposures(most=2)
    made.apply([dataclasses.replace(SPRING, sums=frozenset({"latency", "errors", "bytes"}))])

    def asked(user: str, arm: str, request: str = "") -> tuple[Member, bool]:
        return made.member("photos", SPRING.reason, arm, STICKY, Facts({"x-user": user}), request)

    anna, is_kept = asked("anna", "a")
    assert is_kept
    assert made.holds(anna, SPRING.reason, "a")
    assert not made.holds(anna, SPRING.reason, "b")
    assert not made.holds(anna, "rule:testers", "a")
    assert not asked("anna", "a", "r-1")[1], "each request of its own id is told"
    for seconds in (1.0, 2.0):
        exposed = made.measured(anna)
        assert exposed is not None
        clock.now += seconds
        made.ended(exposed, Code.OK, None, False, 300)
        expected = {"latency": seconds, "errors": 0.0, "bytes": 300.0}
        assert added(made) == {("anna", outcome): (value, 1) for outcome, value in expected.items()}

    asked("ben", "b")
    assert made.holds(anna, SPRING.reason, "a"), "another unit changes nothing for it"
    assert not asked("carl", "b")[1], "there was no room to tell of it"
    assert [each.unit for each in made.take().exposures] == ["anna", "ben"]
    asked("anna", "b")
    assert not made.holds(anna, SPRING.reason, "a"), "it has met another arm since"
    for change in (made.forget, lambda: made.apply([SPRING])):
        member, _ = asked("ben", "b")
        change()
        assert not made.holds(member, SPRING.reason, "b")


@pytest.mark.parametrize("value", [1e-6, 0.0123, 0.5, 1.0, 17.3, 4e9])
def test_measured_values_are_within_one_percent(value: float) -> None:
    assert rounded(value) == pytest.approx(value, rel=0.01)
    assert rounded(0.0) == 0.0


def test_long_keys_are_held_as_digests() -> None:
    assert short("anna") == "anna"
    assert len(short("x" * 10_000)) < 80
    assert short("x" * 10_000) != short("x" * 10_001)


@pytest.mark.parametrize(("counts_variant", "value"), [(True, 1.0), (False, 0.0)])
def test_a_call_that_another_variant_answered_is_an_error_of_a_rollouts_arm_and_of_no_experiments(
    counts_variant: bool, value: float
) -> None:
    made, _ = exposures()
    made.apply([dataclasses.replace(SPRING, measures=(("errors", "error"),), counts_variant=counts_variant)])
    exposed = begin(made)
    assert exposed is not None
    made.ended(exposed, Code.OK, None, False, 10, True)
    assert singly(made) == {("anna", "errors", value): 1}


def test_agreement_with_a_reference_and_confidence_are_measured_of_the_calls_they_are_for() -> None:
    made, _ = exposures()
    both = dataclasses.replace(
        SPRING, agreements=(("agrees", "fp32", 1.0), ("differs", "fp32", 0.0)), confidences=(("sure", "SCORES"),)
    )
    made.apply([both])
    exposed = begin(made)
    for agrees in (True, True, False):
        made.compared(exposed, "fp32", agrees)
    made.compared(exposed, "another shadow", False)
    for scores in ([[0.5, 0.25]], [[-8.0, -4.0], [-2.0, -6.0]]):
        array = np.array(scores, np.float32)
        answer = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"\1", array.tobytes()])
        answer.outputs.add(name="OTHER", datatype="BOOL", shape=[1])
        answer.outputs.add(name="SCORES", datatype="FP32", shape=array.shape)
        body = answer.SerializeToString()
        made.scored(exposed, body, peek_response(body))
    made.scored(exposed, b"\x2a", Head("", "", "", False, [], 0, 0, None, []))  # no answer
    assert {(outcome, value): calls for (_, outcome, value), calls in singly(made).items()} == {
        ("agrees", 1.0): 2,
        ("agrees", 0.0): 1,
        ("differs", 0.0): 2,
        ("differs", 1.0): 1,
        ("sure", 0.5): 1,
        ("sure", -2.97): 1,
    }


UNSURE = {
    "whole numbers": ("INT32", [1], bytes(4)),
    "no rows": ("FP32", [0, 4], b""),
    "no classes": ("FP32", [], bytes(4)),
    "NaN": ("FP32", [1], b"\x00\x00\xc0\x7f"),
    "too few bytes": ("FP32", [2], bytes(4)),
}


@pytest.mark.parametrize(("datatype", "shape", "raw"), UNSURE.values(), ids=UNSURE)
def test_what_has_no_scores_has_no_confidence(datatype: str, shape: list[int], raw: bytes) -> None:
    answer = pb.ModelInferResponse(raw_output_contents=[raw])
    answer.outputs.add(name="OUT", datatype=datatype, shape=shape)
    body = answer.SerializeToString()
    assert top_score(AnswerReader().read(body, peek_response(body)), "") is None
