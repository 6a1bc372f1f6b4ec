"""Follows the verdicts of experiments in the store, and finds those anew whose lease this worker has.

A report reads all that was seen of an experiment and counts in Python: seconds for a hundred thousand units. So a
process beside the worker makes it, one at a time, and rests thirty times as long as that took: all experiments of all
replicas together cost a thirtieth of a core, whatever their size, where one worker has all leases.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from gateway.experimentation.analysis_process import AnalysisProcess
from gateway.experimentation.store_watch import StoreWatch
from gateway.experimentation.verdict_analysis import NO_SCIPY, NewVerdict, VerdictQuestion
from gateway.experiments.plan import Plan
from gateway.experiments.standing import Json, first_breaches, following, nothing
from gateway.hooks import ArmGuardrailNow, VerdictNow
from gateway.store import StoreSettings

if TYPE_CHECKING:
    from gateway.store.verdicts import Verdict, VerdictStore

_log = logging.getLogger(__name__)

_LEAST_SECONDS: Final = 60.0  # between two verdicts of one experiment
_STOPPED_SECONDS: Final = 600.0  # likewise of one that was stopped: only late reports still come to it
_REST: Final = 30.0  # times as long as a verdict took, at least, until the next one
_MOST_LOST: Final = 60.0  # seconds that count of a process without an answer, which may have waited and not worked
_LOOK_SECONDS: Final = 5.0  # between two looks at what others have found
_BUSY_SECONDS: Final = 1.0  # the same while one is being found here
_LEAST_ROOM: Final = 150_000_000  # bytes, without which none is started: 90 MB are taken whatever it is asked
_LEASE: Final = 15.0  # seconds; a leader that stopped is replaced after that


@dataclass(slots=True)
class _Followed:
    """What this worker knows of one experiment."""

    plan: Plan
    mark: str
    since: float  # when it came to be followed here, by the store's clock
    verdict: Verdict | None = None  # of the store, and of this plan
    decides: bool = False
    asked: float = -math.inf  # when it was last asked for, by the store's clock

    def lead_no_more(self) -> None:
        self.decides = False

    def is_due(self, now: float) -> bool:
        """now: by the store's clock, which may have been put back."""
        if abs(now - self.asked) < _LEAST_SECONDS:
            return False
        verdict = self.verdict
        if verdict is None:
            return True
        least = _STOPPED_SECONDS if verdict.data.get("stopped") else _LEAST_SECONDS
        return abs(now - verdict.at) >= max(least, _REST * verdict.cost)


