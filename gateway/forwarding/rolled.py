"""How calls of the two variants of a rollout end, and some of their answers, until somebody takes them.

Numbers only grow, and are read from another thread. Nothing here knows of a store or decides anything.
"""

from __future__ import annotations

from typing import Final

from gateway.status import OK, Code, Meaning, is_server_fault

_MOST_BYTES: Final = 1 << 20  # of an answer that is looked at
_CLOSE_SECONDS: Final = 0.1  # before its deadline; callers who wait no longer cancel a moment before it passes here


class VariantCounts:
    """Of one variant, as the one that calls were meant for."""

    __slots__ = ("answers", "errors", "finite", "good", "looks", "not_finite", "unanswered")

    def __init__(self) -> None:
        self.good = 0
        self.errors = 0
        self.unanswered = 0
        self.finite = 0
        self.not_finite = 0
        self.looks = 0  # answers that are still wanted
        self.answers: list[bytes] = []  # to be looked at

    def ended(self, code: Code, meaning: Meaning | None, why: str, deadline: float | None, now: float) -> None:
        """A call of it has ended by nobody's fault but a server's.

        meaning: of its last attempt, if that failed. why: another variant has answered; "" if none has.
        """
        if code is OK:
            if not why:
                self.good += 1
            elif why == Meaning.LATE.value:
                self.unanswered += 1
            else:
                self.errors += 1
        elif code is Code.DEADLINE_EXCEEDED:
            self.unanswered += 1
        elif code is Code.CANCELLED:
            if deadline is not None and now >= deadline - _CLOSE_SECONDS:
                self.unanswered += 1
        elif code is Code.RESOURCE_EXHAUSTED or is_server_fault(code, meaning):
            self.errors += 1

    def answered(self, body: bytes) -> None:
        """An answer of it, of which one more is wanted."""
        if len(body) <= _MOST_BYTES:
            self.looks -= 1
            self.answers.append(body)

    def take(self, looks: int) -> list[bytes]:
        """The answers to look at. looks: how many more are wanted."""
        taken, self.answers, self.looks = self.answers, [], looks
        return taken


class Rolled:
    """By public model and variant. `table` is empty, and false, when no rollout is under way."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, VariantCounts]] = {}

    def apply(self, variants: dict[str, tuple[str, str]]) -> None:
        """Count calls of these models' variants; what is counted already stays."""
        self.table = {
            model: {name: self.table.get(model, {}).get(name) or VariantCounts() for name in names}
            for model, names in variants.items()
        }

    def maybe(self, model: str, variant: str) -> VariantCounts | None:
        counts = self.table.get(model)
        return None if counts is None else counts.get(variant)
