"""I/O: what an experiment says so far, as the store has it. Asked in a process of its own (`analysis_process`)."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.errors import CommandFailed
from gateway.experiments.plan import MEASURED_SECONDS, Plan
from gateway.experiments.standing import MOST_POINTS, Json, nothing, standing
from gateway.experiments.verdict import Report
from gateway.store import Stop

if TYPE_CHECKING:
    from gateway.experiments.units import Units
    from gateway.store.epochs import EpochStore

NO_SCIPY: Final = "needs SciPy for its statistics: pip install 'inference-gateway[experiments]'"

_WAY_SECONDS: Final = 5.0  # of CPU time, for what the report was before there was any


@dataclass(frozen=True, slots=True)
class VerdictQuestion:
    """How does this experiment stand?"""

    url: str
    unit_key: str | None
    plan: Plan
    asked: float  # when, by the store's clock
    is_first: bool  # then also the way to it is found, by what was known at earlier times
    room: int = 1 << 40  # bytes that it may take, beside what it takes to start

    def answered(self) -> NewVerdict:
        """:raises StoreAway: if the store can't be used. ImportError: without SciPy."""
        from gateway.experiments.analysis.experiment import analysed  # noqa: PLC0415
        from gateway.store.epochs import EpochStore  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

        with suppress(OSError, ValueError):  # a system that has no such limit
            _limit_memory(self.room)
        store = EpochStore(self.url, self.unit_key)
        try:
            seen = seen_of(store, self.plan, self.asked)
        except CommandFailed as error:
            return self._new(nothing(self.plan.name, str(error)))
        finally:
            store.close()
        began = time.process_time()
        report = analysed(self.plan, seen.units, seen.at)
        way = _way(self.plan, seen.units, time.process_time() - began) if self.is_first else ()
        stopped = None if seen.stop is None else {"arm": seen.stop.arm, "at": seen.stop.at}
        return self._new(standing(report, way, stopped))

    def failed(self, trouble: str) -> NewVerdict:
        if trouble.startswith(MemoryError.__name__):
            trouble = f"it takes more memory than the {self.room >> 20} MiB that can be spared for it"
        return NewVerdict(self, cost=time.process_time(), trouble=trouble)

    def _new(self, told: Json) -> NewVerdict:
        return NewVerdict(self, told, time.process_time())


@dataclass(frozen=True, slots=True)
class NewVerdict:
    """What was found."""

    question: VerdictQuestion
    told: Json = field(default_factory=dict)
    cost: float = 0.0  # seconds of CPU time of the process so far, which is asked once
    trouble: str = ""  # why nothing was found


@dataclass(frozen=True, slots=True)
class Seen:
    """What counts of an experiment at some time."""

    units: Units
    stop: Stop | None  # how it was stopped, if it was
    at: float  # that time, in Unix seconds: now, or its end


def seen_of(store: EpochStore, plan: Plan, now: float) -> Seen:
    """What counts of an experiment by now, or by the time at which it was stopped.

    :raises StoreAway: if the store can't be used.
    :raises CommandFailed: if there are no units yet, or they are of another plan.
    """
    from gateway.experiments.units import join  # noqa: PLC0415  (NumPy)

    name = plan.name
    stop = store.stops().get(name)
    epochs = store.epochs([name]).get(name)
    if epochs is not None and not epochs.is_of(plan):
        raise CommandFailed(f"{name}: the store has it with other arms, or another baseline or model")
    so_far = () if epochs is None else epochs.so_far
    # What was measured until the end is written a little later, and nothing is measured after it.
    until = math.inf if stop is None else stop.at + MEASURED_SECONDS
    exposures, start = store.exposures(name), store.maybe_start(name)
    units = join(plan, exposures, store.outcomes(name, plan.measured), so_far, until)
    if not units.at.size:
        raise CommandFailed(f"{name}: nobody takes part yet")
    if start is not None and start < exposures[0].at:
        units = units.since_start(start)
    return Seen(units, stop, min(until, max(units.end, now)))


def _limit_memory(room: int) -> None:
    """Have this process, which is asked once, raise MemoryError before it takes so many bytes more."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[5])  # proc_pid_statm(5): data and stack
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _way(plan: Plan, units: Units, took: float) -> Sequence[Report]:
    """What the report was earlier, as often as there is time for. took: seconds, for one of all units."""
    from gateway.experiments.analysis.experiment import looks  # noqa: PLC0415

    often = min(MOST_POINTS, int(2.0 * _WAY_SECONDS / max(took, 1e-3)))  # of half of the units on average
    return list(looks(plan, units, max(1, units.at.size // often))) if often else ()
