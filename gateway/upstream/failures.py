"""Pure: whose calls failed on one endpoint lately, so that no caller alone decides what becomes of the others' calls.

A call is everybody's, its caller's, and, where the config says what users are recognised by, its user's: these are its
scopes, from the widest. What fails for one user alone may be his input, and what fails for all users of one caller that
caller's; only what fails for several callers is the endpoint's fault for sure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

MOST: Final = 64  # failures that are remembered

Scopes = tuple[int, ...]
"""Of one call: everybody, its caller, and its user if it names one. Hashes, so that long names cost no more."""

EVERYBODY: Final = 0
NOBODY_KNOWN: Final[Scopes] = (EVERYBODY,)
"""Of a call whose caller is not known, or has no part in how it goes."""


def scopes_of(caller: str, user: str | None) -> Scopes:
    """user: None if the call names none."""
    own = hash((caller,))
    return (EVERYBODY, own) if user is None else (EVERYBODY, own, hash((caller, user)))


class Failures:
    """The last failures on one endpoint, and whose they were."""

    __slots__ = ("_failures",)

    def __init__(self) -> None:
        self._failures: deque[tuple[float, Scopes]] = deque(maxlen=MOST)

    def add(self, now: float, scopes: Scopes) -> None:
        self._failures.append((now, scopes))

    def clear(self) -> None:
        self._failures.clear()

    def others(self, within: Scopes, run: int, since: float) -> tuple[int, int]:
        """Failures in the last run, and since an instant, of those in a scope but for the one of them that had most.

        within: the scope, after those around it.
        """
        depth = len(within)
        lately = [(index < run, at >= since, scopes) for index, (at, scopes) in self._newest_first()]
        lately = [each for each in lately if (each[0] or each[1]) and each[2][:depth] == within]
        known = Counter(scopes[depth] for _, _, scopes in lately if len(scopes) > depth)
        worst = known.most_common(1)[0][0] if known else None
        left = [each for each in lately if len(each[2]) == depth or each[2][depth] != worst]
        return sum(each[0] for each in left), sum(each[1] for each in left)

    def worst(self, within: Scopes, run: int, since: float) -> Scopes:
        """Of those in a scope, the one that had most failures; the scope itself if nobody is known."""
        depth = len(within)
        lately = (scopes for index, (at, scopes) in self._newest_first() if index < run or at >= since)
        known = Counter(scopes[: depth + 1] for scopes in lately if scopes[:depth] == within and len(scopes) > depth)
        return known.most_common(1)[0][0] if known else within

    def within(self, whose: Scopes) -> Sequence[Scopes]:
        """The failures of a scope."""
        return [scopes for _, scopes in self._failures if scopes[: len(whose)] == whose]

    def forget(self, whose: Scopes, run: int, since: float) -> tuple[int, int]:
        """Drop the failures of a scope. Answers how many of the last run, and since an instant, are left."""
        depth = len(whose)
        kept = [(index < run, at, scopes) for index, (at, scopes) in self._newest_first() if scopes[:depth] != whose]
        self._failures = deque(((at, scopes) for _, at, scopes in reversed(kept)), maxlen=MOST)
        return sum(each[0] for each in kept), sum(each[1] >= since for each in kept)

    def _newest_first(self) -> Sequence[tuple[int, tuple[float, Scopes]]]:
        return list(enumerate(reversed(self._failures)))
