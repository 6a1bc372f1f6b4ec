"""The fast lane of a rollout, from look to look: is the new variant plainly broken, and is the old one not?

What they share may break: a server, a network, a feature store. Then whichever has more calls raises its alarm first,
and is rid of it last. So an alarm of the new variant is believed only once in two looks, one after the other, the new
one has failed while the old one has answered: in one alone an outage may just have begun or ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from gateway.experiments.crowd import Away, Crowd, CrowdAlarm
from gateway.experiments.rollout import Alarm

_NEEDED: Final = 2  # looks
_SILENT: Final = 3  # looks in which the old variant had no calls, after which what the new one does is enough


@dataclass(slots=True)
class FastLane:
    """Of one rollout, and of one kind of thing that may be bad."""

    before: Alarm = field(default_factory=Alarm)  # as far as they are not one caller's alone
    after: Alarm = field(default_factory=Alarm)
    is_believed: bool = False  # is the new variant broken and the old one not?
    _old: CrowdAlarm = field(default_factory=CrowdAlarm)
    _new: CrowdAlarm = field(default_factory=CrowdAlarm)
    _away: Away = field(default_factory=Away)
    _told: int = 0  # looks that told them apart, since one told that they are alike
    _silent: int = 0  # looks in a row in which the old one had no calls

    def add(self, before: Crowd, after: Crowd) -> None:
        """What has ended since the last look."""
        self._away.add(before, after)
        self._old.add(before)
        self._new.add(after)
        self.before, self.after = self._old.believed(self._away), self._new.believed(self._away)
        if not self._new.all.is_raised:
            self._told = self._silent = 0
        elif not after.is_empty:
            self._compare(before, after)
        self.is_believed = self._told >= _NEEDED and self.after.is_raised and not self.before.is_raised

    def recall(self, before: Crowd, after: Crowd) -> None:
        """What ended in a look that others may not have taken, as far as it is known. It raises alarms, and looks that
        are still to come tell whether they are believed."""
        self._old.recall(before)
        self._new.recall(after)
        self.before, self.after = self._old.believed(self._away), self._new.believed(self._away)

    def _compare(self, before: Crowd, after: Crowd) -> None:
        """Has the new one failed in this look and the old one not?"""
        self._silent = self._silent + 1 if before.is_empty else 0
        if after.judged >= 0 or before.judged < 0:
            self._told = 0
        elif before.judged > 0 or self._silent > _SILENT:
            self._told += 1

    @property
    def evidence(self) -> tuple[Alarm, Alarm]:
        """The alarms of both, as far as they are to be believed."""
        return self.before, self.after if self.is_believed or self.before.is_raised else self.after.doubted()
