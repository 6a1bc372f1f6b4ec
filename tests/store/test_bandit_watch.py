"""What one worker makes of a bandit's epochs in the store: when the next one begins, by what, and when none does."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watches import Looking, workers

from gateway.experimentation.bandit_analysis import NextShares, RewardQuestion
from gateway.experimentation.bandit_watch import BanditWatch
from gateway.experiments.epochs import WITHOUT_SHARES, Epochs
from gateway.experiments.plan import Amount, BanditPlan, Better, Kind, OutcomeSpec, Plan
from gateway.routing import Arms
from gateway.store import ExposureRow, OutcomeRow, Stop, StoreAway, StoreSettings
from gateway.store.database import Store

BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
PLAN = Plan(
    "spring",
    {"a": 1.0, "b": 1.0},
    "a",
    BOUGHT,
    Amount(0.05, is_relative=False),
    window=60.0,
    model="net",
    bandit=BanditPlan(("a", "b"), BOUGHT, 0.05, 4, 3_600.0),
)
KEYS = [f"user {number}" for number in range(2_000)]


def with_bandit(**changed: Any) -> Plan:
    assert PLAN.bandit is not None
    return replace(PLAN, bandit=replace(PLAN.bandit, **changed))


class Worker(Looking):
    """A watch whose looks the test makes, and what it was told."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.epochs: Mapping[str, Epochs] = {}
        self.watch = BanditWatch(StoreSettings(url), name, self._moved)

    def _moved(self, epochs: Mapping[str, Epochs]) -> None:
        self.epochs = epochs

    def look(self, plan: Plan = PLAN) -> int:
        """How many epochs it knows."""
        self.look_at(plan)
        return len(self.epochs[plan.name].so_far) if plan.name in self.epochs else 0

    def look_until(self, count: int) -> None:
        end = time.monotonic() + 60
        while self.look() < count:
            assert time.monotonic() < end, self.now
            time.sleep(0.05)

    @property
    def now(self) -> Any:
        (found,) = self.watch.now().values()
        return found


Make = Callable[[str], Worker]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bandits.db"


@pytest.fixture
def worker(url: str) -> Iterator[Make]:
    yield from workers(lambda name: Worker(url, name))


