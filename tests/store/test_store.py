"""The store: what was written is read, once, whatever is repeated, late or out of order. On SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, inspect, text
from sqlalchemy.exc import IntegrityError

from gateway.experiments.records import Exposure, Outcome
from gateway.forwarding.exposures import Tally
from gateway.store import ExposureRow, MeasuredRow, OutcomeRow, RequestRow, Stop, StoreAway, database, schema
from gateway.store.database import Store
from gateway.store.rows import Row, StoreReadOnly

KEY = "a key that nobody guesses"


Opened = Callable[..., Store]


@pytest.fixture
def store_of() -> Iterator[Opened]:
    with contextlib.ExitStack() as exits:

        def opened(url: str, key: str | None = KEY) -> Store:
            store = Store(url, key)
            exits.callback(store.close)
            store.open()
            return store

        yield opened


@contextlib.contextmanager
def raw(url: str) -> Iterator[Connection]:
    """The database without what is tested."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


def report(number: int, unit: str = "anna", *, at: float = 20.0, value: float = 1.0) -> OutcomeRow:
    return OutcomeRow(f"report {number}", "", "bought", value, at, unit)


def measured(number: int, values: dict[str, list[float]]) -> MeasuredRow:
    """Values of calls by unit, of the second of two outcomes."""
    tallies = {unit: Tally(2) for unit in values}
    for unit, tally in tallies.items():
        tally.counts[1], tally.sums[1] = len(values[unit]), sum(values[unit])
    return MeasuredRow("a" * 16, number, "spring", 20.0, ("other", "bought"), tallies, len(tallies))


def outcomes(store: Store, name: str = "spring", measured: bool = False) -> list[Outcome]:
    return list(store.outcomes(name, {"bought": measured}))


def test_a_unit_is_exposed_once_at_its_earliest_time(store_of: Opened, url: str) -> None:
    store = store_of(url)
    late, early = ExposureRow("spring", "int8", "anna", 12.0, False), ExposureRow("spring", "int8", "anna", 10.0, False)
    store.write([late])
    store.write([early, late])
    store.write([late])
    assert store.exposures("spring") == [Exposure("int8", store.hashed("unit", "anna"), 10.0)]
    assert store.exposures("autumn") == []


def test_a_unit_in_two_arms_and_one_that_a_rule_sent_there_are_told_apart(store_of: Opened, url: str) -> None:
    store = store_of(url)
    store.write([ExposureRow("spring", arm, "anna", 10.0, forced) for arm in ("a", "b") for forced in (False, True)])
    assert len(store.exposures("spring")) == 4
    assert store.arms("spring") == {"a": 1, "b": 1}


def test_a_report_counts_once_however_often_and_late_it_comes(store_of: Opened, url: str) -> None:
    store = store_of(url)
    assert store.write([report(1), report(2, "ben"), report(1, value=0.0)]) == 1
    assert store.write([report(2, "ben"), report(3, at=5.0)]) == 1
    assert store.write([report(1, value=7.0)]) == 1
    assert sorted((each.value, each.at) for each in outcomes(store)) == [(1.0, 5.0), (1.0, 20.0), (1.0, 20.0)]


@pytest.mark.parametrize("first", ["report", "request"])
def test_a_report_about_a_request_is_about_its_unit_whichever_comes_first(
    store_of: Opened, url: str, first: str
) -> None:
    store = store_of(url)
    rows: list[Row] = [RequestRow("r-1", "anna", 10.0), OutcomeRow("x", "", "bought", 1.0, 20.0, "", "r-1")]
    for row in rows if first == "request" else rows[::-1]:
        store.write([row])
    assert [each.unit for each in outcomes(store)] == [store.hashed("unit", "anna")]


def test_what_was_measured_is_of_its_experiment_and_counts_as_often_as_it_was_seen(store_of: Opened, url: str) -> None:
    store = store_of(url)
    store.write([measured(1, {"anna": [0.5] * 3}), report(1)])
    assert [(each.value, each.times) for each in outcomes(store, measured=True)] == [(0.5, 3)]
    assert outcomes(store, "autumn", measured=True) == []


def test_what_was_measured_of_many_units_is_of_each_what_it_was(store_of: Opened, url: str) -> None:
    store, units = store_of(url), {f"user {n}": [float(n), n + 1.0] for n in range(2500)}
    store.write([measured(1, units), measured(2, {"anna": [], "ben": [7.0]})])
    singly = Tally(2)
    singly.values = {(0, 0.25): 2, (1, 9.0): 1}
    store.write([MeasuredRow("b" * 16, 1, "spring", 21.0, ("bought", "other"), {"anna": singly}, 3)])
    found = {each.unit: (each.value, each.times, each.at) for each in outcomes(store, measured=True)}
    expected = {store.hashed("unit", unit): (sum(values) / 2, 2, 20.0) for unit, values in units.items()}
    expected[store.hashed("unit", "ben")] = (7.0, 1, 20.0)
    expected[store.hashed("unit", "anna")] = (0.25, 2, 21.0)
    assert found == expected


