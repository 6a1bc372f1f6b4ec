"""Has a variant agreed with those that answer callers, often enough to stand in for them? Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gateway.hooks import ParityNow


@dataclass(frozen=True, slots=True)
class ParitySettings:
    """What the config asks for."""

    copies: int  # the last so many count
    agreement: float  # the share of them that must agree


class Parity:
    """The gate of one shadow. It is closed until so many copies were compared, and closes again when they disagree.

    A copy that the shadow failed, or whose answer could not be compared or has NaN, counts as one that disagrees: a
    variant that can't answer can't stand in. What other workers found counts as what was found here.
    """

    __slots__ = ("_agreed", "_last", "elsewhere", "settings")

    def __init__(self, settings: ParitySettings) -> None:
        self.settings = settings
        self._last: deque[bool] = deque(maxlen=settings.copies)
        self._agreed = 0
        self.elsewhere: tuple[int, int] = (0, 0)  # copies that other workers compared lately, and those that agreed

    def add(self, agrees: bool) -> None:
        if len(self._last) == self.settings.copies:
            self._agreed -= self._last[0]
        self._last.append(agrees)
        self._agreed += agrees

    @property
    def counts(self) -> tuple[int, int]:
        """Of the last copies of this worker, those compared and those that agreed. May be asked from any thread."""
        return len(self._last), self._agreed

    @property
    def is_open(self) -> bool:
        needed = self.settings
        compared, agreed = len(self._last) + self.elsewhere[0], self._agreed + self.elsewhere[1]
        return compared >= needed.copies and agreed >= needed.agreement * compared

    def now(self) -> ParityNow:
        """May be asked from any thread."""
        needed, (compared, agreed) = self.settings, self.elsewhere
        return ParityNow(
            self.is_open, len(self._last) + compared, self._agreed + agreed, needed.copies, needed.agreement
        )
