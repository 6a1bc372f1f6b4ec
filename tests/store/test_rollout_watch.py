"""What one worker makes of the store: whose word counts, what is added up, and what nothing is decided by."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from postgres import Postgres
from sqlalchemy import delete, text
from watches import Looking, workers

from gateway.errors import CommandFailed
from gateway.experimentation import rollout_watch
from gateway.experimentation.analysis_process import AnalysisProcess
from gateway.experimentation.rollout_analysis import StepAnalysis, StepQuestion
from gateway.experimentation.rollout_commands import RolloutCommands
from gateway.experimentation.rollout_watch import RolloutWatch
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, OutcomeSpec
from gateway.experiments.rollout import Command, Phase, RolloutPlan, State, Step, commanded
from gateway.store import ExposureRow, OutcomeRow, StoreAway, StoreSettings, schema
from gateway.store.rollouts import Counts, RolloutStore

PLAN = RolloutPlan("int8", "net", "old", "new", (Step(0.1, 0.0), Step(0.5, 0.0)))
SLOW = replace(PLAN, steps=(Step(0.1, 3600.0), Step(0.5, 3600.0)))
BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
GUARDED = replace(
    SLOW, steps=(Step(0.5, 3600.0), Step(0.6, 1.0)), guardrails=(Guardrail(BOUGHT, Amount(0.05, False)),), units=300
)

FIRST = State(Phase.RUNNING, 0, 0.5, version=1)


class Worker(Looking):
    """A watch whose looks the test makes, and what it was told."""

    def __init__(self, url: str, name: str) -> None:
        self.counts: dict[tuple[str, str], Counts] = {}
        self.states: Mapping[Any, State] = {}
        self.watch = RolloutWatch(StoreSettings(url), name, lambda: self.counts, self._moved)
        self.watch.ready = frozenset({"int8"})

    def _moved(self, states: Mapping[Any, State]) -> None:
        self.states = states

    def look(self, plan: RolloutPlan = PLAN) -> State:
        self.look_at(plan)
        return self.states[plan.key]

    @property
    def now(self) -> Any:
        (found,) = self.watch.now()
        return found


Make = Callable[[str], Worker]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/rollouts.db"


@pytest.fixture
def worker(url: str) -> Iterator[Make]:
    yield from workers(lambda name: Worker(url, name))


def often(times: int, counts: Counts) -> Counts:
    sums = {name: times * getattr(counts, name) for name in ("good", "errors", "unanswered", "not_finite", "wrong")}
    return counts._replace(**sums)


def test_before_the_store_was_read_nobody_has_moved_and_one_of_two_workers_decides(worker: Make) -> None:
    one, other = worker("a"), worker("b")
    assert one.states == {}
    assert [one.look().phase, other.look().phase] == [Phase.RUNNING, Phase.RUNNING]
    assert [one.look().share, other.look().share] == [0.5, 0.5]
    assert [one.now.decides, other.now.decides] == [True, False]
    assert one.look().phase is Phase.PROMOTED
    assert [each for _, each, _, _ in one.now.history] == ["running", "running", "promoted"]


def test_it_waits_for_its_variant_and_says_so(worker: Make) -> None:
    one = worker("a")
    one.watch.ready = frozenset()
    assert one.look().phase is Phase.WAITING
    assert one.now.waits == ("'new' is not ready",)
    one.watch.ready = frozenset({"int8"})
    assert one.look().phase is Phase.RUNNING


def test_what_failed_at_an_idle_worker_long_ago_does_not_count_again(
    worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store forgets workers that are gone. One that has no calls is not: its counts would come back as new ones."""
    later, now = [0.0], RolloutStore.now_of
    monkeypatch.setattr(RolloutStore, "now_of", lambda store, connection: now(store, connection) + later[0])
    one, idle = worker("a"), worker("idle")
    idle.counts = {("int8", "new"): Counts(errors=500), ("int8", "old"): Counts(good=500)}
    state = [each.look(SLOW) for each in (one, idle, one)][-1]
    for hours in (0.9, 1.8):
        later[0] = 3600.0 * hours
        monkeypatch.setattr(rollout_watch, "_TELL_SECONDS", 0.0)
        state = one.look(SLOW)
        idle.look(SLOW)
        command = Command.PAUSE if state.phase is Phase.RUNNING else Command.RESUME
        assert one.watch._opened().decide(SLOW, commanded(SLOW, state, command, "anna", state.at + later[0]))
        one.look(SLOW)
    assert one.now.decides
    for calls in (1, 2, 3):
        idle.counts["int8", "new"] = Counts(good=calls, errors=500)
        one.counts = {("int8", "old"): Counts(good=10 * calls)}
        idle.look(SLOW)
        assert one.look(SLOW).phase is Phase.RUNNING


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (Counts(errors=8), "32 errors"),
        (Counts(unanswered=8), "32 unanswered"),
        (Counts(not_finite=8), "32 NaN or Inf"),
        (Counts(wrong=8), "32 wrong answers: NaN, Inf"),
    ],
    ids=["errors", "no answers", "NaN", "NaN in whose place another answered"],
)
def test_bad_calls_of_all_workers_add_up(worker: Make, bad: Counts, told: str) -> None:
    one, other = worker("a"), worker("b")
    for each in (one, other, one):
        each.look(SLOW)
    for times in (1, 2):
        for each in (one, other):
            so_often = often(times, bad)
            each.counts = {("int8", "new"): so_often, ("int8", "old"): Counts(good=100 * times, finite=10 * times)}
        other.look(SLOW)
        found = one.look(SLOW)
    assert found.phase is Phase.ROLLED_BACK
    assert told in found.reason
    assert other.look(SLOW).share == 0.0