class VerdictWatch(StoreWatch[Plan, _Followed]):
    """Of verdicts."""

    def __init__(self, settings: StoreSettings, worker: str, room: Callable[[], int], first_after: float = 5.0) -> None:
        """
        worker:     names this process among all that use the store.
        room:       how many bytes a process beside this one may take now. From any thread.
        first_after: seconds until the first look, as a worker that starts has more urgent work with the store.
        """
        super().__init__("verdicts", settings, worker)
        self._first_at = time.monotonic() + first_after
        self._room = room
        self._store: VerdictStore | None = None
        self._analyses = AnalysisProcess[NewVerdict]()
        self._asked: VerdictQuestion | None = None  # of which the answer is to come
        self._asked_at = 0.0  # on the monotonic clock
        self._rests_until = 0.0  # likewise
        self._can_analyse: bool | None = None  # is SciPy here? None: nobody has looked

    # On the thread

    def _close(self) -> VerdictStore | None:
        self._analyses.close()
        return self._store

    def look(self) -> None:
        plans = self._plans
        if (not plans and not self._followed) or time.monotonic() < self._first_at:
            return
        store = self._opened()
        followed = self._followed
        known = {name: followed[name].verdict if name in followed else None for name in plans}
        look = store.look(self._worker, known, _LEASE if self._has_scipy() else 0.0)
        self._note_read_only(look.read_only)
        self._looked_at = (look.now, time.monotonic())
        self._followed = {name: _followed(plan, followed.get(name), look.now) for name, plan in plans.items()}
        for name, each in self._followed.items():
            found = look.verdicts.get(name)
            each.verdict = found if found is not None and found.plan == each.mark else None
            each.decides = name in look.led
        self._take_answer()
        self._ask_next(look.now)
        self.period = _BUSY_SECONDS if self._asked is not None else _LOOK_SECONDS

    def _opened(self) -> VerdictStore:
        if self._store is None:
            from gateway.store.verdicts import VerdictStore  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

            self._store = VerdictStore(self._settings.url, self._settings.unit_key)
        return self._store

    def _has_scipy(self) -> bool:
        if self._can_analyse is None:
            self._can_analyse = find_spec("scipy") is not None
            if not self._can_analyse:
                _log.warning("no verdicts of experiments are found here, and no guardrail is watched: %s", NO_SCIPY)
        return self._can_analyse

    # Deciding

    def _ask_next(self, now: float) -> None:
        """Ask for the verdict that has waited longest, if any is due."""
        if self._asked is not None or time.monotonic() < self._rests_until or self._room() < _LEAST_ROOM:
            return
        due = [each for each in self._followed.values() if each.decides and each.is_due(now)]
        if not due:
            return
        known = min(due, key=lambda each: each.asked)
        known.asked = now
        plan = known.plan
        if not self._opened().has_units(plan.name):  # so that nothing is started where nobody has come
            self._put(known, NewVerdict(self._question(known, now), nothing(plan.name, "nobody takes part yet")))
            return
        self._asked, self._asked_at = self._question(known, now), time.monotonic()
        self._analyses.ask(self._asked)

    def _question(self, known: _Followed, now: float) -> VerdictQuestion:
        verdict, settings = known.verdict, self._settings
        is_first = verdict is None or bool(verdict.data["trouble"])
        return VerdictQuestion(settings.url, settings.unit_key, known.plan, now, is_first, self._room())

    def _take_answer(self) -> None:
        question = self._asked
        if question is None:
            return
        answer = self._analyses.maybe_answer()
        if answer is None and self._analyses.is_asked:
            return
        if answer is None:
            took = min(time.monotonic() - self._asked_at, _MOST_LOST)
            answer = NewVerdict(question, cost=took, trouble="the process that makes it has ended")
        self._asked = None
        self._analyses.close()  # it would keep 80 MB until the next one is due
        self._rests_until = time.monotonic() + _REST * answer.cost
        known = self._followed.get(question.plan.name)
        if known is None or known.plan != question.plan or not known.decides:
            return
        if not answer.trouble:
            self._put(known, answer)
            return
        self._say(f"no verdict on experiment {known.plan.name} can be found: {answer.trouble}")
        if known.verdict is None or known.verdict.data["trouble"]:  # else the one before stays, and gets old
            self._put(known, NewVerdict(question, nothing(known.plan.name, answer.trouble), answer.cost))

    def _put(self, known: _Followed, answer: NewVerdict) -> None:
        from gateway.store.verdicts import Verdict  # noqa: PLC0415

        before, name = None if known.verdict is None else known.verdict.data, known.plan.name
        data = answer.told if before is None else following(before, answer.told)
        verdict = Verdict(name, known.mark, answer.question.asked, answer.cost, data)
        if not self._opened().put(verdict, self._worker):
            return
        known.verdict = verdict
        if data.get("stopped") is None:
            for each in first_breaches(before, data):
                _log.warning("experiment %s: guardrail breached: %s", name, each["text"])

    # For people and metrics; from any thread

    def latest(self) -> list[Json]:
        """What is known of experiments, as of `experiments.standing`."""
        return [told for name in dict(self._plans) if (told := self._told(name)) is not None]

    def _told(self, name: str) -> Json | None:
        known = self._followed.get(name)
        if known is not None and known.verdict is not None:
            return known.verdict.data
        if self._can_analyse is False:
            return nothing(name, NO_SCIPY)
        why_not = self._why_not()
        return nothing(name, why_not) if why_not else None

    def now(self) -> dict[str, VerdictNow]:
        """By experiment. One that is not judged here, and has no verdict of elsewhere, is not in it."""
        now, _ = self._age()
        return {
            name: _now(known, now)
            for name, known in self._followed.items()
            if known.verdict is not None or self._can_analyse
        }


def _followed(plan: Plan, known: _Followed | None, now: float) -> _Followed:
    """What is known of a plan that may have changed."""
    if known is not None and known.plan == plan:
        return known
    from gateway.store.verdicts import mark_of  # noqa: PLC0415

    return _Followed(plan, mark_of(plan), now)


def _now(known: _Followed, now: float) -> VerdictNow:
    verdict = known.verdict
    if verdict is None:
        return VerdictNow(max(0.0, now - known.since), known.decides)
    data = verdict.data
    age = max(0.0, now - verdict.at)
    if data["trouble"]:
        return VerdictNow(age, known.decides)
    return VerdictNow(
        age,
        known.decides,
        [(each["arm"], each["outcome"], each["judgement"]) for each in data["primary"]],
        [
            ArmGuardrailNow(
                each["arm"],
                each["outcome"],
                each["state"],
                math.nan if each["distance"] is None else each["distance"],
                each["text"],
            )
            for each in data["guardrails"]
        ],
    )