def later(url: str, seconds: float) -> None:
    """Let so much time pass since the epochs began."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE bandit_epoch SET since = since - ?", (seconds,))


def seen(url: str, epochs: Epochs, *, ago: float, rates: Mapping[str, float] = {"a": 0.2, "b": 0.7}) -> None:
    """Users have come to the epochs that have begun, and some of each ten have bought."""
    arms = Arms("spring", PLAN.shares, "a", "l", slices=4, epochs=tuple(each.shares for each in epochs.so_far))
    store, at, rows = Store(url), time.time() - ago, list[ExposureRow | OutcomeRow]()
    for number, key in enumerate(KEYS):
        reason, arm = arms.maybe_assign(key) or ("", "")
        of_epoch = arms.maybe_propensity(key, arm)
        if reason == arms.reason and of_epoch is not None:
            rows.append(ExposureRow("spring", arm, key, at, False, *of_epoch))
            value = float(number % 10 < 10 * rates[arm])
            rows.append(OutcomeRow(key, "", "bought", value, at + 1.0, key))
    store.write(rows)
    store.close()


def test_the_first_epoch_begins_at_once_and_even_and_one_of_two_workers_begins_it(worker: Make) -> None:
    one, other = worker("a"), worker("b")
    assert (one.look(), other.look()) == (1, 1)
    assert one.epochs == other.epochs
    assert one.epochs["spring"].so_far[0].shares == {"a": 0.5, "b": 0.5}
    assert [one.now.decides, other.now.decides] == [True, False]
    assert (one.now.epoch, one.now.epochs, one.now.shares, one.now.trouble) == (1, 4, {"a": 0.5, "b": 0.5}, "")
    assert one.look() == 1  # the next one is not due


def test_the_next_epoch_follows_the_rewards_and_the_last_one_ends_it(worker: Make, url: str) -> None:
    one, other = worker("a"), worker("b")
    one.look()
    for number in (2, 3, 4):
        seen(url, one.epochs["spring"], ago=300.0)
        later(url, 3_600.0)
        one.look_until(number)
        assert other.look() == number
    last = one.epochs["spring"].so_far[-1]
    assert last.shares["b"] == pytest.approx(0.95, abs=0.001)
    assert last.units == pytest.approx(len(KEYS) * 3 / 4, rel=0.05)
    assert one.epochs["spring"].so_far[0].shares == {"a": 0.5, "b": 0.5}
    later(url, 1e6)
    assert (one.look(), one.now.overdue, one.now.decides) == (4, 0.0, False)
    assert [units for _, units, _ in one.now.history][:2] == [0, pytest.approx(len(KEYS) / 4, rel=0.1)]


def test_units_whose_window_has_not_passed_say_nothing_yet_and_the_next_epoch_waits_for_them(
    worker: Make, url: str
) -> None:
    """Nor does it begin while nobody comes, or who comes is not rewarded: slices would be opened for nothing."""
    one, plan = worker("a"), with_bandit(epoch=30.0)
    one.look(plan)
    later(url, 31.0)
    seen(url, one.epochs["spring"], ago=5.0)
    end = time.monotonic() + 60
    while not one.now.waits:
        assert one.look(plan) == 1
        assert time.monotonic() < end, one.now
        time.sleep(0.05)
    assert (one.now.waits, one.now.overdue > 0.0) == (
        "no unit's reward has become known since the last epoch began",
        True,
    )
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        for table in ("exposure", "outcome"):
            database.execute(f"UPDATE {table} SET at = at - 300")
    while one.look(plan) < 2:
        assert time.monotonic() < end, one.now
        time.sleep(0.05)
    assert one.epochs["spring"].so_far[1].shares["b"] > 0.9
    assert one.now.waits == ""


def test_a_slice_to_which_nobody_belongs_does_not_hold_up_those_behind_it_for_ever(worker: Make, url: str) -> None:
    """Who comes is in slices that are not open yet, so that no reward becomes known."""
    one = worker("a")
    one.look()
    seen(url, one.epochs["spring"], ago=300.0)
    later(url, 3_600.0)
    one.look_until(2)
    later(url, 25 * 3_600.0)
    one.look_until(3)
    first, second, third = one.epochs["spring"].so_far
    assert first.units < second.units == third.units
    assert third.shares == second.shares


def test_a_store_that_is_away_moves_nothing_and_a_new_worker_finds_what_there_was(
    worker: Make, url: str, tmp_path: Path
) -> None:
    one, file = worker("a"), tmp_path / "bandits.db"
    one.look()
    later(url, 3_600.0)
    one.watch._opened().close()
    for each in tmp_path.glob("bandits.db*"):
        each.rename(tmp_path / f"moved-{each.name}")
    file.mkdir()
    with pytest.raises(StoreAway):
        one.look()
    one.watch._found_away("it is gone")
    assert (one.now.epoch, one.now.decides, one.now.trouble) == (1, False, "the store is away: it is gone")
    assert len(one.epochs["spring"].so_far) == 1
    file.rmdir()
    for each in tmp_path.glob("moved-*"):
        each.rename(tmp_path / each.name.removeprefix("moved-"))
    assert worker("b").look() == 1  # after a restart


def test_a_plan_with_other_arms_needs_another_name(worker: Make) -> None:
    one = worker("a")
    one.look()
    third = with_bandit(arms=("a", "b", "c"))
    assert one.look(replace(third, shares={"a": 1.0, "b": 1.0, "c": 1.0})) == 0
    assert one.now.trouble == "its name was used for arms a, b of 'net' before: choose another one"
    assert not one.now.decides
    assert one.look() == 1


def test_the_number_of_epochs_stays_what_it_was_at_the_start(worker: Make) -> None:
    """Cut into other slices units would change their arms."""
    one = worker("a")
    one.look()
    assert one.look(with_bandit(slices=40)) == 1
    assert one.epochs["spring"].slices == 4
    assert one.now.trouble == "has 4 epochs, as at its start: with 40 units would change arms"
    assert one.now.decides


def test_a_stopped_experiment_has_no_further_epoch(worker: Make, url: str) -> None:
    one = worker("a")
    one.look()
    store = Store(url)
    store.stop(Stop("spring", "b", 1.0))
    store.close()
    later(url, 1e6)
    assert (one.look(), one.now.decides, one.now.overdue) == (1, False, 0.0)


def test_without_shares_that_can_be_found_they_stay_and_it_is_told(
    worker: Make, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker("a")
    one.look()
    later(url, 3_700.0)
    one.watch._settings = StoreSettings("postgresql://gateway@127.0.0.1:9/none")  # for the process that judges
    end = time.monotonic() + 60
    while not one.now.trouble:
        one.look()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "StoreAway" in one.now.trouble
    assert (one.now.epoch, one.now.overdue > 90.0) == (1, True)
    assert "no further epoch begins" in caplog.text


def test_without_scipy_the_first_epoch_is_all_there_is(
    worker: Make, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in the process that needs it, which has this one's path."""
    missing = tmp_path / "without" / "scipy"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text("raise ModuleNotFoundError('none here', name='scipy')")
    monkeypatch.syspath_prepend(missing.parent)
    one = worker("a")
    one.look()
    later(url, 3_700.0)
    end = time.monotonic() + 60
    while not one.now.trouble:
        one.look()
        assert time.monotonic() < end
        time.sleep(0.05)
    first = one.epochs["spring"].so_far[0]
    assert (one.now.epoch, first.shares) == (1, {"a": 0.5, "b": 0.5})
    assert one.now.trouble == f"{WITHOUT_SHARES}: needs scipy: pip install 'inference-gateway[experiments]'"
    arms = Arms("spring", PLAN.shares, "a", "l", slices=4, epochs=(first.shares,))
    assigned = [arms.maybe_assign(key) or ("", "") for key in KEYS]
    assert {arm for reason, arm in assigned if reason != arms.reason} == {"a"}