@pytest.mark.parametrize(
    ("old", "phase"),
    [
        (Counts(errors=30), Phase.PAUSED),
        (Counts(good=30, not_finite=30), Phase.RUNNING),
        (Counts(good=30), Phase.ROLLED_BACK),
    ],
    ids=["both fail", "both answer NaN", "the new one alone"],
)
def test_what_the_old_variant_does_as_well_takes_nobody_back(worker: Make, old: Counts, phase: Phase) -> None:
    one = worker("a")
    one.look(SLOW), one.look(SLOW)
    new = Counts(good=30, not_finite=30) if old.not_finite else Counts(errors=30)
    for times in (1, 2):
        all_of = {"new": new, "old": old}
        one.counts = {("int8", variant): often(times, each) for variant, each in all_of.items()}
        found = one.look(SLOW)
    assert found.phase is phase


def test_a_caller_at_two_workers_is_one_and_takes_nothing_back_alone(worker: Make) -> None:
    one, other = worker("a"), worker("b")

    def calling(times: int, flooding: int, honest_bad: int = 0) -> Counts:
        """He is in the first place; who shares no place with him calls once in a look."""
        good, bad = [0] * 32, [0] * 32
        for place in (0, 16):
            bad[place] = times * flooding
        for place in (1, 17):
            good[place], bad[place] = times * (1 - honest_bad), times * honest_bad
        return Counts(good=good[1], errors=bad[0] + bad[1], ended_good=tuple(good), ended_bad=tuple(bad))

    for each in (one, other, one):
        each.look(SLOW)
    for times in range(1, 40):
        for each in (one, other):
            each.counts = {("int8", "new"): calling(times, 50), ("int8", "old"): Counts(good=10 * times)}
            found = each.look(SLOW)
        assert found.phase is Phase.RUNNING
    for times in range(40, 60):  # until the other one's calls fail as well
        for each in (one, other):
            counts = calling(times, 50, 1)._replace(good=39, ended_good=(0, 39, *[0] * 15, 39, *[0] * 14))
            each.counts = {("int8", "new"): counts, ("int8", "old"): Counts(good=10 * times)}
            found = each.look(SLOW)
    assert found.phase is Phase.ROLLED_BACK


