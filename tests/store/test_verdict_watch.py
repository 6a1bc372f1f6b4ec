"""What one worker makes of verdicts in the store: who finds them, how often, and what is said of a breach."""

from __future__ import annotations

import logging
import math
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watches import Looking, workers

from gateway.experimentation.verdict_watch import VerdictWatch
from gateway.experiments.plan import MEASURED_SECONDS, Amount, Better, Guardrail, Kind, OutcomeSpec, Plan
from gateway.store import ExposureRow, OutcomeRow, Stop, StoreSettings
from gateway.store.database import Store
from gateway.store.verdicts import Verdict, VerdictStore, mark_of

LATENCY = OutcomeSpec("latency", Kind.DURATION, Better.LOWER)
PLAN = Plan(
    "spring",
    {"a": 1.0, "b": 1.0},
    "a",
    OutcomeSpec("bought", Kind.BINARY, Better.HIGHER),
    Amount(0.05, is_relative=False),
    guardrails=(Guardrail(LATENCY, Amount(0.1, is_relative=True)),),
    units=500,
    model="net",
)
BREACHED = "experiment spring: guardrail breached: latency of 'b': "


class Worker(Looking):
    """A watch whose looks the test makes."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.room = 1 << 30  # bytes
        self.watch = VerdictWatch(StoreSettings(url), name, lambda: self.room, first_after=0.0)

    def look(self, *plans: Plan) -> Any:
        """What is known of the first plan; None: nothing yet."""
        given = plans or (PLAN,)
        self.look_at(*given)
        return next((each for each in self.watch.latest() if each["name"] == given[0].name), None)

    def look_until_told(self, *plans: Plan) -> Any:
        end = time.monotonic() + 60
        while (found := self.look(*plans)) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        return found

    @property
    def now(self) -> Any:
        return self.watch.now()["spring"]

    @property
    def is_asked(self) -> bool:
        return self.watch._analyses.is_asked

    def end(self) -> None:
        store = self.watch._close()
        if store is not None:
            store.release(self.name)
            store.close()


Make = Callable[[str], Worker]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/verdicts.db"


@pytest.fixture
def worker(url: str) -> Iterator[Make]:
    yield from workers(lambda name: Worker(url, name))


def fill(url: str, slower: float = 0.5, count: int = 400, name: str = "spring") -> None:
    """Users of whom those on b buy as often as the others, and wait longer."""
    draw, store, rows = random.Random(5), Store(url), list[ExposureRow | OutcomeRow]()
    began = time.time() - 60.0 * count
    for number in range(count):
        arm, unit, at = "ab"[number % 2], f"user {number}", began + 60.0 * number
        rows.append(ExposureRow(name, arm, unit, at, False))
        rows.append(OutcomeRow(f"{name} b{number}", name, "bought", float(draw.random() < 0.3), at + 1.0, unit))
        waited = draw.lognormvariate(-3, 0.3) * (1.0 + slower * (number % 2))
        rows.append(OutcomeRow(f"{name} l{number}", name, "latency", waited, at + 1.0, unit))
    store.write(rows)
    store.close()


def later(url: str, seconds: float) -> None:
    """Let so much time pass since the verdicts were found."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE verdict SET at = at - ?", (seconds,))


def holds(url: str, verdict: Verdict) -> None:
    """Have the store hold it, and nobody its lease."""
    store = VerdictStore(url)
    store.look("before", {verdict.experiment: None}, 60.0)
    assert store.put(verdict, "before")
    store.release("before")
    store.close()


def test_one_worker_finds_a_verdict_and_all_know_it(worker: Make, url: str) -> None:
    fill(url)
    one, other = worker("a"), worker("b")
    told = one.look_until_told()
    assert (told["answer"], told["arms"]) == ("baseline", {"a": 200, "b": 200})
    assert other.look() == told
    assert (one.now.decides, other.now.decides) == (True, False)
    for each in (one, other):
        assert each.now.judgements == [("b", "bought", "undecided")]
        (guardrail,) = each.now.guardrails
        assert (guardrail.arm, guardrail.outcome, guardrail.state) == ("b", "latency", "breached")
        assert guardrail.distance < 0.0
        assert each.now.age < 60.0
    assert one.watch._analyses._process is None  # it is not kept until the next one is due


