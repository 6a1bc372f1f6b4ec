"""A sequence is found where it was pinned, until it ends, is idle too long or the table is full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_call import ANSWER, Asking, World
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.call import Call
from gateway.forwarding.sequences import Pin, Sequences, draw_for, id_of, text_of
from gateway.status import Code, Origin
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

UNUSED: Any = None
PIN = Pin(Variant("v", "u", "m"), Endpoint("u", "a:1", UNUSED))
OTHER = Pin(Variant("w", "u", "m"), Endpoint("u", "b:1", UNUSED))


def test_a_sequence_is_found_until_it_ends() -> None:
    sequences = Sequences(idle=10, most=10)
    assert sequences.maybe_find(("m", 5), 0) is None
    sequences.pin(("m", 5), PIN, 0)
    assert sequences.maybe_find(("m", 5), 1) is PIN
    sequences.end(("m", 5))
    sequences.end(("m", 5))  # twice does no harm
    assert sequences.maybe_find(("m", 5), 2) is None


def test_models_and_kinds_of_id_are_told_apart() -> None:
    sequences = Sequences(idle=10, most=10)
    sequences.pin(("m", 5), PIN, 0)
    sequences.pin(("m", "5"), OTHER, 0)
    assert sequences.maybe_find(("m", 5), 0) is PIN
    assert sequences.maybe_find(("m", "5"), 0) is OTHER
    assert sequences.maybe_find(("n", 5), 0) is None


@pytest.mark.parametrize("odd", [True, 1.0])
def test_an_id_that_triton_refuses_moves_and_ends_no_sequence_of_another(odd: bool | float) -> None:
    """Else whoever sends it moves the sequence of another caller to where it never was, or ends it."""
    sequences = Sequences(idle=10, most=10)
    sequences.pin(("m", 1), PIN, 0)
    assert sequences.maybe_find(("m", odd), 0) is None
    sequences.pin(("m", odd), OTHER, 0)
    assert sequences.maybe_find(("m", 1), 0) is PIN
    sequences.end(("m", odd))
    assert sequences.maybe_find(("m", 1), 0) is PIN


@pytest.mark.parametrize(("after", "found"), [(9.99, PIN), (10, None), (11, None)])
def test_an_idle_sequence_is_forgotten(after: float, found: Pin | None) -> None:
    sequences = Sequences(idle=10, most=10)
    sequences.pin(("m", 5), PIN, 100)
    assert sequences.maybe_find(("m", 5), 100 + after) is found


def test_a_sequence_that_is_used_is_not_idle_and_not_the_oldest() -> None:
    sequences = Sequences(idle=10, most=2)
    sequences.pin(("m", 1), PIN, 0)
    sequences.pin(("m", 2), PIN, 1)
    sequences.pin(("m", 1), PIN, 9)
    sequences.pin(("m", 3), PIN, 9.5)
    assert len(sequences) == 2
    assert [sequences.maybe_find(("m", number), 15) is not None for number in (1, 2, 3)] == [True, False, True]


def test_each_caller_has_ids_of_his_own_and_they_are_of_the_kind_that_he_sent() -> None:
    numbers = {id_of(caller, id) for caller in ("ada", "eve", "ada\xa0") for id in (*range(1, 500), -1, 2**63)}
    texts = {id_of(caller, id) for caller in ("ada", "eve") for id in ("1", "a" * 500, "\0", "\ud800")}
    assert len(numbers) == 3 * 501
    assert all(isinstance(number, int) and 0 < number < 2**63 for number in numbers)
    assert len(texts) == 8
    assert all(isinstance(text, str) and len(text) == 32 for text in texts)
    assert id_of("ada", 7) == id_of("ada", 7) == 2708768232754910928, "other replicas may run another version"
    assert [id_of("ada", odd) for odd in (True, 1.5)] == [True, 1.5], "Triton refuses them"


def test_every_replica_draws_the_same_for_a_sequence() -> None:
    """The numbers are part of the contract between versions that run at the same time."""
    assert draw_for(("m", 5)) == draw_for(("m", 5)) == 0.9027946578968173
    assert text_of(("m", 5)) != text_of(("m", "5"))


def test_draws_are_spread_evenly_over_zero_to_one() -> None:
    draws = sorted(draw_for(("m", number)) for number in range(4000))
    assert draws[0] >= 0
    assert draws[-1] < 1
    assert max(abs(draw - rank / 4000) for rank, draw in enumerate(draws)) < 0.03


def test_a_sequence_that_begins_anew_elsewhere_goes_on_there_and_not_where_it_lived() -> None:
    """Its old state may still be there, and would answer wrongly without a word."""
    world = World()
    ends = [Endpoint("u", f"t:{number}", world.connection) for number in range(2)]
    for each in ends:
        each.state = State.READY
    world.inference.sequences = Sequences(idle=60, most=10)
    world.inference.current.now = replace(world.inference.current.now, pools={"u": Pool("u", ends)})

    def ask(start: bool) -> Endpoint:
        """Where the request of the one sequence goes; it is answered."""
        asked = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"])
        asked.parameters["sequence_id"].int64_param = 7
        asked.parameters["sequence_start"].bool_param = start
        body = asked.SerializeToString()
        world.caller = Asking("")
        Call(world.inference, world.caller, "ModelInfer", body, world.inference.requests.peek(body)).begin()
        [where] = [each for each in ends if each.in_flight]
        client = world.connection.sent[-1]
        client.body = ANSWER
        client.end(Code.OK, "", Origin.SERVER)
        assert world.caller.ends == [Code.OK]
        return where

    first = ask(True)
    assert ask(False) is first
    first.state = State.DOWN
    second = ask(True)
    assert second is not first
    first.state = State.READY  # with the state that it had
    assert ask(False) is second
    assert ask(True) is first  # where every worker looks for it
    second.state = State.SUSPECT
    assert ask(False) is first


def test_a_caller_whose_sequences_never_begin_leaves_the_others_their_retries() -> None:
    world = World()
    ends = [Endpoint("u", f"t:{number}", world.connection) for number in range(2)]
    world.inference.clock = lambda: 1000.0
    world.inference.sequences = Sequences(idle=60, most=10)
    world.inference.current.now = replace(world.inference.current.now, pools={"u": Pool("u", ends)})

    def attempts(host: str, id: int) -> int:
        """Of a sequence's first request, which no server can be asked for."""
        asked = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"])
        asked.parameters["sequence_id"].int64_param = id
        asked.parameters["sequence_start"].bool_param = True
        body = asked.SerializeToString()
        world.connection.sent.clear()
        caller = Asking("")
        caller.peer = f"ipv4:{host}:5"
        Call(world.inference, caller, "ModelInfer", body, world.inference.requests.peek(body)).begin()
        for client in world.connection.sent:  # which has another one once the first has ended
            client.end(Code.UNAVAILABLE, "connection refused", Origin.CONNECTION)
        assert caller.ends == [Code.UNAVAILABLE]
        return len(world.connection.sent)

    assert {attempts("10.0.0.1", id) for id in range(1, 200)} == {1, 2}
    assert [attempts("10.0.0.2", id) for id in range(1, 6)] == [2] * 5
