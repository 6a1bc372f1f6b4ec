"""How the calls of a variant ended, by whose they are: so that no single caller decides what becomes of it.

Callers and units are too many to be kept by name. Each has a place, by a hash that is the same at every worker: one of
`PLACES` as a unit, and one of as many as a caller. Who calls most is in one place of each kind, and what is broken for
all is bad in all places. So an alarm is believed only if it holds whatever place is left out, or if that leaves nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from gateway.experiments.rollout import LOG_BAD, Alarm, Calls, moved

PLACES: Final = 16
KINDS: Final = 2  # units, then callers
_ALL: Final = range(KINDS * PLACES)

_SAYS: Final = 2.99 * LOG_BAD  # of all others together: as after three bad calls in a row
_AWAY: Final = 15  # looks without a call of others to either variant, after which a caller counts as alone
_AT_FIRST: Final = 3  # the same at the beginning, when others were never heard
_LONG: Final = 30  # looks without a call of others to this variant, after which their word is not waited for


@dataclass(frozen=True, slots=True)
class Crowd:
    """Calls of one look. If only sums are known, all calls count as those of others.

    Calls that the variant did not get, since it is left alone, say nothing of it.
    """

    calls: Calls
    good: Sequence[int] = ()  # by place; () if only sums are known
    bad: Sequence[int] = ()  # likewise

    def others(self) -> Sequence[tuple[int, int]]:
        """For each place, good and bad calls of all but those who have it."""
        good, bad = self.calls.good, self.calls.bad - self.calls.left_alone
        if not self.good:
            return [(good, bad)] * len(_ALL)
        return [(good - own_good, bad - own_bad) for own_good, own_bad in zip(self.good, self.bad, strict=True)]

    @property
    def judged(self) -> int:
        """1 if most calls are good, -1 if most are bad, else 0; without whoever has most bad ones, if others called."""
        good, bad = self.calls.good, self.calls.bad
        if bad >= good and self.bad:
            worst = max(_ALL, key=self.bad.__getitem__)
            left = self.others()[worst]
            good, bad = left if any(left) else (good, bad)
        return (good > bad) - (bad > good)

    @property
    def is_empty(self) -> bool:
        return not (self.calls.good or self.calls.bad)


class Away:
    """For each place, looks since anybody else called any variant."""

    def __init__(self) -> None:
        self._looks = [_AWAY - _AT_FIRST for _ in _ALL]

    def add(self, before: Crowd, after: Crowd) -> None:
        for place, (old, new) in enumerate(zip(before.others(), after.others(), strict=True)):
            self._looks[place] = 0 if any(old) or any(new) else self._looks[place] + 1

    def is_alone(self, place: int) -> bool:
        return self._looks[place] > _AWAY


class CrowdAlarm:
    """The alarm of one variant, and what it would be without those of each place."""

    def __init__(self) -> None:
        self.all = Alarm()
        self._others = [0.0 for _ in _ALL]  # `Alarm.log_e` without those who have the place
        self._silent = [0 for _ in _ALL]  # looks in a row in which nobody else called
        self._heard = [False for _ in _ALL]  # has anybody else ever?

    def add(self, crowd: Crowd) -> None:
        self.all = self.all.after(crowd.calls)
        for place, (good, bad) in enumerate(crowd.others()):
            if good or bad:
                self._others[place] = moved(self._others[place], good, bad)
                self._silent[place], self._heard[place] = 0, True
            elif crowd.calls.left_alone:
                self._silent[place] = 0  # they may have called
            else:
                self._silent[place] += 1

    def recall(self, crowd: Crowd) -> None:
        """As `add`, of calls of which only a part is known: that others are silent does not follow from them."""
        self.add(crowd)
        self._silent = [0 for _ in _ALL]

    def believed(self, away: Away) -> Alarm:
        """The alarm as far as it is not one caller's alone: neither raised by one, nor held up by one."""
        asked = [place for place in _ALL if self._silent[place] <= _LONG and not away.is_alone(place)]
        if all(self._others[place] >= _SAYS for place in asked):
            return self.all
        heard = [self._others[place] for place in asked if self._heard[place]]
        doubted = self.all.doubted()
        return replace(doubted, log_e=min([doubted.log_e, *heard]))
