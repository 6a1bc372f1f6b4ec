"""Which units met which arm of an experiment, and what was measured of their calls, until somebody takes it.

A unit's exposure is told once, and its calls are added up per unit, so that a repeat costs a look-up and makes nothing
that stays, and what is held is bounded. Whoever remembers what was decided for a call remembers its `Member` with that,
and even the look-up is saved. Nothing here knows of a store: once in a while somebody takes what there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import exp, log
from typing import Final, NamedTuple

from mypy_extensions import mypyc_attr

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
_LATENCY: Final = "latency"  # what of a call's end is measured …
_ERROR: Final = "error"
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


class Layout:
    """Which outcomes are measured at a call's end, by their places."""

    def __init__(self, measures: Sequence[tuple[str, str]], sums: frozenset[str]) -> None:
        """sums: outcomes that are added up; of the others each value counts."""
        added, singly = list[tuple[int, str]](), list[tuple[int, str]]()
        for at, (outcome, measure) in enumerate(measures):
            (added if outcome in sums else singly).append((at, measure))
        self.added = added
        self.singly = singly
        self.is_timed = any(measure == _LATENCY for _, measure in measures)
        self.at_errors = sum(1 for _, measure in measures if measure == _ERROR)  # that any call's end counts for
        self.outcomes = len(measures)


class Tally:
    """What the calls of one unit have come to.

    What every call adds to are numbers of their own, which compiled code holds without an object for each.
    """

    __slots__ = (
        "_counts",
        "_layout",
        "_outcomes",
        "_sums",
        "answered",
        "bytes",
        "ended",
        "failed",
        "seconds",
        "values",
    )

    def __init__(self, outcomes: int, layout: Layout | None = None) -> None:
        self._outcomes = outcomes
        self._layout = layout
        self._counts: list[int] | None = None
        self._sums: list[float] | None = None
        self.ended = 0  # calls that were answered, or failed by an error that counts
        self.failed = 0
        self.answered = 0
        self.bytes = 0  # of answers …
        self.seconds = 0.0  # … and until them
        self.values: dict[tuple[int, float], int] | None = None  # calls by outcome and value, where each value counts

    def add(self, at: int, value: float) -> None:
        """A value of an outcome that is not measured at a call's end."""
        counts, sums = self._added()
        counts[at] += 1
        sums[at] += value

    def _added(self) -> tuple[list[int], list[float]]:
        counts, sums = self._counts, self._sums
        if counts is None or sums is None:
            counts, sums = self._counts, self._sums = [0] * self._outcomes, [0.0] * self._outcomes
        return counts, sums

    @property
    def counts(self) -> list[int]:
        """Of values that were added up, outcome by outcome in their order in the `Book`."""
        counts, _ = self._added()
        if self._layout is not None:
            for at, measure in self._layout.added:
                counts[at] = self.ended if measure == _ERROR else self.answered
        return counts

    @property
    def sums(self) -> list[float]:
        """Of the same values."""
        _, sums = self._added()
        if self._layout is not None:
            for at, measure in self._layout.added:
                if measure == _ERROR:
                    sums[at] = float(self.failed)
                else:
                    sums[at] = self.seconds if measure == _LATENCY else float(self.bytes)
        return sums


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
        self.is_measured = bool(self.outcomes)  # anything, of any call?
        self.layout = Layout(measures, running.sums)
        self.counts_ends = bool(measures)  # is anything measured of a call's end?
        self.agreements = [(at, *each[1:]) for at, each in enumerate(agreements, len(measures))]
        first = len(measures) + len(agreements)
        self.confidences = [(at, output) for at, (_, output) in enumerate(confidences, first)]
        self.adds = [outcome in running.sums for outcome in self.outcomes]  # or is each value counted?
        self.tallies: dict[str, Tally] = {}
        self.records = 0  # units with a tally, and values where each counts
        self.taken = 0  # times that they were


class Member:
    """What is known of the calls of one unit that are decided alike, until what is known has changed."""

    __slots__ = ("arm", "book", "changes", "reason", "taken", "tally", "unit")

    def __init__(self, changes: int, reason: str, arm: str) -> None:
        self.changes = changes
        self.reason = reason
        self.arm = arm
        self.book: Book | None = None  # None: nothing is measured
        self.unit = ""
        self.tally: Tally | None = None  # the unit's …
        self.taken = 0  # … as long as the book was taken from so many times