def test_calls_from_before_it_decided_count_for_nothing(worker: Make) -> None:
    """Another worker has looked at them; since then the variant may have been mended."""
    one = worker("a")
    one.counts = {("int8", "new"): Counts(errors=30)}
    for _ in range(3):
        assert one.look(SLOW).phase is Phase.RUNNING


def test_what_the_next_leader_saw_before_it_was_one_counts_if_the_variant_is_bad_still(
    worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader was stopped as the variant broke; by the end of its lease no calls are left that would tell."""
    later, now = [0.0], RolloutStore.now_of
    monkeypatch.setattr(RolloutStore, "now_of", lambda store, connection: now(store, connection) + later[0])
    leader, heir = worker("a"), worker("b")
    for each in (leader, heir):
        each.look(SLOW)
    bad = tuple([1] * 4 + [0] * 12) * 2  # four callers, each a unit

    def calling(times: int, left_alone: int) -> dict[tuple[str, str], Counts]:
        new = Counts(errors=4, left_alone=left_alone, ended_good=(0,) * 32, ended_bad=bad)
        old = Counts(good=16 * times, ended_good=(times,) * 32, ended_bad=(0,) * 32)
        return {("int8", "new"): new, ("int8", "old"): old}

    for times in (1, 2, 3):
        heir.counts = calling(times, 20 * (times - 1))
        assert heir.look(SLOW).phase is Phase.RUNNING
    later[0] = 60.0
    for times in (4, 5, 6):
        heir.counts = calling(times, 20 * (times - 1))
        found = heir.look(SLOW)
    assert found.phase is Phase.ROLLED_BACK
    assert "4 errors, 100 not tried after that" in found.reason


def test_counts_that_began_anew_are_no_calls_taken_back(worker: Make) -> None:
    """Another worker's config had no rollout for a moment: less than before is no evidence of anything."""
    one, other = worker("a"), worker("b")
    for each in (one, other):
        each.look(SLOW)
    for good in (500, 5, 10):
        other.counts = {("int8", variant): Counts(good=good) for variant in ("old", "new")}
        other.look(SLOW)
        assert one.look(SLOW).phase is Phase.RUNNING
        assert len(one.now.waits) == 1
        assert "soak time" in one.now.waits[0]


def test_while_the_store_is_away_the_last_state_holds(worker: Make, tmp_path: Path) -> None:
    one = worker("a")
    one.look(SLOW)
    file, away = tmp_path / "rollouts.db", tmp_path / "away.db"
    one.watch._opened().close()
    file.rename(away)
    file.mkdir()
    with pytest.raises(StoreAway):
        one.look(PLAN)  # whose steps are over at once
    one.watch._found_away("it is gone")
    assert (one.now.share, one.now.phase, one.now.decides) == (0.1, "running", False)
    assert one.now.trouble == "the store is away: it is gone"
    file.rmdir()
    away.rename(file)
    one.watch._found_there()
    assert one.look(SLOW).share == 0.1
    assert one.now.trouble == ""


def test_a_store_that_knows_nothing_any_more_begins_anew_with_nobody_moved(worker: Make) -> None:
    one = worker("a")
    assert one.look(SLOW).share == 0.1
    with one.watch._opened().transaction() as connection:
        connection.execute(delete(schema.decisions))
    one.watch.ready = frozenset()
    assert one.look(SLOW) == State()
    assert one.now.history == ()


def test_a_state_is_in_force_also_if_the_store_goes_before_its_history_is_read(worker: Make, url: str) -> None:
    one = worker("a")
    state = one.look(SLOW)
    other = RolloutStore(url)
    assert other.decide(SLOW, commanded(SLOW, state, Command.ABORT, "anna", other.now()))
    other.close()
    own = one.watch._opened()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(own, "history", failing)
        assert one.look(SLOW).share == 0.0
    one.look(SLOW)
    assert [phase for _, phase, _, _ in one.now.history] == ["running", "rolled back"]


def failing(name: str) -> None:
    raise StoreAway("just now")


def test_a_rollout_that_left_the_config_is_followed_no_more(worker: Make) -> None:
    one = worker("a")
    one.look(SLOW)
    one.watch._plans = {}
    one.watch.look()
    assert one.states == {}
    assert one.watch.now() == []


def test_a_name_that_was_used_for_other_variants_moves_nobody(worker: Make, url: str) -> None:
    store = RolloutStore(url)
    promoted = State(Phase.PROMOTED, 1, 1.0, 1.0, 1.0, "the step has passed", 1)
    assert store.decide(replace(PLAN, after="other"), promoted)
    store.close()
    one = worker("a")
    assert one.look().share == 0.0
    assert "its name was used for a rollout from 'old' to 'other' of 'net' before" in one.now.trouble
    assert not one.now.decides


def test_a_plan_whose_steps_have_changed_keeps_its_state(worker: Make) -> None:
    one = worker("a")
    assert one.look(SLOW).share == 0.1
    history = one.now.history
    assert history
    assert one.look(replace(SLOW, steps=(Step(0.05, 3600.0), Step(0.3, 3600.0)))).share == 0.1
    assert one.now.history == history


def test_of_several_rollouts_each_is_judged_in_its_turn(worker: Make) -> None:
    one = worker("a")
    plans = {name: replace(GUARDED, name=name, model=name) for name in ("a", "b", "c")}
    one.watch.ready = frozenset(plans)
    one.watch._plans = plans
    asked = []
    one.watch._analyses.ask = lambda question: asked.append(question.rollout)  # type: ignore[method-assign, attr-defined]
    for _ in range(7):
        one.watch.look()
        time.sleep(0.002)
    assert asked[-6:] == asked[-3:] * 2
    assert set(asked) == set(plans)


def filled(url: str, moved: float) -> None:
    """400 units of the first step: most of the old variant's bought something, and that much of the new one's."""
    store = RolloutStore(url)
    rows: list[Any] = []
    for number in range(400):
        arm = "new" if number % 2 else "old"
        rows.append(ExposureRow("int8/1", arm, f"user {number}", 10.0 + number, False))
        value = float((number // 2) % 10 < (moved if arm == "new" else 8))
        # What it did before, on the new variant perhaps, is no past to adjust by.
        rows += [OutcomeRow(f"{number} {at}", "", "bought", value, at, f"user {number}") for at in (5.0, 1000.0)]
    store.write(rows)
    store.close()


def until(worker: Worker, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    worker.look(GUARDED)
    while not holds():
        assert time.monotonic() < end, worker.now
        worker.look(GUARDED)
        time.sleep(0.05)


def test_a_step_is_analysed_in_another_process_and_a_breach_takes_all_back(worker: Make, url: str) -> None:
    filled(url, 2)
    one = worker("a")
    until(one, lambda: one.now.phase == "rolled back")
    assert "guardrail breached: bought of 'new': 0.2 against 0.8" in one.now.reason
    one.look(GUARDED)
    assert one.watch._analyses._process is None  # which nothing needs any more


def test_what_was_judged_is_shown_with_its_distance(worker: Make, url: str) -> None:
    filled(url, 8)
    one = worker("a")
    until(one, lambda: bool(one.now.guardrails))
    (guardrail,) = one.now.guardrails
    assert (guardrail.name, one.now.units, one.now.phase) == ("bought", 200, "running")
    assert guardrail.distance > 0.0
    assert any("of its soak time are left" in each for each in one.now.waits)


def test_units_that_come_to_variants_as_nobody_planned_pause_it(worker: Make, url: str) -> None:
    filled(url, 8)
    one = worker("a")
    plan = replace(GUARDED, steps=(Step(0.1, 3600.0),))
    end = time.monotonic() + 60
    while one.look(plan).phase is not Phase.PAUSED:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "units do not come to variants as planned" in one.now.reason


def test_a_state_that_a_person_asked_for_is_followed(worker: Make, url: str) -> None:
    one = worker("a")
    state = one.look(SLOW)
    store = RolloutStore(url)
    assert store.decide(SLOW, commanded(SLOW, state, Command.PAUSE, "anna", store.now()))
    store.close()
    assert one.look(SLOW).phase is Phase.PAUSED
    assert one.now.waits == ("it is paused (pause by anna): resume, promote or abort it",)


# The process of the analyses


def question(url: str, **more: Any) -> StepQuestion:
    return replace(StepQuestion(url, None, "int8/1", "int8", 1, 100.0, GUARDED.experiment(FIRST)), **more)


def answer(process: AnalysisProcess) -> StepAnalysis:
    end = time.monotonic() + 60
    while (found := process.maybe_answer()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_without_guardrails_units_are_counted(url: str) -> None:
    filled(url, 8)
    process = AnalysisProcess[StepAnalysis]()
    process.ask(question(url, plan=None))
    assert answer(process).units == {"old": 200, "new": 200}
    process.close()


def test_a_question_that_can_t_be_answered_says_why(tmp_path: Path) -> None:
    process = AnalysisProcess[StepAnalysis]()
    process.ask(question(f"sqlite:///{tmp_path}/none/x.db"))
    assert "StoreAway" in answer(process).trouble
    process.close()


def test_a_process_that_was_killed_is_started_again(url: str) -> None:
    filled(url, 8)
    process = AnalysisProcess[StepAnalysis]()
    process.ask(question(url))
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while process._process is not None:
        assert process.maybe_answer() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.ask(question(url))
    assert answer(process).guardrails
    process.close()


def test_it_ends_with_whoever_asks(url: str) -> None:
    process = AnalysisProcess[StepAnalysis]()
    process.ask(question(url, plan=None))
    assert process._pipe is not None
    assert process._process is not None
    process._pipe.close()
    assert process._process.wait(60) == 0


@pytest.mark.parametrize("kind", ["a user who may only read", "a standby"])
def test_what_can_only_be_read_is_followed_and_says_so(
    postgres: Postgres, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    postgres.empty()
    one = Worker(postgres.url, "a")
    one.look(SLOW)
    with postgres.standby() if kind == "a standby" else postgres.reader() as url:
        other = Worker(url, "b")
        other.counts = {("int8", "new"): Counts(good=1)}
        assert other.look(SLOW) == one.look(SLOW)
        assert not other.now.decides
        assert "the store is followed, and nothing is decided here: it can only be read here" in other.now.trouble
        assert "nothing is decided here" in caplog.text
        assert [each for _, each, _, _ in other.now.history] == ["running"]
        commands = RolloutCommands({"int8": SLOW}, StoreSettings(url))
        with pytest.raises(CommandFailed, match="all rollouts stay as they are: it can only be read here"):
            commands.do("int8", Command.ABORT, "somebody")
        RolloutCommands({"int8": SLOW}, StoreSettings(postgres.url)).do("int8", Command.ABORT, "somebody")
        began = time.monotonic()
        while other.look(SLOW).phase is not Phase.ROLLED_BACK:  # a standby follows a moment later
            assert time.monotonic() - began < 60
        assert not other.now.trouble.startswith("the store is away")
        other.watch._opened().close()
    one.watch._analyses.close()
    one.watch._opened().close()


def test_a_store_of_the_version_before_that_can_only_be_read_is_not_followed(postgres: Postgres) -> None:
    postgres.empty()
    one = Worker(postgres.url, "a")
    one.look(SLOW)
    with one.watch._opened().transaction() as connection:
        connection.execute(text("UPDATE store_version SET number = 2"))
    one.watch._opened().close()
    with postgres.reader() as url:
        other = Worker(url, "b")
        with pytest.raises(StoreAway, match=f"version 2, and {len(schema.STEPS)} is needed; it can only be read here"):
            other.look(SLOW)
        other.watch._opened().close()
