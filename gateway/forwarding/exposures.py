"""Which units met which arm of an experiment, and what was measured of their calls, until somebody takes it.

A unit's exposure is told once, and its calls are counted per unit and value, so that repeats cost a look-up and what is
held is bounded. Nothing here knows of a store: once in a while somebody asks `take`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import exp, log
from typing import Final

from gateway.bounded import make_room
from gateway.errors import MalformedMessage
from gateway.forwarding.metadata import REPLAYED
from gateway.routing import Arms, Sticky
from gateway.status import OK, Code, Meaning, is_server_fault
from gateway.types import Facts
from gateway.v2.outputs import AnswerReader
from gateway.v2.peek import Head
from gateway.v2.scores import top_score

_REMEMBERED: Final = 100_000  # units of one experiment whose exposure was told lately
_WAITING: Final = 100_000  # records of one kind that wait for `take`
_STEPS: Final = 1.0 / log(1.02)  # measured values of one call are rounded to steps of 2 %, so that alike ones are one
_LONGEST: Final = 64  # characters of a unit or request that are kept as they are
_RULE: Final = "rule:"
_MOST_READ: Final = 1 << 20  # bytes of an answer whose confidence is measured


def short(text: str) -> str:
    """A unit or request as it is held: callers choose how long it is."""
    return text if len(text) <= _LONGEST else "sha256:" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Running:
    """An experiment that is under way, as far as calls of its model are concerned."""

    name: str
    model: str
    reason: str  # of the plans that it makes
    arms: frozenset[str]
    measures: tuple[tuple[str, str], ...] = ()  # outcomes and what of a call each is: "latency", "error", "size"
    agreements: tuple[tuple[str, str, float], ...] = ()
    """Outcomes that are agreement or its contrary, the variant with which, and what they are if answers agree."""
    confidences: tuple[tuple[str, str], ...] = ()  # outcomes that are confidence, and the output of scores or ""
    knows_requests: bool = True  # may outcomes be reported by the id of a request?
    sums: frozenset[str] = frozenset()  # outcomes of which a unit's mean and number are enough, and not each value
    counts_variant: bool = False  # is it an error, too, that the arm failed a call and another variant answered it?
    bandit: Arms | None = None  # whose epochs a unit's exposure is told with


@dataclass(frozen=True, slots=True)
class Met:
    """A unit met an arm."""

    experiment: str
    arm: str
    unit: str
    at: float  # Unix time
    is_forced: bool  # by a rule
    epoch: int | None = None  # of a bandit …
    propensity: float | None = None  # … and the probability with which the unit got this arm


@dataclass(slots=True)
class Taken:
    """What has come together since it was last taken."""

    exposures: list[Met] = field(default_factory=list)
    requests: dict[str, tuple[str, float]] = field(default_factory=dict)  # unit and time by request id
    measured: dict[tuple[str, str, str, float], int] = field(default_factory=dict)
    """Calls by experiment, unit, outcome and value."""
    sums: dict[tuple[str, str, str], tuple[float, int]] = field(default_factory=dict)
    """Sum and number of the calls' values, by experiment, unit and outcome."""
    dropped: int = 0


class Exposed:
    """One call of a unit that takes part."""

    __slots__ = ("began", "running", "unit")

    def __init__(self, running: Running, unit: str, began: float) -> None:
        self.running = running
        self.unit = unit
        self.began = began


