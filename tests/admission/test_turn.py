"""A call's turn at a gate: it waits, has a place, and the gate hears how it left that."""

from __future__ import annotations

import pytest

from gateway.forwarding.admission import AdaptiveLimit, Gate, Place, Turn, found_full
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.caller import NO_METADATA, Caller
from gateway.rpc.client import ClientCall
from gateway.rpc.deadlines import Deadlines
from gateway.status import Code, Origin
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint

FULL = "[request id: <id_unknown>] Exceeds maximum queue size"


class Asking(Caller):
    """A caller whose answer is wanted for longer once others wait for it, too."""

    def __init__(self) -> None:
        self.metadata, self.peer, self.deadline, self.number = NO_METADATA, "", None, 1
        self.latest = 5.0

    @property
    def useful_until(self) -> float | None:
        return self.latest

    def reply(self, body: bytes, initial: object, trailing: object) -> None:
        raise AssertionError("a turn answers nobody")

    def fail(self, error: object, trailing: object) -> None:
        raise AssertionError("a turn answers nobody")


class Call:
    def __init__(self) -> None:
        self.told: list[str] = []

    def admitted(self) -> None:
        self.told.append("admitted")

    def shed(self, reason: str, retry_after: float) -> None:
        self.told.append(reason)


def gate_of(limit: int) -> Gate:
    return Gate(0.0, adaptive=AdaptiveLimit(limit, 0.0), fixed=limit)


def turn_at(gate: Gate, caller: Asking | None = None) -> tuple[Turn, Call]:
    call = Call()
    attempt = Attempt(Variant("a", "u", "net"), Endpoint("u", "t:1", None), 1, "split", "")  # type: ignore[arg-type]
    return Turn(call, caller or Asking(), 1, attempt, gate, 1.0), call


def ended(code: Code, text: str = "") -> ClientCall:
    client = ClientCall(b"/", (), Deadlines(), None, 0.0)
    client.end(code, text, Origin.SERVER)
    return client


def test_a_turn_waits_until_a_place_is_left_and_tells_for_how_long_it_did() -> None:
    gate = gate_of(1)
    first, _ = turn_at(gate)
    second, call = turn_at(gate)
    assert first.enter(False)
    assert not second.enter(False)
    first.leave(ended(Code.OK), False, 3.0)
    assert call.told == ["admitted"]
    assert second.stop_waiting(3.0) == 2.0
    second.leave(None, False, 4.0)
    assert gate.in_flight == 0


def test_a_turn_that_is_abandoned_is_never_told() -> None:
    gate = gate_of(1)
    first, _ = turn_at(gate)
    second, call = turn_at(gate)
    first.enter(False)
    second.enter(False)
    second.abandon()
    first.leave(None, False, 2.0)
    assert (call.told, gate.in_flight) == ([], 0)


def test_a_turn_is_wanted_for_as_long_as_its_caller_says_at_the_time() -> None:
    caller = Asking()
    turn, _ = turn_at(gate_of(1), caller)
    assert turn.until == 5.0
    caller.latest = 9.0
    assert turn.until == 9.0


def test_nobody_else_is_sent_to_a_server_that_had_no_room_for_a_place() -> None:
    gate = gate_of(2)
    assert gate.maybe_enter()
    assert gate.maybe_enter()
    waiting, call = turn_at(gate)
    waiting.enter(False)
    Place(gate, 0.0).leave(ended(Code.UNAVAILABLE, FULL), True, 1.0)
    assert (call.told, gate.in_flight) == ([], 1)
    Place(gate, 0.0).leave(ended(Code.OK), False, 2.0)
    assert (call.told, gate.in_flight) == (["admitted"], 1)


@pytest.mark.parametrize(
    ("code", "text", "is_full"),
    [(Code.UNAVAILABLE, FULL, True), (Code.UNAVAILABLE, "loading", False), (Code.OK, FULL, False)],
)
def test_a_full_queue_shows_in_code_and_text(code: Code, text: str, is_full: bool) -> None:
    assert found_full(ended(code, text), "net", "") is is_full