def test_a_breach_is_told_once_by_whoever_finds_it_first(
    worker: Make, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fill(url)
    one = worker("a")
    first = one.look_until_told()
    (line,) = [record.getMessage() for record in caplog.records if "breached" in record.getMessage()]
    assert line.startswith(BREACHED)
    assert line.endswith("(at most 10 % worse)")
    one.end()
    later(url, 3_600.0)
    other = worker("b")
    end = time.monotonic() + 60
    while (second := other.look())["at"] == first["at"] or other.now.age > 60.0:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [each["breached_at"] for each in second["guardrails"]] == [first["at"]]
    assert len([record for record in caplog.records if "breached" in record.getMessage()]) == 1


def test_a_guardrail_that_holds_is_told_of_to_nobody(worker: Make, url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fill(url, slower=-0.2)
    one = worker("a")
    one.look_until_told()
    (guardrail,) = one.now.guardrails
    assert guardrail.state == "held"
    assert guardrail.distance > 0.0
    assert caplog.records == []


def test_nothing_is_started_while_nobody_takes_part(worker: Make) -> None:
    one = worker("a")
    assert one.look() == {"name": "spring", "trouble": "nobody takes part yet"}
    assert not one.is_asked
    assert one.watch._analyses._process is None
    assert (one.now.judgements, one.now.guardrails) == ((), ())
    assert one.now.age < 60.0


def test_a_verdict_rests_thirty_times_as_long_as_it_took(worker: Make, url: str) -> None:
    """So a large experiment costs a thirtieth of a core, also of workers that start anew."""
    fill(url, count=10)
    told = {"name": "spring", "trouble": "so it was"}
    holds(url, Verdict("spring", mark_of(PLAN), time.time(), 20.0, told))
    for seconds, is_due in ((0.0, False), (550.0, False), (100.0, True)):
        later(url, seconds)
        one = worker(f"after {seconds}")
        assert one.look() == told
        assert one.is_asked == is_due
        one.end()


def test_one_at_a_time_and_who_has_waited_longest_comes_first(worker: Make, url: str) -> None:
    plans = [PLAN, replace(PLAN, name="autumn")]
    for plan in plans:
        fill(url, count=10, name=plan.name)
    one = worker("a")
    one.look_until_told(*plans)
    assert one.look(plans[1], plans[0]) is None
    assert not one.is_asked  # it rests
    one.watch._rests_until = 0.0
    assert one.look_until_told(plans[1], plans[0])["units"] == 10


def test_a_plan_that_says_something_else_is_judged_anew(worker: Make, url: str) -> None:
    fill(url)
    one, changed = worker("a"), replace(PLAN, guardrails=(Guardrail(LATENCY, Amount(2.0, is_relative=True)),))
    assert one.look_until_told()["guardrails"][0]["state"] == "breached"
    one.watch._rests_until = 0.0
    assert one.look(changed) is None
    assert one.look_until_told(changed)["guardrails"][0]["state"] == "held"


def test_an_experiment_that_was_stopped_says_with_what_and_wakes_nobody(
    worker: Make, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(url)
    store = Store(url)
    store.stop(Stop("spring", "a", time.time()))
    store.close()
    assert worker("a").look_until_told()["stopped"]["arm"] == "a"
    assert caplog.records == []


def test_what_happens_after_a_stop_changes_no_verdict(worker: Make, url: str) -> None:
    """Everybody has one arm by then, so reports of units that go on would make the arms alike."""
    fill(url)
    store, end = Store(url), time.time() - 3600.0
    store.stop(Stop("spring", "a", end))
    one = worker("a")
    before = one.look_until_told()
    assert (before["at"], before["guardrails"][0]["state"]) == (end + MEASURED_SECONDS, "breached")
    ats = [end + 60.0 + n % 300 for n in range(4000)]
    store.write([OutcomeRow(f"{n}", "spring", "latency", 0.05, at, f"user {n % 400}") for n, at in enumerate(ats)])
    store.stop(Stop("spring", "b", time.time()))
    store.close()
    later(url, 7200.0)
    one.watch._rests_until, one.watch._followed["spring"].asked = 0.0, -math.inf
    end_of_wait = time.monotonic() + 60
    while (after := one.look())["left_out"] == before["left_out"]:
        assert time.monotonic() < end_of_wait
        time.sleep(0.05)
    assert (before["left_out"], after["left_out"]) == ("118 reports after the end", "4118 reports after the end")
    same = ("at", "units", "arms", "answer")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert after["guardrails"] == before["guardrails"]
    assert after["stopped"] == {"arm": "b", "at": end}


def test_units_that_come_again_after_their_exposure_was_forgotten_have_no_past(worker: Make, url: str) -> None:
    """What they did meanwhile they did in their arm: adjusted by that, an arm that is slower would not be."""
    fill(url)
    store, now = Store(url), time.time()
    while store.purge(now - 60.0 * 200):
        pass
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM exposure")
    for n in range(200, 400):
        met = ExposureRow("spring", "ab"[n % 2], f"user {n}", now - 120.0, False)
        store.write([met, OutcomeRow(f"{n}", "spring", "latency", (0.05, 0.08)[n % 2], now - 60.0, met.unit)])
    store.close()
    told = worker("a").look_until_told()
    assert told["guardrails"][0]["past"] is None
    assert any("are forgotten (`store.retention`)" in each for each in told["doubts"])
    assert told["since"] == pytest.approx(now - 60.0 * 400, abs=60.0)


def test_without_scipy_it_says_so_once_and_knows_what_others_find(
    worker: Make, url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(url, slower=-0.2)
    monkeypatch.setattr("gateway.experimentation.verdict_watch.find_spec", lambda name: None)
    without = worker("a")
    assert "pip install 'inference-gateway[experiments]'" in without.look()["trouble"]
    assert without.watch.now() == {}  # so that no verdict is missed where none is to be
    monkeypatch.undo()
    told = worker("b").look_until_told()
    assert without.look() == told
    assert (without.now.decides, without.now.guardrails[0].state) == (False, "held")
    assert len([each for each in caplog.records if "needs SciPy" in each.getMessage()]) == 1


def test_nothing_is_started_while_memory_is_scarce(worker: Make, url: str) -> None:
    fill(url, count=10)
    one = worker("a")
    one.room = 100_000_000
    assert (one.look(), one.is_asked) == (None, False)
    one.room = 1 << 30
    assert one.look_until_told()["units"] == 10


def test_what_would_take_the_memory_of_calls_ends_and_says_so(url: str) -> None:
    """A report holds all units; the kernel would end whoever has most."""
    fill(url, count=3_000)
    code = f"""
from gateway.experimentation.verdict_analysis import VerdictQuestion
from test_verdict_watch import PLAN
question = VerdictQuestion({url!r}, None, PLAN, 2e9, False, {1 << 20})
try:
    question.answered()
except Exception as error:
    print(question.failed(f"{{type(error).__name__}}: {{error}}").trouble)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    assert done.stdout == "it takes more memory than the 1 MiB that can be spared for it\n"


def test_a_process_that_ends_without_an_answer_is_trouble_and_leaves_the_verdict_before(
    worker: Make, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(url, count=10)
    one = worker("a")
    one.look()
    process = one.watch._analyses._process
    assert process is not None
    process.kill()
    assert "has ended" in one.look_until_told()["trouble"]
    known = one.watch._followed["spring"]
    one.watch._rests_until, known.asked, known.verdict = 0.0, 0.0, None
    later(url, 3_600.0)
    end = time.monotonic() + 60
    while (before := one.look())["trouble"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    one.watch._rests_until, known.asked = 0.0, 0.0
    later(url, 3_600.0)
    one.look()
    process = one.watch._analyses._process
    assert process is not None
    process.kill()
    while one.is_asked:
        assert one.look() == before
        time.sleep(0.05)
    assert one.look() == before
    assert one.now.age > 3_600.0
    assert any("no verdict on experiment spring can be found" in each.getMessage() for each in caplog.records)


def test_a_process_that_hung_keeps_verdicts_away_for_no_hours(worker: Make, url: str) -> None:
    """It is given up after ten minutes, in which it may have waited for the store: guardrails must be watched on."""
    fill(url, count=10)
    one = worker("a")
    one.look()
    process = one.watch._analyses._process
    assert process is not None
    process.kill()
    one.watch._asked_at -= 600.0
    one.look_until_told()
    assert one.watch._rests_until - time.monotonic() <= 1800.0


def test_who_has_lost_the_lease_writes_nothing(worker: Make, url: str) -> None:
    store = VerdictStore(url)
    store.look("b", {"spring": None}, 15.0)
    assert not store.put(Verdict("spring", mark_of(PLAN), 1.0, 1.0, {}), "a")
    assert store.look("b", {"spring": None}, 0.0).verdicts == {}
    store.close()
    assert worker("a").look() is None
