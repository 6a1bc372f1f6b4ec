"""Epochs in the store: each follows one before it, one worker writes them, and exposures keep their propensity."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import inspect, text
from test_store import KEY, Opened, raw, store_of  # noqa: F401  (a fixture)

from gateway.experiments.epochs import Epoch, Epochs
from gateway.store import ExposureRow, Stop, schema
from gateway.store.database import Store
from gateway.store.epochs import EpochStore

EVEN = {"a": 0.5, "b": 0.5}
NONE = Epochs("net", "a", 4)


def more(epochs: Epochs, b: float = 0.5) -> Epochs:
    """With another one."""
    return replace(epochs, so_far=(*epochs.so_far, Epoch({"a": 1.0 - b, "b": b}, 100.0 + len(epochs.so_far), 7)))


@pytest.fixture
def store(url: str) -> Iterator[EpochStore]:
    store = EpochStore(url, KEY)
    yield store
    store.close()


def test_epochs_are_read_as_they_were_written_and_one_number_is_written_once(store: EpochStore) -> None:
    assert store.look("me", ["spring"], 4.0).led == {"spring"}
    one = more(NONE)
    assert store.begin("spring", one, "me")
    assert not store.begin("spring", more(NONE, 0.9), "me")
    two = more(one, 0.875)
    assert not store.begin("spring", more(two), "me")  # the second one is not there yet
    assert store.begin("spring", two, "me")
    look = store.look("me", ["spring", "autumn"], 4.0)
    assert look.epochs == {"spring": two}
    assert store.epochs(["spring"]) == {"spring": two}


def test_one_worker_begins_them_until_its_lease_ends(store: EpochStore) -> None:
    assert store.look("me", ["spring"], 0.5).led == {"spring"}
    assert store.look("other", ["spring"], 4.0).led == frozenset()
    assert not store.begin("spring", more(NONE), "other")
    with store.transaction() as connection:
        connection.execute(text("UPDATE rollout_lease SET until = until - 10"))
    assert not store.begin("spring", more(NONE), "me")  # it was stopped for a while, and goes on
    assert store.look("other", ["spring"], 4.0).led == {"spring"}
    assert not store.begin("spring", more(NONE), "me")
    assert store.begin("spring", more(NONE), "other")


def test_nobody_leads_what_is_stopped_or_has_all_its_epochs(store: EpochStore) -> None:
    store.stop(Stop("autumn", "a", 1.0))
    found = replace(NONE, slices=1)
    assert store.look("me", ["spring", "autumn"], 4.0).led == {"spring"}
    assert store.begin("spring", more(found), "me")
    look = store.look("me", ["spring", "autumn"], 4.0)
    assert (look.led, look.stopped) == (frozenset(), {"autumn"})


def test_of_several_who_begin_at_once_one_does(url: str) -> None:
    """Each of them believes that it has the lease."""
    won: list[str] = []
    barrier = threading.Barrier(4)

    def begin(name: str) -> None:
        store = EpochStore(url, KEY)
        store.holds = lambda *_: True  # type: ignore[method-assign]
        store.open()
        barrier.wait(20)
        if store.begin("spring", more(NONE, 0.5), name):
            won.append(name)
        store.close()

    threads = [threading.Thread(target=begin, args=(name,)) for name in "abcd"]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(won) == 1


def test_an_exposure_keeps_its_epoch_and_propensity_whatever_is_told_again(store_of: Opened, url: str) -> None:  # noqa: F811
    store = store_of(url)
    row = ExposureRow("spring", "b", "anna", 10.0, False, 3, 0.875)
    store.write([row, ExposureRow("spring", "a", "ben", 11.0, False, 0, 0.5)])
    store.write([row._replace(at=5.0)])
    store.write([ExposureRow("spring", "b", "tester", 12.0, True), ExposureRow("autumn", "b", "anna", 10.0, False)])
    found = [(each.at, each.epoch, each.propensity) for each in store.exposures("spring")]
    assert found == [(5.0, 3, 0.875), (11.0, 0, 0.5), (12.0, None, None)]
    assert store.arms_by_epoch("spring") == {3: {"b": 1}, 0: {"a": 1}}
    assert store.arms_by_epoch("autumn") == {}


def test_a_store_of_the_version_before_is_brought_up_to_date_and_goes_on_serving_it(url: str) -> None:
    """A gateway of that version still writes exposures, which have no propensity then."""
    with raw(url) as connection:
        for step in schema.STEPS[:3]:
            step(connection)
        for column in ("epoch", "propensity"):
            connection.execute(text(f"ALTER TABLE exposure DROP COLUMN {column}"))
        schema.version.create(connection)
        connection.execute(schema.version.insert().values(number=3))
    old = "INSERT INTO exposure (experiment, unit, arm, forced, at) VALUES ('spring', '{}', 'a', false, 1.0)"
    with raw(url) as connection:
        connection.execute(text(old.format("before")))
    store = Store(url, KEY)
    store.open()
    with raw(url) as connection:
        connection.execute(text(old.format("beside")))
        assert {"epoch", "propensity"} <= {each["name"] for each in inspect(connection).get_columns("exposure")}
    store.write([ExposureRow("spring", "b", "anna", 10.0, False, 3, 0.875)])
    assert [each.propensity for each in store.exposures("spring")] == [None, None, 0.875]
    store.close()