def test_what_was_measured_counts_once_however_often_it_is_written(store_of: Opened, url: str) -> None:
    store, row = store_of(url), measured(1, {f"user {n}": [1.0] for n in range(1500)})
    assert store.write([row, row]) == 0
    assert store.write([row]) == 0
    assert len(outcomes(store, measured=True)) == 1500


def test_records_of_a_version_before_count_too(store_of: Opened, url: str) -> None:
    store = store_of(url)
    row = {"report": "0" * 32, "experiment": "spring", "name": "bought", "unit": "u", "request": ""}
    with raw(url) as connection:
        connection.execute(schema.outcomes.insert().values(**row, value=0.5, times=3, at=20.0))
    assert outcomes(store, measured=True) == [Outcome("bought", 0.5, 20.0, "u", times=3)]


@pytest.mark.parametrize("version", range(1, len(schema.STEPS)))
def test_what_a_gateway_of_an_earlier_version_writes_beside_new_ones_is_read_once_with_theirs(
    store_of: Opened, url: str, version: int
) -> None:
    """It made the store, and goes on after another one has brought that up to date; what it repeats is known."""
    with raw(url) as connection:
        schema.version.create(connection)
        for step in schema.STEPS[:version]:
            step(connection)
        connection.execute(schema.version.insert().values(number=version))
        connection.execute(schema.secrets.insert().values(name="unit_key", value="a key of the store's own"))
    known = Store(url, "a key of the store's own")
    units = {unit: known.hashed("unit", unit) for unit in ("anna", "ben", "carl")}
    known.close()

    def as_before(number: int, unit: str) -> None:
        """Three calls of a unit, as rows were before `measured`."""
        met = {"experiment": "spring", "unit": units[unit], "arm": "a", "forced": False, "at": 10.0 + number}
        told = {
            "report": f"{number:032d}",
            "experiment": "spring",
            "name": "bought",
            "unit": units[unit],
            "request": "",
        }
        with raw(url) as connection, contextlib.suppress(IntegrityError):
            connection.execute(schema.outcomes.insert().values(**told, value=0.5, times=3, at=20.0))
            connection.execute(schema.exposures.insert().values(**met))

    as_before(1, "anna")
    store = store_of(url, None)
    assert version_of(url) == len(schema.STEPS)
    store.write([ExposureRow("spring", "a", unit, 12.0, False) for unit in ("anna", "carl")])
    store.write([measured(1, {"anna": [1.0, 1.0], "carl": [1.0]})])
    as_before(1, "anna")  # again
    as_before(2, "ben")
    assert {each.unit: each.at for each in store.exposures("spring")} == {
        units["anna"]: 11.0,
        units["ben"]: 12.0,
        units["carl"]: 12.0,
    }
    calls: Counter[tuple[str, float]] = Counter()
    for each in outcomes(store, measured=True):
        calls[each.unit, each.value] += each.times
    assert calls == {
        (units["anna"], 0.5): 3,
        (units["anna"], 1.0): 2,
        (units["ben"], 0.5): 3,
        (units["carl"], 1.0): 1,
    }


def version_of(url: str) -> int:
    with raw(url) as connection:
        return schema.version_of(connection)


def test_units_requests_and_reports_are_known_by_keyed_hashes_only(store_of: Opened, url: str) -> None:
    store = store_of(url)
    strange = "\0\ud800 anna@example.org" + "x" * 100_000
    rows: list[Row] = [ExposureRow("spring", "a", strange, 1.0, False), RequestRow(strange, strange, 1.0)]
    store.write([*rows, OutcomeRow(strange, "", "bought", 1.0, 2.0, strange)])
    with raw(url) as connection:
        found = [str(connection.execute(each.select()).all()) for each in schema.metadata.sorted_tables]
    assert "anna" not in "".join(found)
    assert store.hashed("unit", "anna") != Store(url, KEY + "!").hashed("unit", "anna")


