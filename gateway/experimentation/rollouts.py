"""Rollouts in a running worker: between its event loop, where calls are counted, and `RolloutWatch`, which decides.

Nothing is opened until the config has a rollout.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from gateway.config import Config
from gateway.config.experiment_file import rollouts_of
from gateway.experimentation.rollout_watch import RolloutWatch
from gateway.experiments.compare import non_finite
from gateway.experiments.rollout import RolloutKey, RolloutPlan, State
from gateway.forwarding.messages import parse_response
from gateway.forwarding.rolled import Rolled, VariantCounts, Whose
from gateway.hooks import RolloutNow
from gateway.process.event_loop import call_from_thread
from gateway.steps import WrongAnswer
from gateway.store import StoreSettings

if TYPE_CHECKING:
    from gateway.store.rollouts import Counts

_log = logging.getLogger(__name__)

_PERIOD: Final = 0.5  # seconds between two looks at answers and at which variants are ready
_LOOKS: Final = 10  # answers of each variant that are looked at for NaN and infinity in that time
_LAST_SECONDS: Final = 2.0  # for the last look at the end


class Rollouts:
    """Between `run` and `aclose`."""

    def __init__(
        self,
        rolled: Rolled,
        settings: StoreSettings,
        is_available: Callable[[str, str], bool],
        on_moved: Callable[[Mapping[RolloutKey, State]], None],
    ) -> None:
        """
        is_available:  can this variant of this public model be called?
        on_moved:      called on the event loop when the state of any is another one.
        """
        self.rolled = rolled
        self._is_available = is_available
        self._on_moved = on_moved
        self._plans: Mapping[str, RolloutPlan] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch = RolloutWatch(settings, secrets.token_hex(8), self._counts, self._moved)

    def apply(self, config: Config) -> None:
        """Follow a config."""
        self._plans = rollouts_of(config)
        self._loop = asyncio.get_running_loop()
        self._watch.follow(self._plans)

    async def wait_first_look(self, seconds: float) -> None:
        """Until the store was asked once, so that a restart changes no unit's variant twice; for so long at most."""
        if self._plans:
            await asyncio.to_thread(self._watch.first_look.wait, seconds)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._watch.ready = frozenset(
                name for name, plan in self._plans.items() if self._is_available(plan.model, plan.after)
            )
            taken = [
                (counts, counts.take(_LOOKS)) for variants in self.rolled.table.values() for counts in variants.values()
            ]
            if any(answers for _, answers in taken):
                try:
                    await asyncio.to_thread(_look_at, taken)
                except Exception:  # of whatever reads tensors; the next ones may be others
                    _log.exception("answers of a rollout can't be looked at")
            await asyncio.sleep(_PERIOD)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._watch.stop, _LAST_SECONDS)

    def now(self) -> list[RolloutNow]:
        """For people and metrics; from any thread."""
        return self._watch.now()

    # From the watch's thread

    def _counts(self) -> Mapping[tuple[str, str], Counts]:
        from gateway.store.rollouts import Counts  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

        found = {}
        for name, plan in self._plans.items():
            for variant, each in dict(self.rolled.table.get(plan.model, {})).items():
                sums = (
                    each.good,
                    each.errors,
                    each.unanswered,
                    each.finite,
                    each.not_finite,
                    each.wrong,
                    each.left_alone,
                )
                spreads = (each.ended_by.good, each.ended_by.bad, each.seen_by.good, each.seen_by.bad)
                found[name, variant] = Counts(*sums, *map(tuple, spreads))
        return found

    def _moved(self, states: Mapping[RolloutKey, State]) -> None:
        call_from_thread(self._loop, lambda: self._on_moved(states))


def _look_at(taken: Sequence[tuple[VariantCounts, Sequence[tuple[bytes, Whose]]]]) -> None:
    """Look for NaN and infinity. On a thread: tensors are parsed here."""
    for counts, answers in taken:
        for answer, whose in answers:
            try:
                outputs = {name: array for name, (_, array) in parse_response(answer).items()}
            except WrongAnswer:
                continue
            counts.seen(whose, not non_finite(outputs))
