"""Pure: for how long calls keep away from an endpoint that failed them, and what lets them back.

For some seconds, longer each time. Then single calls, some way apart, go there for a trial: some that go well end it,
failures begin it anew. Instants are seconds on one clock, and arguments.
"""

from __future__ import annotations

import math
from typing import Final

from gateway.upstream.failures import Scopes

FIRST_SECONDS: Final = 5.0  # out for so long, and twice as long each time
MOST_SECONDS: Final = 300.0
MOST_SHARED_SECONDS: Final = 20.0  # the same where it is for several: those whose calls would go well wait no longer
FORGIVEN_SECONDS: Final = 60.0  # each such time without an ejection takes one of the doublings back
FORGOTTEN_SECONDS: Final = 600.0  # without a call for a trial
TRIAL_GAP: Final = 0.2  # seconds between two calls to an endpoint on trial
TRIAL_CALLS: Final = 3  # that must go well


class Ejection:
    """Of one model on one endpoint, for the calls of one scope."""

    __slots__ = (
        "_began", "_gap", "_known_until", "_out_until", "_seconds", "failed", "is_on_trial", "run", "well", "whose",
    )  # fmt: skip

    def __init__(self, whose: Scopes) -> None:
        self.whose = whose
        self.is_on_trial = False
        self.well = self.failed = 0  # calls of the trial
        self.run = 0  # of these, failures since the last success
        self._out_until = 0.0  # on trial: until when the next call must wait
        self._began = 0.0
        self._seconds = 0.0  # of the last time, less what was forgiven since
        self._gap = TRIAL_GAP
        self._known_until = 0.0  # on trial: the same for calls of those who are known to fail

    def begin(self, now: float, most: float) -> float:
        """Leave the endpoint alone. Answers for how many seconds, of which there are at most so many."""
        before = self._seconds / math.pow(2.0, min(max(self._forgiven(now), 0.0), 64.0))
        self._seconds = seconds = min(max(2.0 * before, FIRST_SECONDS), most)
        self._began = now
        self._out_until = now + seconds
        self._gap = TRIAL_GAP
        self.is_on_trial = False
        self.well = self.failed = self.run = 0
        return seconds

    def _forgiven(self, now: float) -> float:
        """Doublings."""
        return (now - self._began - self._seconds) / FORGIVEN_SECONDS

    def pardon(self, now: float) -> None:
        """Have it tried soon."""
        if not self.is_on_trial:
            self._out_until = min(self._out_until, now)

    def must_wait(self, now: float, *, is_known: bool = False) -> bool:
        """Is the next call not for here? is_known: its caller is known to fail here."""
        return now < self._out_until or (is_known and now < self._known_until)

    def is_out(self, now: float) -> bool:
        """Is the endpoint left alone, and not even on trial?"""
        return not self.is_on_trial and now < self._out_until

    def try_once(self, now: float) -> None:
        """The next call goes there for a trial. Those after it have to wait then."""
        self.is_on_trial = True
        self._out_until = now + TRIAL_GAP

    def went_well(self) -> bool:
        """A call of the trial. True: it was enough."""
        self.well += 1
        self.run = 0
        self._gap = TRIAL_GAP
        return self.well >= TRIAL_CALLS

    def went_wrong(self) -> None:
        self.failed += 1
        self.run += 1

    def was_hindered(self, now: float) -> None:
        """A call of its trial has failed whose caller is known to fail. That says little, so others may try on; but
        the next one who is known to waits longer each time, or all of them would fail one after the other."""
        self._gap = min(2.0 * self._gap, MOST_SHARED_SECONDS)
        self._known_until = now + self._gap

    def seconds_left(self, now: float) -> float:
        return max(self._out_until - now, 0.0)

    def is_forgotten(self, now: float) -> bool:
        """Has nobody of its scope called for so long that it is worth no memory?"""
        return now - self._out_until >= FORGOTTEN_SECONDS
