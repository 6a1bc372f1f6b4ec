"""How calls of the two variants of a rollout end, and some of their answers, until somebody takes them.

Numbers only grow, and are read from another thread. Nothing here knows of a store or decides anything.
"""

from __future__ import annotations

import math
from typing import Final
from zlib import crc32

from gateway.experiments.crowd import KINDS, PLACES
from gateway.status import OK, Code, Meaning, is_server_fault

_MOST_BYTES: Final = 1 << 20  # of an answer that is looked at
_MOST_OF_ONE: Final = 3  # answers to one unit, or one caller, of those that are looked at; or one took all
_WITNESSES: Final = 8  # in so many seconds, at most, at one worker
_WITNESS_SECONDS: Final = 60.0
_WITNESS_GAP: Final = 0.2  # seconds between two, so that what lasts a moment is no more than that
_WITNESSES_OF_UNIT: Final = 1  # of those: of one place, of which there are `PLACES` of each kind
_WITNESSES_OF_CALLER: Final = 3
_CLOSE_SECONDS: Final = 0.1  # before its deadline; callers who wait no longer cancel a moment before it passes here


class Whose:
    """Whose a call is, as places in a crowd."""

    __slots__ = ("caller", "unit")

    def __init__(self, unit: str, caller: str) -> None:
        """unit: "" if none is known; then the caller counts as one.

        Two that share a place as callers need not share one as units: other bits of the hash say which.
        """
        hashed = crc32(caller.encode("utf-8", "surrogatepass"))
        self.unit = (crc32(unit.encode("utf-8", "surrogatepass")) if unit else hashed) % PLACES
        self.caller = PLACES + (hashed >> 16) % PLACES


class Spread:
    """What was good and what was bad, by place."""

    __slots__ = ("bad", "good")

    def __init__(self) -> None:
        self.good = [0] * (KINDS * PLACES)
        self.bad = [0] * (KINDS * PLACES)

    def add(self, whose: Whose, is_good: bool) -> None:
        counts = self.good if is_good else self.bad
        counts[whose.unit] += 1
        counts[whose.caller] += 1


class Witnesses:
    """Calls that a variant gets although it is left alone, so that it becomes known for whom it is broken.

    It may be left alone after very few calls, or those of one caller, whose word takes nothing back; and from then on
    nobody else's calls would tell. So a few have their say, of different units and callers: three of a caller, as so
    many others are what an alarm needs, whoever is left out.
    """

    __slots__ = ("_began", "_last", "_number", "_of")

    def __init__(self) -> None:
        self._began = self._last = -math.inf
        self._number = 0  # since `_began`
        self._of: dict[int, int] = {}  # likewise, by place

    def maybe_one(self, whose: Whose, now: float) -> bool:
        """Shall this call be one?"""
        if now - self._last < _WITNESS_GAP:
            return False
        if now - self._began >= _WITNESS_SECONDS:
            self._began, self._number, self._of = now, 0, {}
        of_unit, of_caller = self._of.get(whose.unit, 0), self._of.get(whose.caller, 0)
        if self._number >= _WITNESSES or of_unit >= _WITNESSES_OF_UNIT or of_caller >= _WITNESSES_OF_CALLER:
            return False
        self._of[whose.unit], self._of[whose.caller] = of_unit + 1, of_caller + 1
        self._last = now
        self._number += 1
        return True


class VariantCounts:
    """Of one variant, as the one that calls were meant for."""

    __slots__ = (
        "answers", "ended_by", "errors", "finite", "good", "left_alone", "looks", "not_finite", "seen_by", "taken",
        "unanswered", "witnesses", "wrong",
    )  # fmt: skip

    def __init__(self, witnesses: Witnesses | None = None) -> None:
        """witnesses: of the variant that units move to."""
        self.good = 0
        self.errors = 0
        self.unanswered = 0
        self.wrong = 0
        self.left_alone = 0
        self.ended_by = Spread()
        self.finite = 0
        self.not_finite = 0
        self.seen_by = Spread()
        self.looks = 0  # answers that are still wanted
        self.answers: list[tuple[bytes, Whose]] = []  # to be looked at
        self.taken: dict[int, int] = {}  # of those, by place
        self.witnesses = witnesses

    def ended(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self, code: Code, meaning: Meaning | None, why: str, deadline: float | None, now: float, whose: Whose
    ) -> None:
        """A call of it has ended by nobody's fault but a server's.

        meaning: of its last attempt, if that failed. why: another variant has answered; "" if none has.
        """
        if code is OK:
            if not why:
                self.good += 1
            elif why == Meaning.LATE.value:
                self.unanswered += 1
            elif why == Meaning.WRONG.value:
                self.wrong += 1
            else:
                self.errors += 1
        elif code is Code.DEADLINE_EXCEEDED:
            self.unanswered += 1
        elif code is Code.CANCELLED:
            if deadline is None or now < deadline - _CLOSE_SECONDS:
                return
            self.unanswered += 1
        elif meaning is Meaning.WRONG:
            self.wrong += 1
        elif code is Code.RESOURCE_EXHAUSTED or is_server_fault(code, meaning):
            self.errors += 1
        else:
            return
        self.ended_by.add(whose, code is OK and not why)

    def passed_over(self) -> None:
        """Another variant had a call of it, as it is left alone for what it did to others."""
        self.left_alone += 1

    def answered(self, body: bytes, whose: Whose) -> None:
        """An answer of it, of which one more is wanted."""
        taken = self.taken
        of_unit, of_caller = taken.get(whose.unit, 0), taken.get(whose.caller, 0)
        if len(body) <= _MOST_BYTES and of_unit < _MOST_OF_ONE and of_caller < _MOST_OF_ONE:
            taken[whose.unit], taken[whose.caller] = of_unit + 1, of_caller + 1
            self.looks -= 1
            self.answers.append((body, whose))

    def take(self, looks: int) -> list[tuple[bytes, Whose]]:
        """The answers to look at. looks: how many more are wanted."""
        taken, self.answers, self.looks, self.taken = self.answers, [], looks, {}
        return taken

    def seen(self, whose: Whose, is_finite: bool) -> None:
        """An answer was looked at."""
        if is_finite:
            self.finite += 1
        else:
            self.not_finite += 1
        self.seen_by.add(whose, is_finite)


class Rolled:
    """By public model and variant. `table` is empty, and false, when no rollout is under way."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, VariantCounts]] = {}

    def apply(self, variants: dict[str, tuple[str, str]]) -> None:
        """Count calls of these models' old and new variants; what is counted already stays."""
        before, self.table = self.table, {}
        for model, (old, new) in variants.items():
            known = before.get(model, {})
            self.table[model] = {
                old: known.get(old) or VariantCounts(),
                new: known.get(new) or VariantCounts(Witnesses()),
            }

    def maybe(self, model: str, variant: str) -> VariantCounts | None:
        counts = self.table.get(model)
        return None if counts is None else counts.get(variant)
