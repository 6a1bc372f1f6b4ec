"""A call that takes longer than most is sent to another endpoint, too: the first answer counts, and both end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from patience import wait_until
from test_call import ANSWER, REQUEST, Asking, Connection, World

from gateway.forwarding.admission import AdmissionSettings
from gateway.forwarding.call import Call
from gateway.forwarding.hedging import HedgeSettings, Latency
from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallObserver, CallStarted, NoHooks, NoObserver
from gateway.rpc.client import ClientCall
from gateway.status import Code, Meaning, Origin
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

SOON = HedgeSettings(seconds=0.001)


class Lives(Connection):
    losses = 0


class Telling(NoHooks):
    """Notes attempts as they are told: each begins after the one before it has ended."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.end: CallEnded | None = None

    def call_started(self, event: CallStarted) -> CallObserver:
        hooks = self

        class Observer(NoObserver):
            def attempt_started(self, event: AttemptStarted) -> Any:
                hooks.told.append(event.why)
                return ()

            def attempt_ended(self, event: AttemptEnded) -> None:
                hooks.told.append(event.meaning)

            def ended(self, event: CallEnded) -> None:
                hooks.end = event

        return Observer()


class HedgingWorld(World):
    """Two endpoints that never answer by themselves."""

    def __init__(self, settings: HedgeSettings = SOON, endpoints: int = 2) -> None:
        super().__init__()
        self.connection = Lives("")
        self.endpoints = []
        for number in range(endpoints):
            endpoint = Endpoint("u", f"t:{number}", self.connection)
            endpoint.state = State.READY
            self.endpoints.append(endpoint)
        now = self.inference.current.now
        self.inference.current.now = replace(now, pools={"u": Pool("u", self.endpoints)})
        self.inference.hedges.apply({"m": settings})
        self.telling = self.inference.hooks = Telling()

    @property
    def sent(self) -> list[ClientCall]:
        return self.connection.sent

    def another(self, host: str) -> None:
        """A call of somebody else."""
        caller = Asking("")
        caller.peer = f"ipv4:{host}:5"
        Call(self.inference, caller, "ModelInfer", REQUEST, self.inference.requests.peek(REQUEST)).begin()

    async def hedged(self) -> Call:
        call = self.begin()
        await self.until_sent(2)
        return call

    async def until_sent(self, count: int) -> None:
        await wait_until(lambda: len(self.sent) >= count)

    def end_one(self, number: int, code: Code = Code.OK, text: str = "", origin: Origin = Origin.SERVER) -> None:
        self.sent[number].body = ANSWER
        self.sent[number].end(code, text, origin)

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def counts(self) -> tuple[int, int, int]:
        [model] = self.inference.hedges.now()
        return model.sent, model.won, model.refused


async def test_the_second_answer_counts_if_it_comes_first() -> None:
    world = HedgingWorld()
    await world.hedged()
    assert sorted(endpoint.in_flight for endpoint in world.endpoints) == [1, 1]
    world.end_one(1)
    assert (world.caller.ends, world.caller.trailing[b"gateway-attempts"]) == ([Code.OK], b"2")
    assert (world.sent[0].done, world.in_flight, world.counts) == (True, 0, (1, 1, 0))
    assert world.telling.told == ["only", Meaning.ENDED, "hedge", None]


async def test_the_first_answer_counts_if_it_comes_first() -> None:
    world = HedgingWorld()
    await world.hedged()
    world.end_one(0)
    assert (world.caller.ends, world.caller.trailing[b"gateway-attempts"]) == ([Code.OK], b"1")
    assert (world.sent[1].done, world.in_flight, world.counts) == (True, 0, (1, 0, 0))
    assert world.telling.told == ["only", None, "hedge", Meaning.ENDED]


@pytest.mark.parametrize("first", [0, 1])
async def test_who_fails_leaves_the_call_to_the_other(first: int) -> None:
    world = HedgingWorld()
    await world.hedged()
    world.end_one(first, Code.INTERNAL, "CUDA error")
    assert (world.caller.ends, world.in_flight) == ([], 1)
    world.end_one(1 - first)
    assert (world.caller.ends, world.in_flight) == ([Code.OK], 0)
    assert len(world.sent) == 2
    assert world.telling.told[0::2] == ["only", "hedge"]