class Exposures:
    """By public model. `table` is empty, and false, when no experiment is under way."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time, most: int = _WAITING
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._most = most
        self._reader = AnswerReader()
        self._seen: dict[str, dict[tuple[str, str, bool], None]] = {}
        self._taken = Taken()
        self.table: dict[str, tuple[Running, ...]] = {}
        self.units: dict[str, int] = {}  # exposures told since the start, by experiment

    def apply(self, running: Sequence[Running]) -> None:
        """Put these experiments in force."""
        table: dict[str, tuple[Running, ...]] = {}
        for each in running:
            table[each.model] = (*table.get(each.model, ()), each)
        self._seen = {each.name: self._seen.get(each.name, {}) for each in running}
        self.units = {each.name: self.units.get(each.name, 0) for each in running}
        self.table = table

    def begun(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self, model: str, reason: str, arm: str, sticky: Sticky | None, facts: Facts, request_id: str
    ) -> Exposed | None:
        """A call has begun, for which the route has chosen this arm for this reason. None: nothing is measured."""
        experiments = self.table.get(model)
        if experiments is None or sticky is None or REPLAYED in facts.metadata:
            return None
        is_forced = reason.startswith(_RULE)
        for running in experiments:
            if reason == running.reason or (is_forced and arm in running.arms):
                key = sticky.maybe_read(facts)
                if key is None:
                    return None
                unit = short(key)
                self._meet(running, arm, unit, is_forced, key)
                if request_id and running.knows_requests:
                    self._know(short(request_id), unit)
                if not is_forced:
                    return Exposed(running, unit, self._clock())
        return None

    def _meet(self, running: Running, arm: str, unit: str, is_forced: bool, whole: str) -> None:
        """whole: the unit's key, however long it is."""
        seen = self._seen[running.name]
        key = (unit, arm, is_forced)
        if key in seen:
            return
        if len(self._taken.exposures) >= self._most:
            self._taken.dropped += 1
            return
        make_room(seen, _REMEMBERED)
        seen[key] = None
        self.units[running.name] += 1
        epoch: int | None = None
        propensity: float | None = None
        if running.bandit is not None and not is_forced:
            of_epoch = running.bandit.maybe_propensity(whole, arm)
            if of_epoch is not None:
                epoch, propensity = of_epoch
        self._taken.exposures.append(Met(running.name, arm, unit, self._wall(), is_forced, epoch, propensity))

    def _know(self, request_id: str, unit: str) -> None:
        requests = self._taken.requests
        if len(requests) < self._most:
            requests[request_id] = (unit, self._wall())
        elif request_id not in requests:
            self._taken.dropped += 1

    def ended(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self,
        exposed: Exposed,
        code: Code,
        meaning: Meaning | None,
        callers_fault: bool,
        size: int,
        stood_in: bool = False,
    ) -> None:
        """Its call has ended. meaning: of the last attempt, if that failed. stood_in: another variant has answered,
        since the arm failed or could not be asked."""
        is_error = not callers_fault and (is_server_fault(code, meaning) or code is Code.RESOURCE_EXHAUSTED)
        is_error = is_error or (stood_in and exposed.running.counts_variant)
        for outcome, measure in exposed.running.measures:
            if measure == "error":
                if code is OK or is_error:
                    self._count(exposed, outcome, 1.0 if is_error else 0.0)
            elif code is OK:
                self._count(exposed, outcome, self._clock() - exposed.began if measure == "latency" else float(size))

    def scored(self, exposed: Exposed, body: bytes, head: Head) -> None:
        """Its answer is here: how sure is it? What can't be read is not measured."""
        if len(body) > _MOST_READ:
            return
        try:
            answer = self._reader.read(body, head)
        except MalformedMessage:
            return
        for outcome, output in exposed.running.confidences:
            score = top_score(answer, output)
            if score is not None:
                self._count(exposed, outcome, score)

    def compared(self, exposed: Exposed, reference: str, agrees: bool) -> None:
        """Its answer was compared with this variant's."""
        for outcome, wanted, value in exposed.running.agreements:
            if wanted == reference:
                self._count(exposed, outcome, value if agrees else 1.0 - value)

    def _count(self, exposed: Exposed, outcome: str, value: float) -> None:
        running, taken = exposed.running, self._taken
        if outcome in running.sums:
            self._add(taken, (running.name, exposed.unit, outcome), value)
            return
        measured = taken.measured
        key = (running.name, exposed.unit, outcome, rounded(value))
        calls = measured.get(key)
        if calls is None and len(measured) >= self._most:
            taken.dropped += 1
            return
        measured[key] = 1 if calls is None else calls + 1

    def _add(self, taken: Taken, key: tuple[str, str, str], value: float) -> None:
        known = taken.sums.get(key)
        if known is not None:
            taken.sums[key] = (known[0] + value, known[1] + 1)
        elif len(taken.sums) < self._most:
            taken.sums[key] = (value, 1)
        else:
            taken.dropped += 1

    def take(self) -> Taken:
        """All of it, once."""
        taken, self._taken = self._taken, Taken()
        return taken

    def forget(self) -> None:
        """Tell exposures anew, since some that were taken are lost."""
        for seen in self._seen.values():
            seen.clear()


def rounded(value: float) -> float:
    """To 1 %, so that values which are alike are counted as one."""
    if value in {0.0, 1.0}:  # whether something was so
        return value
    return exp(round(log(value) * _STEPS) / _STEPS) if value > 0.0 else -rounded(-value)