class Here:
    """Answers at once, in this process, in place of one that takes seconds to start."""

    is_free = True

    def __init__(self) -> None:
        self._answer: NextShares | None = None

    def ask(self, question: RewardQuestion) -> None:
        self._answer = question.answered()

    def maybe_answer(self) -> NextShares | None:
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None: ...


@pytest.mark.parametrize("users", [4, 12, 60])
def test_however_few_come_all_epochs_begin_and_each_slice_of_nobody_costs_25_at_most(
    worker: Make, url: str, users: int
) -> None:
    """Hours are simulated. The same users come each hour, to twelve slices; their rewards are all that is known."""
    slices, hours, plan = 12, 0, with_bandit(slices=12)
    one, store = worker("a"), Store(url)
    one.watch._analyses = Here()  # type: ignore[assignment]
    places = Arms("spring", PLAN.shares, "a", "l", slices=slices, epochs=(PLAN.shares,) * slices)
    empty = set(range(slices)) - {places.maybe_epoch(key) for key in KEYS[:users]}
    met: dict[str, str] = {}
    while one.look(plan) < slices:  # which takes the answer to the question of the look before
        arms = replace(places, epochs=tuple(each.shares for each in one.epochs["spring"].so_far))
        for key in KEYS[:users]:
            reason, arm = arms.maybe_assign(key) or ("", "")
            assert met.get(key, arm) == arm
            of_epoch = arms.maybe_propensity(key, arm)
            if reason == arms.reason and key not in met and of_epoch is not None:
                met[key] = arm
                store.write([ExposureRow("spring", arm, key, time.time(), False, *of_epoch)])
        hours += 1
        with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
            for table, column in (("bandit_epoch", "since"), ("exposure", "at")):
                database.execute(f"UPDATE {table} SET {column} = {column} - 3600")
        one.watch._followed["spring"].asked = 0.0  # which is on the real clock
        one.look(plan)
    store.close()
    assert len(met) == users - sum(places.maybe_epoch(key) == slices - 1 for key in KEYS[:users])
    assert hours <= slices + 25 * len(empty)