async def test_when_both_fail_the_call_fails_once() -> None:
    world = HedgingWorld()
    await world.hedged()
    world.end_one(0, Code.INTERNAL, "one")
    world.end_one(1, Code.INTERNAL, "two")
    assert (world.caller.ends, world.caller.text, world.in_flight) == ([Code.INTERNAL], "two", 0)
    world = HedgingWorld()
    await world.hedged()
    world.end_one(1, Code.INTERNAL, "two")
    world.end_one(0, Code.INTERNAL, "one")
    assert (world.caller.ends, world.caller.text, world.in_flight) == ([Code.INTERNAL], "one", 0)


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
async def test_a_caller_that_goes_ends_both(code: Code) -> None:
    world = HedgingWorld()
    call = await world.hedged()
    call.cancelled(code)
    assert all(client.done for client in world.sent)
    assert (world.in_flight, world.caller.ends) == (0, [])
    assert world.telling.told == ["only", Meaning.ENDED, "hedge", Meaning.ENDED]


async def test_a_fast_call_is_not_hedged() -> None:
    world = HedgingWorld(HedgeSettings(seconds=0.02))
    world.begin()
    world.end_one(0)
    await asyncio.sleep(0.05)
    assert (len(world.sent), world.counts) == (1, (0, 0, 0))


async def test_without_another_endpoint_or_enough_answers_nothing_is_hedged() -> None:
    alone, unknown = HedgingWorld(endpoints=1), HedgingWorld(HedgeSettings())
    alone.begin()
    unknown.begin()
    await asyncio.sleep(0.05)
    assert (len(alone.sent), len(unknown.sent)) == (1, 1)


async def test_a_call_is_hedged_once_it_is_slower_than_most() -> None:
    world = HedgingWorld(HedgeSettings(share=0.9))
    model = world.inference.hedges.table["m"]
    for _ in range(100):
        model.latency.took(0.002, world.inference.clock())
    await world.hedged()
    [now] = world.inference.hedges.now()
    assert 0.002 <= now.after <= 0.0022


async def test_second_attempts_have_a_budget() -> None:
    world = HedgingWorld()
    for number in range(100):  # one in ten, and ten more
        world.another(f"10.0.0.{number}")
    await world.until_sent(120)
    await asyncio.sleep(0.1)
    assert world.counts == (20, 0, 80)
    assert world.in_flight == 120


async def test_one_caller_whose_calls_are_all_slow_leaves_a_part_of_it_to_others() -> None:
    world = HedgingWorld()
    for _ in range(100):
        world.another("10.0.0.1")
    await world.until_sent(116)
    await asyncio.sleep(0.1)
    assert world.counts == (16, 0, 84)
    for number in range(2, 6):
        world.another(f"10.0.0.{number}")
    await world.until_sent(124)
    assert world.counts == (20, 0, 84)


async def test_a_second_attempt_takes_no_place_that_others_wait_for() -> None:
    world = HedgingWorld()
    world.inference.gates.apply(AdmissionSettings({("u", "net"): 2}), world.inference.clock())
    gate = world.inference.gates.table["u", "net"]
    await world.hedged()
    assert gate.in_flight == 2
    world.end_one(1)
    assert gate.in_flight == 0
    for _ in range(2):
        world.begin()
    await asyncio.sleep(0.05)
    assert (len(world.sent), gate.in_flight) == (4, 2)


def test_a_quantile_is_at_most_nine_per_cent_too_high_and_forgets() -> None:
    latency = Latency(0.95)
    assert latency.quantile(0.0) is None
    for number in range(1000):
        latency.took(0.001 * (number + 1), 0.0)
    known = latency.quantile(1.0)
    assert known is not None
    assert 0.95 <= known <= 0.95 * 1.0906
    for number in range(100):
        latency.took(0.01, 100.0 + number / 100)
    known = latency.quantile(101.0)
    assert known is not None
    assert 0.01 <= known <= 0.011
    latency.took(0.0, 102.0)  # at once, and for ever
    latency.took(1e9, 102.0)
