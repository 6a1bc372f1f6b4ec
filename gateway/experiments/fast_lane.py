"""The fast lane of a rollout, from look to look: is the new variant plainly broken, and is the old one not?

What they share may break: a server, a network, a feature store. Then whichever has more calls raises its alarm first,
and is rid of it last. So an alarm of the new variant is believed only once in two looks, one after the other, the new
one has failed while the old one has answered: in one alone an outage may just have begun or ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from gateway.experiments.rollout import Alarm, Calls

_NEEDED: Final = 2  # looks
_SILENT: Final = 3  # looks in which the old variant had no calls, after which what the new one does is enough


@dataclass(slots=True)
class FastLane:
    """Of one rollout, and of one kind of thing that may be bad."""

    before: Alarm = field(default_factory=Alarm)
    after: Alarm = field(default_factory=Alarm)
    is_believed: bool = False  # is the new variant broken and the old one not?
    _told: int = 0  # looks that told them apart, since one told that they are alike
    _silent: int = 0  # looks in a row in which the old one had no calls

    def add(self, before: Calls, after: Calls) -> None:
        """What has ended since the last look."""
        self.before, self.after = self.before.after(before), self.after.after(after)
        if not self.after.is_raised:
            self._told = self._silent = 0
        elif after.good or after.bad:
            self._compare(before, after)
        self.is_believed = self._told >= _NEEDED and self.after.is_raised and not self.before.is_raised

    def _compare(self, before: Calls, after: Calls) -> None:
        """Has the new one failed in this look and the old one not?"""
        self._silent = 0 if before.good or before.bad else self._silent + 1
        if after.bad <= after.good or before.bad > before.good:
            self._told = 0
        elif before.good > before.bad or self._silent > _SILENT:
            self._told += 1

    @property
    def evidence(self) -> tuple[Alarm, Alarm]:
        """The alarms of both, as far as they are to be believed."""
        return self.before, self.after if self.is_believed or self.before.is_raised else self.after.doubted()
