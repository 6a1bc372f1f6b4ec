"""From calls and reports to the store: takes what was seen of experiments to the recorder, and follows what it says.

Nothing is opened until the config has an experiment.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from gateway.config import Config
from gateway.config.experiment_file import bandits_of, plans_of, rollouts_of
from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import OutcomeSpec, Plan
from gateway.forwarding.exposures import Exposures, Met
from gateway.forwarding.shadowing import Shadows
from gateway.hooks import BanditNow, ExperimentNow, StoreNow, VerdictNow
from gateway.process.event_loop import call_from_thread
from gateway.store import ExposureRow, MeasuredRow, OutcomeRow, Recorder, RequestRow, Stop, StoreSettings
from gateway.store.rows import Row

_log = logging.getLogger(__name__)

_TAKE_SECONDS: Final = 0.5  # between two looks at what was seen
_MEASURED_SECONDS: Final = 5.0  # over which calls of a unit are added up
_LAST_SECONDS: Final = 2.0  # for what is left at the end


class Evidence:
    """An `OutcomeSink`. Between `run` and its end it takes what was seen to the store."""

    def __init__(
        self,
        exposures: Exposures,
        settings: StoreSettings,
        on_stops: Callable[[Mapping[str, str]], None],
        shadows: Shadows,
        *,
        bandits: Callable[[], Mapping[str, BanditNow]],
        verdicts: Callable[[], Mapping[str, VerdictNow]],
    ) -> None:
        """
        on_stops:  called on the event loop, with the arm that everybody gets by experiment that was stopped.
        shadows:   whose parity all workers find together.
        bandits:   how those are whose shares follow a reward, by experiment.
        verdicts:  what experiments say so far.
        """
        self.exposures = exposures
        self.epochs: Mapping[str, Epochs] = {}  # of bandits
        self._shadows = shadows
        self._bandits = bandits
        self._verdicts = verdicts
        self.asked: Mapping[str, Mapping[str, OutcomeSpec]] = {}
        self.models: Mapping[str, str] = {}
        self._on_stops = on_stops
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recorder = Recorder(
            settings,
            on_stops=self._stops_found,
            on_loss=self._lost,
            on_progress=self._progressed,
            parities=shadows.parities,
            on_parities=self._parities_found,
        )
        self._is_started = False
        self._plans: Mapping[str, Plan] = {}
        self._stopped: Mapping[str, str] = {}  # the arm that everybody gets, by experiment
        self._writer = secrets.token_hex(8)
        self._number = 0  # of the last that was measured here
        self._measured_since = 0.0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._reports = 0
        self._reports_refused = 0

    def apply(self, config: Config) -> None:
        """Follow a config: from the first experiment or rollout on the store is open, or, where it is named, the first
        parity."""
        plans = self._plans = plans_of(config)
        asked: dict[str, dict[str, OutcomeSpec]] = {}
        for name, experiment in config.experiments.items():
            for outcome, section in experiment.outcomes.items():
                asked.setdefault(outcome, {})[name] = section.spec(outcome)
        for rollout, plan in rollouts_of(config).items():
            for guardrail in plan.guardrails:
                asked.setdefault(guardrail.outcome.name, {})[rollout] = guardrail.outcome
        self.asked = asked
        self.models = {name: each.model for name, each in config.experiments.items() if each.model is not None}
        self._recorder.experiments = tuple(plans)
        self._recorder.bandits = tuple(bandits_of(config))
        if (plans or rollouts_of(config) or _shares_parity(config)) and not self._is_started:
            self._is_started = True
            self._loop = asyncio.get_running_loop()
            self._recorder.start()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(_TAKE_SECONDS)
            if self._is_started:
                self._take(time.monotonic() - self._measured_since >= _MEASURED_SECONDS)

    async def aclose(self) -> None:
        """Write what is left, within 2 s."""
        if self._is_started:
            self._take(True)
            await asyncio.to_thread(self._recorder.stop, _LAST_SECONDS)

    def _take(self, all_of_it: bool) -> None:
        taken = self.exposures.take()
        self._recorder.state.dropped += taken.dropped
        rows: list[Row] = [_exposure(met) for met in taken.exposures]
        rows += [RequestRow(request, unit, at) for request, (unit, at) in taken.requests.items()]
        if all_of_it:
            rows += self._all_measured()
        if rows:
            self._recorder.offer(rows)

    def _all_measured(self) -> Iterator[MeasuredRow]:
        """The thread turns it into what is written: here it would hold up calls."""
        now, self._measured_since = time.time(), time.monotonic()
        for each in self.exposures.take_measured():
            self._number += 1
            writer, number = self._writer, self._number
            yield MeasuredRow(writer, number, each.experiment, now, each.outcomes, each.tallies, each.records)

    # As `OutcomeSink`

    async def record(self, rows: Sequence[OutcomeRow], seconds: float) -> bool | None:
        recorder = self._recorder
        if not self._is_started or not recorder.has_room(len(rows)):
            self._reports_refused += len(rows)
            return None
        self._reports += len(rows)
        recorder.offer(rows)
        if recorder.state.is_away:
            return False
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((recorder.offered, written))
        done, _ = await asyncio.wait([written], timeout=max(0.0, seconds))
        return bool(done)

    # From the recorder's thread

    def _progressed(self) -> None:
        self._call_soon(self._tell_waiters)

    def _stops_found(self, stops: Mapping[str, Stop]) -> None:
        arms = self._stopped = {stop.experiment: stop.arm for stop in stops.values()}
        self._call_soon(lambda: self._on_stops(arms))

    def _parities_found(self, found: Mapping[str, tuple[int, int]]) -> None:
        self._call_soon(lambda: self._shadows.counted_elsewhere(found))

    def _lost(self) -> None:
        self._call_soon(self.exposures.forget)

    def _call_soon(self, callback: Callable[[], object]) -> None:
        call_from_thread(self._loop, callback)

    def _tell_waiters(self) -> None:
        done = self._recorder.done
        while self._waiters and self._waiters[0][0] <= done:
            written = self._waiters.popleft()[1]
            if not written.done():
                written.set_result(None)

    # For metrics and the page; from any thread

    def store_now(self) -> StoreNow | None:
        """None if there is no experiment."""
        if not self._is_started:
            return None
        state = self._recorder.state
        return StoreNow(
            state.name,
            state.is_away,
            state.why,
            self._recorder.waiting,
            state.written,
            {"full": state.dropped, "refused": state.refused},
            self._reports,
            self._reports_refused,
            state.duplicates,
        )

    def now(self) -> list[ExperimentNow]:
        state, told, stopped = self._recorder.state, dict(self.exposures.units), self._stopped
        arms, by_epoch, epochs, bandits = dict(state.arms), dict(state.by_epoch), self.epochs, self._bandits()
        verdicts = self._verdicts()
        found = []
        for name, plan in dict(self._plans).items():
            units, bandit = arms.get(name, {}), bandits.get(name)
            if bandit is None:
                ratio = _sample_ratio(plan, units)
            else:
                ratio = _ratio_of_epochs(plan, by_epoch.get(name, {}), epochs.get(name))
            is_mismatched = ratio is not None and ratio <= plan.sample_ratio_alpha
            ended = stopped.get(name, "")
            verdict = None if ended else verdicts.get(name)  # all have one arm by then, and nothing is to be done
            exposures = told.get(name, 0)
            found.append(
                ExperimentNow(name, plan.model, exposures, units, ratio, is_mismatched, ended, bandit, verdict)
            )
        return found


def _shares_parity(config: Config) -> bool:
    """Is a store named, and must a variant agree before it may stand in?"""
    shadows = [shadow for model in config.models.values() for shadow in model.shadow.values()]
    return "url" in config.store.model_fields_set and any(shadow.parity is not None for shadow in shadows)


def _exposure(met: Met) -> ExposureRow:
    return ExposureRow(met.experiment, met.arm, met.unit, met.at, met.is_forced, met.epoch, met.propensity)


def _sample_ratio(plan: Plan, units: Mapping[str, int]) -> float | None:
    """The p-value of the sample ratio, valid at any time; None if it is not known."""
    if not units:
        return None
    try:
        from gateway.experiments.analysis.sample_ratio import p_value  # noqa: PLC0415  (SciPy, an extra)
    except ImportError:
        return None
    return p_value(
        [float(units.get(arm, 0)) for arm in plan.order], [plan.share(arm) for arm in plan.order], plan.units
    )


def _ratio_of_epochs(plan: Plan, units: Mapping[int, Mapping[str, int]], epochs: Epochs | None) -> float | None:
    """The same of a bandit, by the shares that each epoch had. units: by epoch and arm."""
    if not units or epochs is None or not epochs.is_of(plan):
        return None
    try:
        import numpy as np  # noqa: PLC0415

        from gateway.experiments.analysis.sample_ratio import p_value_of_epochs  # noqa: PLC0415
    except ImportError:
        return None
    known = list(enumerate(epochs.so_far))
    counts = np.array([[float(units.get(number, {}).get(arm, 0)) for arm in plan.order] for number, _ in known])
    return p_value_of_epochs(counts, np.array([[epoch.shares[arm] for arm in plan.order] for _, epoch in known]))
