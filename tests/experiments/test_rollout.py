"""Rollouts: which state follows from what was seen, and how often a guardrail takes a good variant back."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import ALPHA, IS_LONG

from gateway.experiments.analysis.experiment import analysed
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, OutcomeSpec
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.rollout import (
    ENDED,
    FRESH_SECONDS,
    Alarm,
    Calls,
    Command,
    CommandRefused,
    Evidence,
    Phase,
    RolloutPlan,
    State,
    Step,
    commanded,
    decided,
    waits_for,
)
from gateway.experiments.units import join
from gateway.experiments.verdict import Effect, Guard, GuardrailState, Judgement, distance

ERRORS = OutcomeSpec("errors", Kind.BINARY, Better.LOWER)
P99 = OutcomeSpec("p99", Kind.QUANTILE, Better.LOWER, quantile=0.99)
GUARDRAILS = (Guardrail(ERRORS, Amount(0.05, False)), Guardrail(P99, Amount(0.2, True)))
PLAN = RolloutPlan(
    "int8", "classify", "fp32", "int8", (Step(0.01, 60.0), Step(0.2, 600.0, 100), Step(0.5, 60.0, 0, True)), GUARDRAILS
)
BROKEN = Alarm().after(Calls(errors=20))
AT_LAST = State(Phase.RUNNING, 2, 0.5, since=1_000.0, at=1_000.0, version=3)


def guardrail(state: Guard, guard: Guardrail = GUARDRAILS[0], high: float = 0.0) -> GuardrailState:
    effect = Effect(
        guard.outcome.name, guard.outcome.kind, Better.LOWER, "int8", "fp32", 500, 500, 0.02, 0.01, 0.01,
        -0.01, high, 1.0, -0.5, high, 0.1, 0.01, "exact", Judgement.UNDECIDED,
    )  # fmt: skip
    return GuardrailState(effect, guard.worse_by, state)


def unknown(guard: Guardrail) -> GuardrailState:
    """Of which nobody has reported anything."""
    effect = replace(guardrail(Guard.UNDECIDED, guard).effect, units=0, baseline_units=0)
    return GuardrailState(effect, guard.worse_by, Guard.UNDECIDED)


HELD = tuple(guardrail(Guard.HELD, each) for each in GUARDRAILS)


def test_a_rollout_that_nothing_speaks_against_goes_through_its_steps_to_all_units() -> None:
    state, now, shares = State(), 0.0, [0.0]
    while state.phase not in ENDED:
        now += 5.0
        seen = Evidence(state.step, now, units=1_000, guardrails=HELD)
        state = decided(PLAN, state, seen, now) or state
        if state.share != shares[-1]:
            shares.append(state.share)
    assert (state.phase, shares) == (Phase.PROMOTED, [0.0, 0.01, 0.2, 0.5, 1.0])
    assert now == 5.0 + 60.0 + 600.0 + 60.0


@pytest.mark.parametrize(
    ("plan_step", "change", "told"),
    [
        pytest.param(0, {"is_ready": False}, "not ready", id="variant"),
        pytest.param(1, {"units": 99}, "99 of 100 units", id="units"),
        pytest.param(2, {"guardrails": (HELD[0], guardrail(Guard.UNDECIDED, GUARDRAILS[1]))}, "'p99'", id="undecided"),
        pytest.param(2, {"guardrails": HELD[:1]}, "'p99'", id="no reports"),
        pytest.param(
            0, {"guardrails": (HELD[0], unknown(GUARDRAILS[1]))}, "nothing is known of guardrail 'p99'", id="unknown"
        ),
        pytest.param(2, {"at": 9_000.0}, "nothing new", id="old"),
        pytest.param(2, {"at": 20_000.0}, "nothing new", id="from before the clock was put back"),
        pytest.param(0, {"after": Alarm().after(Calls(errors=1))}, "the latest calls of 'int8'", id="last call failed"),
        pytest.param(2, {"step": 1}, "nothing new", id="of another step"),
    ],
)
def test_what_is_missing_keeps_a_rollout_where_it_is_and_is_told(
    plan_step: int, change: dict[str, object], told: str
) -> None:
    now = 9_000.0 + FRESH_SECONDS + 1.0
    state = State(Phase.RUNNING, plan_step, PLAN.steps[plan_step].share, since=1_000.0, version=plan_step + 1)
    enough = Evidence(plan_step, now, units=100, guardrails=HELD)
    assert decided(PLAN, state, enough, now) is not None
    seen = replace(enough, **change)  # type: ignore[arg-type]
    assert decided(PLAN, state, seen, now) is None
    assert told in " ".join(waits_for(PLAN, state, seen, now))


def test_a_step_lasts_as_long_as_its_soak_time() -> None:
    seen = Evidence(2, 1_059.0, units=100, guardrails=HELD)
    assert decided(PLAN, AT_LAST, seen, 1_059.9) is None
    after = decided(PLAN, AT_LAST, seen, 1_060.0)
    assert after is not None
    assert after.phase is Phase.PROMOTED


def test_a_step_that_must_not_hold_goes_on_while_guardrails_are_undecided() -> None:
    state = State(Phase.RUNNING, 0, 0.01, since=0.0, version=1)
    seen = Evidence(0, 60.0, guardrails=(guardrail(Guard.UNDECIDED),))
    after = decided(PLAN, state, seen, 60.0)
    assert after is not None
    assert (after.phase, after.step, after.share, after.since) == (Phase.RUNNING, 1, 0.2, 60.0)


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSED])
@pytest.mark.parametrize(
    ("seen", "told"),
    [
        pytest.param({"guardrails": (guardrail(Guard.BREACHED),)}, "errors of 'int8'", id="guardrail"),
        pytest.param({"after": BROKEN}, "20 of its last 20 calls are bad (20 errors)", id="all errors"),
        pytest.param({"after": Alarm().after(Calls(unanswered=20))}, "20 unanswered", id="no answers"),
        pytest.param({"after": Alarm().after(Calls(not_finite=20))}, "20 NaN or Inf", id="not numbers"),
        pytest.param(
            {"after": Alarm().after(Calls(wrong=20))}, "20 wrong answers: NaN, Inf", id="answers were refused"
        ),
        pytest.param({"after": BROKEN, "is_mismatched": True}, "is broken", id="broken, and out of ratio"),
    ],
)
def test_harm_takes_all_units_back_at_once_also_from_a_pause(phase: Phase, seen: dict[str, object], told: str) -> None:
    """On the first look, whatever the soak time, and on old evidence too."""
    state = replace(AT_LAST, phase=phase)
    after = decided(PLAN, state, Evidence(2, 1_000.5, **seen), 1_100.0)  # type: ignore[arg-type]
    assert after is not None
    assert (after.phase, after.share, after.version) == (Phase.ROLLED_BACK, 0.0, 4)
    assert told in after.reason


@pytest.mark.parametrize(
    ("plan", "seen", "told"),
    [
        pytest.param(PLAN, {"after": BROKEN, "before": BROKEN}, "both variants", id="both are broken"),
        pytest.param(PLAN, {"is_mismatched": True}, "as planned", id="sample ratio"),
        pytest.param(replace(PLAN, steps=PLAN.steps[:2]), {}, "2 steps now", id="a shorter plan"),
    ],
)
def test_what_a_person_must_look_at_pauses_and_keeps_the_share(
    plan: RolloutPlan, seen: dict[str, object], told: str
) -> None:
    after = decided(plan, AT_LAST, Evidence(2, 1_100.0, units=100, guardrails=HELD, **seen), 1_100.0)  # type: ignore[arg-type]
    assert after is not None
    assert (after.phase, after.share, after.since) == (Phase.PAUSED, 0.5, AT_LAST.since)
    assert told in after.reason
    assert decided(plan, after, Evidence(2, 9_000.0, units=100, guardrails=HELD), 9_000.0) is None


def test_a_variant_that_stays_broken_after_both_were_is_taken_back() -> None:
    paused = decided(PLAN, AT_LAST, Evidence(2, 1_100.0, before=BROKEN, after=BROKEN), 1_100.0)
    assert paused is not None
    after = decided(PLAN, paused, Evidence(2, 1_101.0, after=BROKEN), 1_101.0)
    assert after is not None
    assert after.phase is Phase.ROLLED_BACK


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("command", Command)
def test_a_command_does_what_it_says_or_says_why_not(command: Command, phase: Phase) -> None:
    state = replace(AT_LAST, phase=phase, step=1, share=0.2)
    allowed = {
        Command.PROMOTE: {Phase.WAITING, Phase.RUNNING, Phase.PAUSED},
        Command.PAUSE: {Phase.RUNNING},
        Command.RESUME: {Phase.PAUSED},
        Command.ABORT: {Phase.WAITING, Phase.RUNNING, Phase.PAUSED},
    }
    if phase not in allowed[command]:
        with pytest.raises(CommandRefused, match=f"'int8' is {phase.value}; {command.value} is for one that is"):
            commanded(PLAN, state, command, "ada", 2_000.0)
        return
    after = commanded(PLAN, state, command, "ada", 2_000.0)
    assert (after.reason, after.at, after.version) == (f"{command.value} by ada", 2_000.0, 4)
    expected = {
        Command.PROMOTE: (Phase.RUNNING, 0.2 if phase is Phase.WAITING else 0.5),
        Command.PAUSE: (Phase.PAUSED, 0.2),
        Command.RESUME: (Phase.RUNNING, 0.2),
        Command.ABORT: (Phase.ROLLED_BACK, 0.0),
    }
    assert (after.phase, after.share) == expected[command]


_ALARMS = st.sampled_from([Alarm(), BROKEN])
_SEEN = st.builds(
    lambda step, age, ready, units, guards, mismatch, before, after: (
        step, age, Evidence(0, 0.0, ready, units, guards, mismatch, before, after)
    ),
    st.sampled_from([0, 0, 0, 1, -1]), st.sampled_from([0.0, FRESH_SECONDS, FRESH_SECONDS + 1.0]), st.booleans(),
    st.integers(0, 200),
    st.tuples(*(st.sampled_from(Guard).map(lambda state, each=each: guardrail(state, each)) for each in GUARDRAILS)),
    st.booleans(), _ALARMS, _ALARMS,
)  # fmt: skip
_EVENTS = st.lists(st.tuples(st.floats(0.0, 700.0), st.none() | _SEEN | st.sampled_from(Command)), max_size=40)


@given(_EVENTS)
def test_whatever_happens_shares_only_rise_until_all_go_back_and_the_end_is_final(events: list[tuple]) -> None:
    state, now = State(), 0.0
    for seconds, event in events:
        now += seconds
        if isinstance(event, Command):
            try:
                after = commanded(PLAN, state, event, "ada", now)
            except CommandRefused:
                continue
        else:
            seen = None
            if event is not None:
                step, age, known = event
                seen = replace(known, step=state.step + step, at=now - age)
            found = decided(PLAN, state, seen, now)
            assert found is None or seen is not None, "nothing changes while nothing is known"
            if found is None:
                continue
            after = found
            if after.share > state.share and state.phase is Phase.RUNNING:
                assert seen is not None
                assert now - state.since >= PLAN.steps[state.step].soak
                assert seen.is_ready
                assert all(each.state is not Guard.BREACHED for each in seen.guardrails)
        assert state.phase not in ENDED
        assert after.version == state.version + 1
        assert after.reason
        assert after.share >= state.share or (after.phase, after.share) == (Phase.ROLLED_BACK, 0.0)
        assert after.share == {Phase.ROLLED_BACK: 0.0, Phase.PROMOTED: 1.0}.get(
            after.phase, PLAN.steps[after.step].share
        )
        state = after


def test_a_leader_that_slept_cannot_undo_what_was_decided_meanwhile() -> None:
    """Both write a state only in place of the one that its version follows, as a store does."""
    kept = [AT_LAST]

    def write(state: State | None) -> bool:
        if state is None or state.version != kept[-1].version + 1:
            return False
        kept.append(state)
        return True

    slept = decided(PLAN, AT_LAST, Evidence(2, 1_060.0, guardrails=HELD), 1_060.0)
    assert slept is not None
    assert slept.phase is Phase.PROMOTED
    assert write(decided(PLAN, AT_LAST, Evidence(2, 1_061.0, after=BROKEN), 1_061.0))
    assert not write(slept)
    assert kept[-1].phase is Phase.ROLLED_BACK


def test_fourteen_bad_calls_in_a_row_raise_the_alarm_and_thirteen_do_not() -> None:
    alarm = Alarm()
    for _ in range(13):
        alarm = alarm.after(Calls(errors=1))
    assert not alarm.is_raised
    assert alarm.after(Calls(errors=1)).is_raised


def test_good_calls_before_a_break_do_not_hide_it() -> None:
    alarm = Alarm()
    for _ in range(1_000):
        alarm = alarm.after(Calls(good=100))
    assert alarm.after(Calls(not_finite=14)).is_raised


def test_a_fifth_of_bad_calls_raises_no_alarm_in_a_million() -> None:
    rng = np.random.default_rng(14)
    alarm, highest = Alarm(), 0.0
    for bad in rng.binomial(10, 0.2, 100_000):
        alarm = alarm.after(Calls(good=10 - int(bad), errors=int(bad)))
        highest = max(highest, alarm.log_e)
    assert not Alarm(highest).is_raised


def test_a_guardrails_distance_is_what_is_left_until_it_is_breached() -> None:
    """Of an outcome that is better lower the lower end of the interval, which is -0.01 and -0.5, is the best of it."""
    assert distance(guardrail(Guard.HELD)) == pytest.approx(0.05 + 0.01)
    assert distance(guardrail(Guard.HELD, GUARDRAILS[1])) == pytest.approx(0.2 + 0.5)
    assert distance(unknown(GUARDRAILS[1])) == math.inf


@pytest.mark.parametrize("shares", [(), (0.0,), (0.5, 0.5), (0.5, 0.1), (0.1, 1.0), (float("nan"),)])
def test_a_plan_has_shares_that_rise_between_none_and_all(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares that rise"):
        RolloutPlan("int8", "classify", "fp32", "int8", tuple(Step(share, 1.0) for share in shares))


def test_a_rollout_without_guardrails_compares_nothing() -> None:
    assert replace(PLAN, guardrails=()).experiment(AT_LAST) is None


def test_a_plan_changed_in_the_middle_of_a_step_compares_by_the_share_in_force() -> None:
    """By another one units would not come as planned, which pauses it, and each time that somebody resumes it."""
    changed = replace(PLAN, steps=(*PLAN.steps[:2], Step(0.9, 60.0)))
    compared = changed.experiment(AT_LAST)
    assert compared is not None
    assert compared.shares == {"fp32": 0.5, "int8": 0.5}
    ended = changed.experiment(replace(AT_LAST, phase=Phase.PROMOTED, share=1.0))
    assert ended is not None
    assert ended.shares["int8"] == 0.9


ROLLOUTS = 1_000 if IS_LONG else 60
# Of a few hundred units the 90th percentile can be told; the 99th needs thousands.
P90 = Guardrail(OutcomeSpec("p90", Kind.QUANTILE, Better.LOWER, quantile=0.9), Amount(0.2, True))
SIMULATED = replace(
    PLAN, steps=(Step(0.1, 0.0), Step(0.5, 0.0)), guardrails=(GUARDRAILS[0], P90), units=500, alpha=ALPHA
)


def rolled_back(rng: np.random.Generator, chances: tuple[float, float], slower: float) -> bool:
    """One rollout of 400 units a step with three looks each: the chances of an error, and how much slower it is."""
    state = State(Phase.RUNNING, 0, SIMULATED.steps[0].share, version=1)
    for step in range(len(SIMULATED.steps)):
        plan = SIMULATED.experiment(state)
        assert plan is not None
        is_after = rng.random(400) < SIMULATED.steps[step].share
        failed = rng.random(400) < np.where(is_after, chances[1], chances[0])
        seconds = rng.lognormal(0.0, 0.5, 400) * np.where(is_after, slower, 1.0)
        exposures = [Exposure(plan.order[int(arm)], str(n), float(n)) for n, arm in enumerate(is_after)]
        outcomes = [Outcome("errors", float(bad), float(n), unit=str(n)) for n, bad in enumerate(failed)]
        outcomes += [Outcome("p90", float(took), float(n), unit=str(n)) for n, took in enumerate(seconds)]
        units = join(plan, exposures, outcomes)
        for now in (100.0, 200.0, 399.0):
            found = analysed(plan, units, now).guardrails
            after = decided(SIMULATED, replace(state, since=now), Evidence(step, now, False, guardrails=found), now)
            if after is not None:
                assert after.phase is Phase.ROLLED_BACK
                return True
        state = commanded(SIMULATED, state, Command.PROMOTE, "the simulation", 400.0)
    return False


@pytest.mark.timeout(1_800)  # of the long version
def test_a_variant_at_its_limits_is_rolled_back_by_a_guardrail_in_at_most_alpha_of_rollouts() -> None:
    """At the limits is where errors are most likely."""
    rng = np.random.default_rng(141)
    rate = np.mean([rolled_back(rng, (0.05, 0.10), 1.2) for _ in range(ROLLOUTS)])
    print(f"{rate:.2%} of {ROLLOUTS} rollouts")
    assert rate <= ALPHA


def test_a_variant_far_beyond_a_limit_is_rolled_back_by_a_guardrail() -> None:
    rng = np.random.default_rng(142)
    assert all(rolled_back(rng, (0.05, 0.50), 1.0) for _ in range(10))
    assert all(rolled_back(rng, (0.05, 0.05), 8.0) for _ in range(10))
