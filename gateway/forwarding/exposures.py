"""Which units met which arm of an experiment, and what was measured of their calls, until somebody takes it.

A unit's exposure is told once, and its calls are added up per unit, so that a repeat costs a look-up and makes nothing
that stays, and what is held is bounded. Nothing here knows of a store: once in a while somebody takes what there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import exp, log
from typing import Final, NamedTuple

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


class Tally:
    """What the calls of one unit have come to, outcome by outcome in their order in the `Book`."""

    __slots__ = ("counts", "sums", "values")

    def __init__(self, outcomes: int) -> None:
        self.counts = [0] * outcomes  # of values that were added up
        self.sums = [0.0] * outcomes
        self.values: dict[tuple[int, float], int] | None = None  # calls by outcome and value, where each value counts


class Measured(NamedTuple):
    """What was measured of the calls of one experiment."""

    experiment: str
    outcomes: tuple[str, ...]
    tallies: dict[str, Tally]  # by unit
    records: int  # units, and values where each counts


@dataclass(slots=True)
class Taken:
    """Whom it was that came, since it was last taken."""

    exposures: list[Met] = field(default_factory=list)
    requests: dict[str, tuple[str, float]] = field(default_factory=dict)  # unit and time by request id
    dropped: int = 0


class Book:
    """One experiment under way: its units, and what of their calls is measured."""

    def __init__(self, running: Running, before: Book | None) -> None:
        """before: of the same name, whose units were told of already."""
        self.running = running
        self.arms: dict[str, str] = {} if before is None else before.arms  # by unit: the one that was told last
        self.forced: dict[tuple[str, str], None] = {} if before is None else before.forced  # units and arms
        measures, agreements, confidences = running.measures, running.agreements, running.confidences
        names = [*(each[0] for each in measures), *(each[0] for each in agreements), *(each[0] for each in confidences)]
        self.outcomes = tuple(names)
        # What is measured, by the place of the outcome in `outcomes`.
        self.latencies = [at for at, (_, measure) in enumerate(measures) if measure == "latency"]
        self.errors = [at for at, (_, measure) in enumerate(measures) if measure == "error"]
        self.sizes = [at for at, (_, measure) in enumerate(measures) if measure == "size"]
        self.counts_ends = bool(measures)  # is anything measured of a call's end?
        self.agreements = [(at, *each[1:]) for at, each in enumerate(agreements, len(measures))]
        first = len(measures) + len(agreements)
        self.confidences = [(at, output) for at, (_, output) in enumerate(confidences, first)]
        self.adds = [outcome in running.sums for outcome in self.outcomes]  # or is each value counted?
        self.tallies: dict[str, Tally] = {}
        self.records = 0  # units with a tally, and values where each counts


class Exposed:
    """One call of a unit that takes part."""

    __slots__ = ("began", "book", "running", "unit")

    def __init__(self, book: Book, unit: str, began: float) -> None:
        self.book = book
        self.running = book.running
        self.unit = unit
        self.began = began


class Exposures:
    """By public model. `table` is empty, and false, when no experiment is under way."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        most: int = _WAITING,
        reader: AnswerReader | None = None,
    ) -> None:
        """reader: of others who look at the same answers."""
        self._clock = clock
        self._wall = wall
        self._most = most
        self._reader = AnswerReader() if reader is None else reader
        self._books: dict[str, Book] = {}
        self._replaced: list[Book] = []  # from which nothing was taken yet
        self._taken = Taken()
        self._records = 0  # of all books
        self.table: dict[str, tuple[Book, ...]] = {}
        self.units: dict[str, int] = {}  # exposures told since the start, by experiment

    def apply(self, running: Sequence[Running]) -> None:
        """Put these experiments in force. What was measured stays to be taken."""
        books: dict[str, Book] = {}
        table: dict[str, tuple[Book, ...]] = {}
        for each in running:
            before = self._books.get(each.name)
            book = before if before is not None and before.running == each else Book(each, before)
            books[each.name] = book
            table[each.model] = (*table.get(each.model, ()), book)
        self._replaced += [book for name, book in self._books.items() if books.get(name) is not book and book.tallies]
        self.units = {each.name: self.units.get(each.name, 0) for each in running}
        self._books, self.table = books, table

    def begun(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self, model: str, reason: str, arm: str, sticky: Sticky | None, facts: Facts, request_id: str
    ) -> Exposed | None:
        """A call has begun, for which the route has chosen this arm for this reason. None: nothing is measured."""
        books = self.table.get(model)
        if books is None or sticky is None or REPLAYED in facts.metadata:
            return None
        is_forced = reason.startswith(_RULE)
        for book in books:
            running = book.running
            if reason == running.reason or (is_forced and arm in running.arms):
                key = sticky.maybe_read(facts)
                if key is None:
                    return None
                unit = key if len(key) <= _LONGEST else short(key)
                if is_forced:
                    self._meet_forced(book, arm, unit)
                elif book.arms.get(unit) != arm:
                    self._meet(book, arm, unit, key)
                if request_id and running.knows_requests:
                    self._know(short(request_id), unit)
                return None if is_forced else Exposed(book, unit, self._clock())
        return None

    def _meet(self, book: Book, arm: str, unit: str, key: str) -> None:
        """key: the unit's, however long it is."""
        epoch: int | None = None
        propensity: float | None = None
        if book.running.bandit is not None:
            of_epoch = book.running.bandit.maybe_propensity(key, arm)
            if of_epoch is not None:
                epoch, propensity = of_epoch
        if self._tell(Met(book.running.name, arm, unit, self._wall(), False, epoch, propensity)):
            make_room(book.arms, _REMEMBERED)
            book.arms[unit] = arm

    def _meet_forced(self, book: Book, arm: str, unit: str) -> None:
        if (unit, arm) not in book.forced and self._tell(Met(book.running.name, arm, unit, self._wall(), True)):
            make_room(book.forced, _REMEMBERED)
            book.forced[unit, arm] = None

    def _tell(self, met: Met) -> bool:
        """False: there is no room for it."""
        if len(self._taken.exposures) >= self._most:
            self._taken.dropped += 1
            return False
        self.units[met.experiment] += 1
        self._taken.exposures.append(met)
        return True

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
        book = exposed.book
        is_error = code is not OK and not callers_fault
        is_error = is_error and (is_server_fault(code, meaning) or code is Code.RESOURCE_EXHAUSTED)
        is_error = is_error or (stood_in and book.running.counts_variant)
        if not book.counts_ends or (code is not OK and not is_error):
            return
        tally = self._maybe_tally(exposed)
        for at in book.errors:
            self._count(book, tally, at, 1.0 if is_error else 0.0)
        if code is OK:
            for at in book.sizes:
                self._count(book, tally, at, float(size))
            for at in book.latencies:
                self._count(book, tally, at, self._clock() - exposed.began)

    def scored(self, exposed: Exposed, body: bytes, head: Head) -> None:
        """Its answer is here: how sure is it? What can't be read is not measured."""
        if len(body) > _MOST_READ:
            return
        try:
            answer = self._reader.read(body, head)
        except MalformedMessage:
            return
        for at, output in exposed.book.confidences:
            score = top_score(answer, output)
            if score is not None:
                self._count(exposed.book, self._maybe_tally(exposed), at, score)

    def compared(self, exposed: Exposed, reference: str, agrees: bool) -> None:
        """Its answer was compared with this variant's."""
        for at, wanted, value in exposed.book.agreements:
            if wanted == reference:
                self._count(exposed.book, self._maybe_tally(exposed), at, value if agrees else 1.0 - value)

    def _maybe_tally(self, exposed: Exposed) -> Tally | None:
        """Of its unit; None if there is no room for one."""
        book = exposed.book
        tally = book.tallies.get(exposed.unit)
        if tally is None and self._has_room(book):
            if not book.tallies and self._books.get(book.running.name) is not book:  # the call has outlived its config
                self._replaced.append(book)
            tally = book.tallies[exposed.unit] = Tally(len(book.outcomes))
        return tally

    def _count(self, book: Book, tally: Tally | None, at: int, value: float) -> None:
        if tally is None:
            self._taken.dropped += 1
        elif book.adds[at]:
            tally.sums[at] += value
            tally.counts[at] += 1
        else:
            self._count_value(book, tally, (at, rounded(value)))

    def _count_value(self, book: Book, tally: Tally, key: tuple[int, float]) -> None:
        if tally.values is None:
            tally.values = {}
        calls = tally.values.get(key, 0)
        if calls or self._has_room(book):
            tally.values[key] = calls + 1
        else:
            self._taken.dropped += 1

    def _has_room(self, book: Book) -> bool:
        """For one record more, which is counted."""
        if self._records >= self._most:
            return False
        self._records += 1
        book.records += 1
        return True

    def take(self) -> Taken:
        """Who came, once."""
        taken, self._taken = self._taken, Taken()
        return taken

    def take_measured(self) -> list[Measured]:
        """What was measured, once. It is the taker's: nothing changes it any more."""
        books, self._replaced = [*self._replaced, *self._books.values()], []
        taken = [
            Measured(book.running.name, book.outcomes, book.tallies, book.records) for book in books if book.tallies
        ]
        for book in books:
            book.tallies, book.records = {}, 0
        self._records = 0
        return taken

    def forget(self) -> None:
        """Tell exposures anew, since some that were taken are lost."""
        for book in self._books.values():
            book.arms.clear()
            book.forced.clear()


def rounded(value: float) -> float:
    """To 1 %, so that values which are alike are counted as one."""
    if value in {0.0, 1.0}:  # whether something was so
        return value
    return exp(round(log(value) * _STEPS) / _STEPS) if value > 0.0 else -rounded(-value)