@mypyc_attr(acyclic=True)
class Exposed:
    """One call of a unit that takes part, of which something is measured."""

    __slots__ = ("began", "book", "member", "running")

    def __init__(self, book: Book, member: Member, began: float) -> None:
        self.book = book
        self.running = book.running
        self.member = member
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
        self._changes = 0  # after each of which it is asked anew who takes part, and was told of
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
        self._changes += 1

    def begun(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self, model: str, reason: str, arm: str, sticky: Sticky | None, facts: Facts, request_id: str
    ) -> Exposed | None:
        """A call has begun, for which the route has chosen this arm for this reason. None: nothing is measured."""
        return self.measured(self.member(model, reason, arm, sticky, facts, request_id)[0])

    def holds(self, member: Member, reason: str, arm: str) -> bool:
        """Would `member` say the same, of a call that differs in this alone?"""
        return member.changes == self._changes and member.reason == reason and member.arm == arm

    def measured(self, member: Member) -> Exposed | None:
        """A call has begun. None: nothing of it is measured."""
        book = member.book
        if book is None:
            return None
        return Exposed(book, member, self._clock() if book.layout.is_timed else 0.0)

    def member(  # noqa: PLR0917  (as `begun`)
        self, model: str, reason: str, arm: str, sticky: Sticky | None, facts: Facts, request_id: str
    ) -> tuple[Member, bool]:
        """Tell that a call's unit has met its arm, if it was not told yet.

        returns: what is to be measured; and does it hold for the next call, too, with nothing to tell?
        """
        member = Member(self._changes, reason, arm)
        books = self.table.get(model)
        if books is None or sticky is None or REPLAYED in facts.metadata:
            return member, True
        is_forced = reason.startswith(_RULE)
        for book in books:
            running = book.running
            if reason == running.reason or (is_forced and arm in running.arms):
                key = sticky.maybe_read(facts)
                if key is None:
                    return member, True
                unit = key if len(key) <= _LONGEST else short(key)
                if is_forced:
                    is_told = self._meet_forced(book, arm, unit)
                else:
                    is_told = book.arms.get(unit) == arm or self._meet(book, arm, unit, key)
                if request_id and running.knows_requests:
                    self._know(short(request_id), unit)
                    is_told = False
                if not is_forced and book.is_measured:
                    member.book, member.unit = book, unit
                member.changes = self._changes  # of which one may be that room was made
                return member, is_told
        return member, True

    def _meet(self, book: Book, arm: str, unit: str, key: str) -> bool:
        """key: the unit's, however long it is. False: there was no room to tell it."""
        epoch: int | None = None
        propensity: float | None = None
        if book.running.bandit is not None:
            of_epoch = book.running.bandit.maybe_propensity(key, arm)
            if of_epoch is not None:
                epoch, propensity = of_epoch
        if not self._tell(Met(book.running.name, arm, unit, self._wall(), False, epoch, propensity)):
            return False
        if unit in book.arms or len(book.arms) >= _REMEMBERED:
            self._changes += 1  # what was known of a unit that has another arm now, or is forgotten, holds no more
        make_room(book.arms, _REMEMBERED)
        book.arms[unit] = arm
        return True

    def _meet_forced(self, book: Book, arm: str, unit: str) -> bool:
        if (unit, arm) in book.forced:
            return True
        if not self._tell(Met(book.running.name, arm, unit, self._wall(), True)):
            return False
        if len(book.forced) >= _REMEMBERED:
            self._changes += 1
        make_room(book.forced, _REMEMBERED)
        book.forced[unit, arm] = None
        return True

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
        layout = book.layout
        if tally is None:
            self._taken.dropped += layout.outcomes if code is OK else layout.at_errors
            return
        tally.ended += 1
        if is_error:
            tally.failed += 1
        seconds = 0.0
        if code is OK:
            tally.answered += 1
            tally.bytes += size
            if layout.is_timed:
                seconds = self._clock() - exposed.began
                tally.seconds += seconds
        for at, measure in layout.singly:
            if measure == _ERROR:
                self._count_value(book, tally, (at, 1.0 if is_error else 0.0))
            elif code is OK:
                self._count_value(book, tally, (at, rounded(seconds if measure == _LATENCY else float(size))))

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
        book, member = exposed.book, exposed.member
        if member.tally is not None and member.taken == book.taken:
            return member.tally
        tally = book.tallies.get(member.unit)
        if tally is None:
            if not self._has_room(book):
                return None
            if not book.tallies and self._books.get(book.running.name) is not book:  # the call has outlived its config
                self._replaced.append(book)
            tally = book.tallies[member.unit] = Tally(len(book.outcomes), book.layout)
        member.tally, member.taken = tally, book.taken
        return tally

    def _count(self, book: Book, tally: Tally | None, at: int, value: float) -> None:
        if tally is None:
            self._taken.dropped += 1
        elif book.adds[at]:
            tally.add(at, value)
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
            book.taken += 1
        self._records = 0
        return taken

    def forget(self) -> None:
        """Tell exposures anew, since some that were taken are lost."""
        for book in self._books.values():
            book.arms.clear()
            book.forced.clear()
        self._changes += 1


def rounded(value: float) -> float:
    """To 1 %, so that values which are alike are counted as one."""
    if value in {0.0, 1.0}:  # whether something was so
        return value
    return exp(round(log(value) * _STEPS) / _STEPS) if value > 0.0 else -rounded(-value)
