"""Gates before servers that queueing theory knows, and before Triton's ways: in simulated time, one seed, no noise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from simulation import Batcher, Clock, Instances, Ledger, Server, World

MakeServer = Callable[[Clock, random.Random], Server]

SETTLED = 10.0  # seconds, after which a search for the limit has ended

SERVERS: dict[str, tuple[float, MakeServer]] = {  # answers per second that each can give
    "M/D/1, 20 ms": (50, lambda clock, chance: Instances(clock, 1, lambda: 0.02, 8)),
    "M/D/1 with jitter": (50, lambda clock, chance: Instances(clock, 1, lambda: 0.01 + 0.02 * chance.random(), 8)),
    "M/D/1, 2 ms": (500, lambda clock, chance: Instances(clock, 1, lambda: 0.002, 8)),
    "M/D/1, a long queue": (50, lambda clock, chance: Instances(clock, 1, lambda: 0.02, 100)),
    "M/M/1": (50, lambda clock, chance: Instances(clock, 1, lambda: chance.expovariate(50), 8)),
    "M/M/4": (200, lambda clock, chance: Instances(clock, 4, lambda: chance.expovariate(50), 8)),
    "M/M/16": (800, lambda clock, chance: Instances(clock, 16, lambda: chance.expovariate(50), 8)),
    "M/M/16, half a second": (32, lambda clock, chance: Instances(clock, 16, lambda: chance.expovariate(2), 8)),
    "batches, each row costs": (762, lambda clock, chance: Batcher(clock, 32, 0.01, 0.001, 64)),
    "batches, rows are free": (385, lambda clock, chance: Batcher(clock, 8, 0.02, 0.0001, 8)),
}


def run(server: MakeServer, rate: float, seconds: float = 40, *, is_gated: bool = True) -> tuple[World, Ledger]:
    world = World(server, is_gated=is_gated)
    world.calls("caller", rate, seconds)
    world.run(seconds + 10)
    return world, world.ledgers["caller"]


@pytest.mark.parametrize("kind", SERVERS)
def test_at_five_times_the_load_servers_do_what_they_can_and_those_who_are_let_in_wait_no_longer(kind: str) -> None:
    capacity, server = SERVERS[kind]
    _, ledger = run(server, 5 * capacity)
    assert ledger.goodput(SETTLED, 40) >= 0.9 * capacity
    _, full = run(server, capacity)
    assert ledger.quantile(0.99, SETTLED) <= 2 * full.quantile(0.99, SETTLED)


@pytest.mark.parametrize("kind", SERVERS)
def test_at_five_times_the_load_hardly_a_call_is_refused_by_a_server_or_late(kind: str) -> None:
    capacity, server = SERVERS[kind]
    _, ledger = run(server, 5 * capacity)
    assert ledger.by_server <= 0.03 * ledger.sent
    assert ledger.failed <= 0.005 * ledger.sent  # of these, by having been refused there time and again
    late = sorted(ledger.refused)[int(0.99 * len(ledger.refused))]
    assert late == 0.0  # those who are refused are refused at once


@pytest.mark.parametrize("kind", SERVERS)
def test_half_the_load_is_never_refused_by_a_gate(kind: str) -> None:
    capacity, server = SERVERS[kind]
    _, ledger = run(server, capacity / 2)
    assert len(ledger.refused) <= 0.0005 * ledger.sent  # with a burst that a server has refused before


@pytest.mark.parametrize("kind", ["M/D/1, 20 ms", "M/M/16", "batches, rows are free"])
def test_all_is_as_before_within_five_seconds_of_the_end_of_an_overload(kind: str) -> None:
    capacity, server = SERVERS[kind]
    world = World(server)
    world.calls("overload", 5 * capacity, 20)
    world.run(25)
    world.calls("after", capacity / 2, 60)
    world.run(70)
    after = world.ledgers["after"]
    assert len(after.answered) >= 0.999 * after.sent


def test_a_server_that_becomes_three_times_as_slow_keeps_all_its_instances_busy() -> None:
    seconds = [0.05]
    world = World(lambda clock, chance: Instances(clock, 16, lambda: chance.expovariate(1 / seconds[0]), 8))
    world.calls("caller", 1600, 60)
    world.run(20)
    seconds[0] = 0.15
    world.run(70)
    assert world.ledgers["caller"].goodput(30, 60) >= 0.9 * 16 / 0.15


def test_a_server_that_gets_more_instances_is_given_more() -> None:
    world = World(lambda clock, chance: Instances(clock, 2, lambda: chance.expovariate(20), 8))
    world.calls("caller", 1000, 60)
    world.run(20)
    server = world.server
    assert isinstance(server, Instances)
    server.free += 6
    world.run(70)
    assert world.ledgers["caller"].goodput(40, 60) >= 0.9 * 160


def test_nothing_is_sent_that_cannot_be_answered_in_time() -> None:
    world = World(lambda clock, chance: Instances(clock, 1, lambda: 0.01 + 0.02 * chance.random(), None))
    world.limit(30)  # which is too many: six tenths of a second
    world.calls("caller", 250, 120, deadline=0.4)
    world.run(130)
    ledger = world.ledgers["caller"]
    assert ledger.late <= 0.01 * (len(ledger.answered) + ledger.late)  # those before the rate was known
    assert ledger.goodput(SETTLED, 120) >= 0.9 * 50


def test_a_caller_at_ten_times_the_capacity_does_no_harm_to_nine_at_a_tenth_of_their_share() -> None:
    capacity, server = SERVERS["M/D/1, 20 ms"]
    world = World(server)
    world.calls("flood", 10 * capacity, 60)
    for number in range(9):
        world.calls(number, 0.1 * capacity / 10, 60, since=5)
    world.run(70)
    others = [world.ledgers[number] for number in range(9)]
    assert sum(len(each.answered) for each in others) >= 0.999 * sum(each.sent for each in others)
    _, full = run(server, capacity)
    assert max(each.quantile(0.99) for each in others) <= 2 * full.quantile(0.99, SETTLED)
    assert world.ledgers["flood"].goodput(SETTLED, 60) >= 0.8 * capacity  # what they leave is not wasted


def test_calls_of_the_batch_class_get_what_others_leave() -> None:
    capacity, server = SERVERS["M/M/4"]
    world = World(server)
    world.calls("batch", 5 * capacity, 60, is_batch=True)
    world.calls("people", 0.5 * capacity, 60, since=5)
    world.run(70)
    people, batch = world.ledgers["people"], world.ledgers["batch"]
    assert len(people.answered) >= 0.99 * people.sent
    assert batch.goodput(SETTLED, 60) >= 0.4 * capacity