def test_what_is_remembered_of_units_is_bounded(
    store_of: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_UNITS_KEPT", 100)
    store = store_of(f"sqlite:///{tmp_path}/seen.db")
    for begin in range(0, 300, 50):
        store.write([ExposureRow("spring", "a", f"user {n}", 1.0, False) for n in range(begin, begin + 50)])
    store.write([ExposureRow("spring", "a", "x" * 1000, 1.0, False)])
    assert len(store._units) <= 100
    assert not any(len(unit) > 100 for unit in store._units)
    assert len(store.exposures("spring")) == 301


def test_a_reporter_who_guesses_an_id_that_is_made_here_takes_no_record_from_the_gateway(
    store_of: Opened, url: str
) -> None:
    store = store_of(url)
    assert store.write([OutcomeRow("a" * 16 + f"{1:016x}", "spring", "bought", 1.0, 21.0, "anna")]) == 0
    store.write([measured(1, {"anna": [0.5]})])
    assert sorted(each.value for each in outcomes(store, measured=True)) == [0.5, 1.0]


def test_without_a_key_in_the_config_all_who_use_the_store_have_the_same(store_of: Opened, url: str) -> None:
    one, other = store_of(url, None), store_of(url, None)
    assert one.hashed("unit", "anna") == other.hashed("unit", "anna")


def test_several_may_begin_and_write_at_once(store_of: Opened, url: str) -> None:
    def write(number: int) -> None:
        store = Store(url, KEY)
        for batch in range(5):
            rows = [report(each, f"unit {each}") for each in range(batch * 40, batch * 40 + 80)]
            store.write(rows[::-1] if number % 2 else rows)
        store.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes(store_of(url))) == 240


def test_a_later_stop_names_another_arm_and_the_end_stays_when_it_was(store_of: Opened, url: str) -> None:
    store = store_of(url)
    assert store.stops() == {}
    store.stop(Stop("spring", "a", 1.0))
    store.stop(Stop("spring", "b", 2.0))
    assert store_of(url).stops() == {"spring": Stop("spring", "b", 1.0)}


def test_an_id_is_of_one_report_of_one_outcome(store_of: Opened, url: str) -> None:
    store = store_of(url)
    both = [report(1), report(1)._replace(name="back")]
    assert store.write(both) == 0
    assert store.write(both) == 2
    assert len(list(store.outcomes("spring", {"bought": False, "back": False}))) == 2


def test_what_is_older_than_its_time_goes_in_parts(store_of: Opened, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.database._PURGED", 10)
    store = store_of(url)
    store.write([report(number, at=float(number)) for number in range(100)])
    deleted = []
    while deleted[-1:] != [0]:
        deleted.append(store.purge(50.0))
    assert deleted == [10, 10, 10, 10, 10, 0]
    assert len(outcomes(store)) == 50


def test_a_store_of_a_later_version_is_used_as_it_is(store_of: Opened, url: str) -> None:
    store_of(url).write([report(1)])
    with raw(url) as connection:
        connection.execute(text("UPDATE store_version SET number = 99"))
    assert len(outcomes(store_of(url))) == 1


def test_each_version_has_the_tables_that_are_declared(store_of: Opened, url: str) -> None:
    store_of(url)
    with raw(url) as connection:
        found = inspect(connection)
        for table in schema.metadata.sorted_tables:
            assert {each["name"] for each in found.get_columns(table.name)} == set(table.columns.keys())


def test_a_copy_that_can_only_be_read_is_read(store_of: Opened, tmp_path: Path) -> None:
    """One of `VACUUM INTO` writes no log beside it, and cannot be made to."""
    store_of(f"sqlite:///{tmp_path}/gateways.db").write([report(1)])
    with raw(f"sqlite:///{tmp_path}/gateways.db") as connection:
        connection.connection.execute(f"VACUUM INTO '{tmp_path}/copy.db'")
    copy = store_of(f"sqlite:///file:{tmp_path}/copy.db?mode=ro&uri=true")
    assert len(outcomes(copy)) == 1
    with pytest.raises(StoreReadOnly):
        copy.write([report(2)])


def test_a_new_file_that_another_one_opens_too_is_waited_for(store_of: Opened, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "new.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Timer(0.3, other.execute, ["COMMIT"])
    done.start()
    assert not store_of(f"sqlite:///{tmp_path}/new.db").exposures("spring")
    done.join()
    other.close()


@pytest.mark.parametrize(
    "url", ["postgresql://nobody:secret@127.0.0.1:1/none", "sqlite:////proc/none/x.db"], ids=["postgresql", "sqlite"]
)
def test_a_store_that_cannot_be_used_says_so_without_its_password(url: str) -> None:
    with pytest.raises(StoreAway) as caught:
        Store(url).open()
    assert str(caught.value)
    assert "secret" not in str(caught.value) + Store(url).name
