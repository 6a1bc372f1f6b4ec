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
    variant that can't answer can't stand in.
    """

    __slots__ = ("_agreed", "_last", "settings")

    def __init__(self, settings: ParitySettings) -> None:
        self.settings = settings
        self._last: deque[bool] = deque(maxlen=settings.copies)
        self._agreed = 0

    def add(self, agrees: bool) -> None:
        if len(self._last) == self.settings.copies:
            self._agreed -= self._last[0]
        self._last.append(agrees)
        self._agreed += agrees

    @property
    def is_open(self) -> bool:
        needed = self.settings
        return len(self._last) == needed.copies and self._agreed >= needed.agreement * needed.copies

    def now(self) -> ParityNow:
        """May be asked from any thread."""
        return ParityNow(self.is_open, len(self._last), self._agreed, self.settings.copies, self.settings.agreement)
