"""Rollouts in a store of both kinds: what follows what, who decides, and by whose clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import text

from gateway.experiments.rollout import Phase, RolloutPlan, State, Step
from gateway.store.rollouts import Counts, RolloutStore

PLAN = RolloutPlan("int8", "net", "old", "new", (Step(0.1, 1.0), Step(0.5, 1.0)))
FIRST = State(Phase.RUNNING, 0, 0.1, 10.0, 10.0, "the variant is ready", 1)
BACK = State(Phase.ROLLED_BACK, 0, 0.0, 20.0, 20.0, "it is broken", 2)


@pytest.fixture
def stores(url: str) -> Iterator[tuple[RolloutStore, RolloutStore]]:
    """Of two workers."""
    pair = RolloutStore(url), RolloutStore(url)
    yield pair
    for store in pair:
        store.close()


Stores = tuple[RolloutStore, RolloutStore]


def look(store: RolloutStore, worker: str, seconds: float = 30.0, **counts: Counts):
    return store.look(worker, {"int8": PLAN}, {("int8", variant): each for variant, each in counts.items()}, seconds)


def test_a_state_is_written_only_in_place_of_the_one_that_it_follows(stores: Stores) -> None:
    one, other = stores
    assert one.decide(PLAN, FIRST)
    assert not other.decide(PLAN, replace(FIRST, reason="too late"))
    assert not one.decide(PLAN, replace(BACK, version=3))
    assert other.decide(PLAN, BACK)
    assert [each.state for each in one.history("int8")] == [FIRST, BACK]
    assert look(one, "a").decisions["int8"].state == BACK


def test_of_many_who_write_at_once_one_does(stores: Stores, url: str) -> None:
    store, _ = stores
    assert store.decide(PLAN, FIRST)
    written: list[bool] = []

    def write(number: int) -> None:
        own = RolloutStore(url)
        written.append(own.decide(PLAN, replace(BACK, reason=f"writer {number}")))
        own.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(written) == [False] * 7 + [True]


def test_one_worker_has_the_lease_until_it_expires_and_without_it_none_decides(stores: Stores) -> None:
    one, other = stores
    assert look(one, "a").led == {"int8"}
    assert look(other, "b").led == frozenset()
    assert not other.decide(PLAN, FIRST, "b")
    with one.transaction() as connection:  # as if half a minute had passed
        connection.execute(text("UPDATE rollout_lease SET until = until - 30"))
    assert look(other, "b").led == {"int8"}
    assert look(one, "a").led == frozenset()
    assert not one.decide(PLAN, FIRST, "a")  # a leader that slept
    assert other.decide(PLAN, FIRST, "b")


def test_a_lease_from_before_the_clock_was_put_back_keeps_nobody_from_deciding(stores: Stores) -> None:
    """Its holder may be gone, and until the clock is there again nothing would be taken back."""
    one, other = stores
    assert look(one, "a", 3_600.0).led
    assert look(other, "b", 4.0).led
    assert not look(one, "a", 4.0).led


def test_a_lease_that_is_given_back_is_free_at_once(stores: Stores) -> None:
    one, other = stores
    assert look(one, "a").led == {"int8"}
    one.release("a")
    assert look(other, "b").led == {"int8"}


def test_who_has_the_lease_reads_the_counts_of_all_workers(stores: Stores) -> None:
    one, other = stores
    look(one, "a", old=Counts(good=5))
    look(other, "b", old=Counts(good=1), new=Counts(errors=2, not_finite=1))
    look(other, "b", new=Counts(errors=3, not_finite=1))
    assert look(one, "a").counts == {
        "int8": {
            ("a", "old"): Counts(good=5),
            ("b", "old"): Counts(good=1),
            ("b", "new"): Counts(errors=3, not_finite=1),
        }
    }


def test_whose_calls_they_were_is_told_too_and_a_worker_of_the_version_before_is_heard(stores: Stores) -> None:
    one, other = stores
    whole = Counts(5, 1, 2, 3, 4, 6, 7, (5, 0), (0, 9), (3, 0), (0, 4))
    look(one, "a", new=whole)
    look(other, "b", new=Counts(good=7))
    with other.transaction() as connection:
        connection.execute(text("DELETE FROM rollout_crowd WHERE worker = 'b'"))  # of which it knows nothing
        read_before = connection.execute(text("SELECT good, errors FROM rollout_calls WHERE worker = 'a'")).one()
    assert look(one, "a").counts["int8"] == {("a", "new"): whole, ("b", "new"): Counts(good=7)}
    assert tuple(read_before) == (5, 14)
    assert whole.since(Counts(1, ended_good=(2, 0), ended_bad=(0, 1))) == Counts(
        4, 1, 2, 3, 4, 6, 7, (3, 0), (0, 8), (3, 0), (0, 4)
    )


def test_nobody_leads_a_rollout_that_has_ended(stores: Stores) -> None:
    one, _ = stores
    one.decide(PLAN, FIRST)
    one.decide(PLAN, BACK)
    found = look(one, "a")
    assert (found.led, found.decisions["int8"].state.phase) == (frozenset(), Phase.ROLLED_BACK)


def test_the_time_is_the_databases(stores: Stores) -> None:
    assert abs(look(stores[0], "a").now - time.time()) < 60.0
    assert stores[1].now() == pytest.approx(time.time(), abs=60.0)


def test_a_name_that_was_used_for_other_variants_is_told_apart(stores: Stores) -> None:
    one, _ = stores
    one.decide(PLAN, FIRST)
    found = look(one, "a").decisions["int8"]
    assert found.is_of(PLAN)
    others = {"int8": replace(PLAN, after="other")}
    assert not found.is_of(others["int8"])
    assert one.look("a", others, {}, 30.0).led == frozenset()  # nor may they hold up whoever has the right ones


def test_a_store_of_the_version_before_takes_the_step(url: str) -> None:
    store = RolloutStore(url)
    store.open()
    with store.transaction() as connection:
        for table in ("rollout_decision", "rollout_lease", "rollout_calls", "rollout_crowd"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE store_version SET number = 1"))
    store.close()
    assert store.decide(PLAN, FIRST)
    store.close()
