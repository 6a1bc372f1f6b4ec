"""The recorder: nobody waits for the database, what waits is bounded, and one bad record takes no other with it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from postgres import Postgres
from slowness import slowness

from gateway.forwarding.exposures import Tally
from gateway.store import ExposureRow, MeasuredRow, OutcomeRow, Recorder, Stop, StoreSettings
from gateway.store.database import Store

KEY = "a key that nobody guesses"


@contextlib.contextmanager
def recorder(url: str, queue: int = 1000, **callbacks: Callable[..., None]) -> Iterator[Recorder]:
    made = Recorder(StoreSettings(url, KEY, queue=queue), **callbacks)  # type: ignore[arg-type]
    made.start()
    yield made
    made.stop(60.0)


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def rows(count: int, begin: int = 0) -> list[OutcomeRow]:
    return [OutcomeRow(f"{n}", "", "bought", 1.0, time.time(), "anna") for n in range(begin, begin + count)]


def count(url: str) -> int:
    store = Store(url, KEY)
    try:
        return len(list(store.outcomes("spring", {"bought": False})))
    finally:
        store.close()


def test_what_waits_at_the_end_is_written(url: str) -> None:
    with recorder(url) as made:
        assert made.offer(rows(500)) == 500
    assert (count(url), made.done, made.state.written) == (500, 500, 500)


def test_what_comes_while_the_store_is_away_waits_up_to_the_bound_and_is_written_later(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    url, lost = f"sqlite:///{folder}/e.db", []
    with recorder(url, on_loss=lambda: lost.append(True)) as made:
        until(lambda: made.state.is_away, "it is away")
        assert made.offer(rows(900)) == 900
        assert not made.has_room(200)
        assert made.offer(rows(200, 900)) == 100
        for _ in range(5):
            made.offer([ExposureRow("spring", "a", "anna", time.time(), False)])
        assert (made.waiting, made.state.dropped) == (1000, 105)
        time.sleep(1.5)  # it was looked at once more
        assert not lost  # to tell units anew would lose them again
        folder.mkdir()
        until(lambda: made.waiting == 0 and bool(lost), "all is written")
        assert (made.state.is_away, made.state.why, count(url)) == (False, "", 1000)
        made.offer(rows(5, 900))
        until(lambda: made.waiting == 0, "they are written")
    assert lost == [True]


def test_what_was_measured_of_many_units_takes_room_for_each(tmp_path: Path) -> None:
    """Of one that does not fit, the first units are kept."""
    folder = tmp_path / "later"
    url = f"sqlite:///{folder}/e.db"
    with recorder(url) as made:
        until(lambda: made.state.is_away, "it is away")
        for number in range(3):
            tallies = {f"user {n}": Tally(1) for n in range(400)}
            for tally in tallies.values():
                tally.counts[0], tally.values = 1, {(0, 1.0): 1}
            row = MeasuredRow("a" * 16, number, "spring", time.time(), ("bought",), tallies, 800)
            assert made.offer([row]) == (800, 200, 0)[number]
        assert (made.waiting, made.state.dropped) == (1000, 600 + 800)
        folder.mkdir()
        until(lambda: made.waiting == 0, "all is written")
        assert made.state.written == 1000
    store = Store(url, KEY)
    assert len(list(store.outcomes("spring", {"bought": True}))) == 2 * 500
    store.close()


def test_a_record_that_the_database_refuses_takes_no_other_with_it(url: str) -> None:
    with recorder(url) as made:
        wrong = ExposureRow("spring", None, "anna", time.time(), False)  # type: ignore[arg-type]
        made.offer([*rows(5), wrong, *rows(5, 5)])
        until(lambda: made.done == 11, "all is dealt with")
        assert (made.state.refused, made.state.written, made.state.is_away) == (1, 10, False)
    assert count(url) == 10


def test_a_stop_is_told_once_to_everybody(url: str) -> None:
    told: list[Mapping[str, Stop]] = []
    with recorder(url, on_stops=told.append), recorder(url, on_stops=told.append):
        until(lambda: len(told) == 2, "both know that there is none")
        store = Store(url, KEY)
        store.stop(Stop("spring", "a", 1.0))
        store.close()
        until(lambda: len(told) == 4, "both know of it")
        assert {each["spring"].arm for each in told[2:]} == {"a"}


def test_who_may_only_read_the_store_follows_what_was_stopped_and_says_that_nothing_is_written(
    postgres: Postgres,
) -> None:
    postgres.empty()
    told: list[Mapping[str, Stop]] = []
    store = Store(postgres.url)
    store.open()
    with postgres.reader() as url, recorder(url, on_stops=told.append) as made:
        made.offer(rows(3))
        until(lambda: bool(told) and made.state.is_away, "it was read")
        store.stop(Stop("spring", "b", 5.0))
        until(lambda: told[-1] == {"spring": Stop("spring", "b", 5.0)}, "the stop is known")
        assert "it can only be read here" in made.state.why
        assert made.waiting == 3
    store.close()


def test_five_thousand_records_a_second_need_less_than_a_core(url: str) -> None:
    """CPU time of this process's side, for exposures and outcomes alike."""
    cpu: list[float] = []

    def write() -> None:
        store = Store(url, KEY)
        store.open()
        began = time.thread_time()
        for begin in range(0, 10_000, 2000):
            units = [f"user {n}" for n in range(begin, begin + 1000)]
            store.write([ExposureRow("spring", "a", unit, 1.0, False) for unit in units])
            store.write([OutcomeRow(unit, "", "bought", 1.0, 5.0, unit) for unit in units])
        cpu.append(time.thread_time() - began)
        store.close()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert cpu[0] < 2.0 * slowness()
