"""Follows bandits in the store each second, and begins the next epoch of those whose lease this worker has.

While the store is away the last known epochs hold, and none begins. Before it was ever read all units have the
baseline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gateway.experimentation.analysis_process import AnalysisProcess
from gateway.experimentation.bandit_analysis import NextShares, RewardQuestion
from gateway.experimentation.store_watch import LEASE, StoreWatch
from gateway.experiments.epochs import WITHOUT_SHARES, Epoch, Epochs
from gateway.experiments.plan import BanditPlan, Plan
from gateway.experiments.verdict import shares_text
from gateway.hooks import BanditNow
from gateway.store import StoreSettings

if TYPE_CHECKING:
    from gateway.store.epochs import EpochStore

_log = logging.getLogger(__name__)

_AGAIN_SECONDS: Final = 60.0  # after which it is asked again for shares that could not be found; of short epochs sooner
_PATIENCE: Final = 24.0  # epochs for which a due one waits for a reward; nobody at all may belong to the last slice


@dataclass(slots=True)
class _Followed:
    """What this worker knows of one bandit."""

    plan: Plan
    epochs: Epochs | None = None  # of the store; None: it has none, or none of this plan
    is_stopped: bool = False
    decides: bool = False
    trouble: str = ""  # with what the store has
    no_shares: str = ""  # why no shares could be found
    waits: str = ""  # for what, though another epoch is due
    asked: float = 0.0  # when they were last asked for, by the store's clock

    @property
    def bandit(self) -> BanditPlan:
        assert self.plan.bandit is not None  # noqa: S101  (others are not followed)
        return self.plan.bandit

    def known(self) -> Epochs:
        return self.epochs or Epochs(self.plan.model, self.plan.baseline, self.bandit.slices)

    def lead_no_more(self) -> None:
        self.decides = False

    def overdue(self, now: float) -> float | None:
        """As of the epochs; None if there will be no other."""
        return None if self.is_stopped else self.known().overdue(self.bandit, now)

    def has_waited_enough(self, now: float) -> bool:
        return (self.overdue(now) or 0.0) >= _PATIENCE * self.bandit.epoch


class BanditWatch(StoreWatch[Plan, _Followed]):
    """Of bandits."""

    def __init__(self, settings: StoreSettings, worker: str, on_moved: Callable[[Mapping[str, Epochs]], None]) -> None:
        """
        worker:    names this process among all that use the store.
        on_moved:  called on the thread when another epoch is known, with those of all bandits that have any.
        """
        super().__init__("bandits", settings, worker)
        self._on_moved = on_moved
        self._moved: Mapping[str, Epochs] = {}  # what `on_moved` was told last
        self._store: EpochStore | None = None
        self._analyses = AnalysisProcess[NextShares]()

    # On the thread

    def _close(self) -> EpochStore | None:
        self._analyses.close()
        return self._store

    def look(self) -> None:
        plans = self._plans
        if not plans and not self._followed:
            return
        store = self._opened()
        look = store.look(self._worker, plans, LEASE)
        self._note_read_only(look.read_only)
        self._looked_at = (look.now, time.monotonic())
        self._followed = {name: _followed(plan, self._followed.get(name)) for name, plan in plans.items()}
        for name, known in self._followed.items():
            self._follow(known, look.epochs.get(name))
            known.is_stopped = name in look.stopped
            known.decides = name in look.led and not (known.trouble and known.epochs is None)
        self._tell_moved()
        self._take_answer(look.now)
        self._lead(look.now)

    def _opened(self) -> EpochStore:
        if self._store is None:
            from gateway.store.epochs import EpochStore  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

            self._store = EpochStore(self._settings.url, self._settings.unit_key)
        return self._store

    def _follow(self, known: _Followed, epochs: Epochs | None) -> None:
        """Take over what the store has."""
        plan, trouble = known.plan, ""
        if epochs is not None and not epochs.is_of(plan):
            arms = ", ".join(epochs.so_far[0].shares)
            trouble = f"its name was used for arms {arms} of '{epochs.model}' before: choose another one"
            epochs = None
        elif epochs is not None and epochs.slices != known.bandit.slices:
            trouble = f"has {epochs.slices} epochs, as at its start: with {known.bandit.slices} units would change arms"
        if trouble and trouble != known.trouble:
            _log.error("bandit %s: %s", plan.name, trouble)
        known.trouble = trouble
        if epochs != known.epochs:
            self._put(known, epochs)

    def _put(self, known: _Followed, epochs: Epochs | None) -> None:
        known.epochs = epochs
        if epochs is None:
            if not known.trouble:
                _log.error("bandit %s: the store has no epochs of it any more", known.plan.name)
            return
        count, last = len(epochs.so_far), epochs.so_far[-1]
        shares = shares_text(last.shares)
        told = "bandit %s is in epoch %d of %d, by the rewards of %d units: %s"
        _log.info(told, known.plan.name, count, epochs.slices, last.units, shares)

    def _tell_moved(self) -> None:
        found = {name: known.epochs for name, known in self._followed.items() if known.epochs is not None}
        if found != self._moved:
            self._moved = found
            self._on_moved(found)

    # Deciding

    def _lead(self, now: float) -> None:
        """Begin the first epoch of those that have none, and ask what the next one of others shall be."""
        due = []
        for known in self._followed.values():
            overdue = known.overdue(now) if known.decides else None
            if overdue is None or overdue < 0.0:
                known.waits = ""
            elif known.known().so_far:
                due.append(known)
            else:
                self._begin(known, known.bandit.even(), 0, now)
        if not due:
            self._analyses.close()
        elif self._analyses.is_free:
            known = min(due, key=lambda each: each.asked)  # so that none whose shares can't be found is in others' way
            if abs(now - known.asked) >= min(_AGAIN_SECONDS, known.bandit.epoch / 10.0):
                known.asked = now
                settings = self._settings
                self._analyses.ask(RewardQuestion(settings.url, settings.unit_key, known.plan, known.known(), now))

    def _take_answer(self, now: float) -> None:
        answer = self._analyses.maybe_answer()
        if answer is None:
            return
        question = answer.question
        known = self._followed.get(question.plan.name)
        if known is None or not known.decides or (known.plan, known.known()) != (question.plan, question.epochs):
            return
        known.no_shares = f"{WITHOUT_SHARES}: {answer.trouble}" if answer.trouble else ""
        if answer.trouble:
            self._say(f"bandit {known.plan.name}: {known.no_shares}")
        elif answer.units == question.epochs.so_far[-1].units and not known.has_waited_enough(now):
            # To open slices while nobody comes, or nobody reports, would spend them on what is known already.
            known.waits = "no unit's reward has become known since the last epoch began"
        else:
            self._begin(known, answer.shares, answer.units, now)

    def _begin(self, known: _Followed, shares: Mapping[str, float], units: int, now: float) -> None:
        before = known.known()
        epochs = replace(before, so_far=(*before.so_far, Epoch(shares, now, units)))
        if self._opened().begin(known.plan.name, epochs, self._worker):
            known.asked, known.waits = 0.0, ""
            self._put(known, epochs)
            self._tell_moved()  # at once: to end the process of the analyses can take seconds

    # For people and metrics; from any thread

    def now(self) -> dict[str, BanditNow]:
        """By experiment."""
        now, age = self._age()
        followed = self._followed
        return {
            name: _now(followed.get(name) or _Followed(plan), now, age, self._why_not())
            for name, plan in dict(self._plans).items()
        }


def _followed(plan: Plan, known: _Followed | None) -> _Followed:
    """What is known of a plan that may have changed."""
    return known if known is not None and known.plan == plan else _Followed(plan, known.epochs if known else None)


def _now(known: _Followed, now: float, age: float, why_not: str) -> BanditNow:
    epochs = known.known()
    last = epochs.so_far[-1] if epochs.so_far else None
    return BanditNow(
        len(epochs.so_far),
        epochs.slices,
        dict(last.shares) if last is not None else {},
        last.since if last is not None else 0.0,
        max(0.0, known.overdue(now) or 0.0) if epochs.so_far else 0.0,
        known.decides,
        age,
        why_not or known.trouble or known.no_shares,
        known.waits if known.decides else "",
        tuple((epoch.since, epoch.units, dict(epoch.shares)) for epoch in epochs.so_far),
    )
