"""Pure: whether a variant gets its calls or its fallback does, while it is unavailable and until it has proved itself.

A server that has just come back is cold, and may go again. So its variant gets a tenth of its calls until some have
gone well, then more and more. It gets most of them no sooner than half a minute after they were taken from it, so that
callers see at most two changes between the variants in half a minute, however often a server comes and goes.

What trips it are the servers' state and ejection (`upstream.outlier`): nothing of the variant can take a call. Instants
are seconds on one clock, and arguments.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

PROBE_SHARE: Final = 0.1  # of the calls
PROBE_CALLS: Final = 3  # that must go well first; as many as let an ejected endpoint in
RAMP_SECONDS: Final = 10.0  # from the first probe to all calls, if it was away for long
CALM_SECONDS: Final = 30.0  # between losing most calls and having most of them again
_MOST_BEFORE: Final = 0.5


class BreakerState(Enum):
    """Of one variant."""

    ADMITTING = "admitting"  # it gets its calls
    TRIPPED = "tripped"  # it gets none, since nothing of it can take one
    PROBING = "probing"  # it is back, and gets more and more


class Breaker:
    """Of one variant of one public model that has a fallback."""

    __slots__ = ("_lost_at", "_probing_since", "_well", "state")

    def __init__(self) -> None:
        self.state = BreakerState.ADMITTING
        self._lost_at = 0.0  # when most of its calls were taken from it
        self._probing_since = 0.0
        self._well = 0  # calls that went well since then

    def trip(self, now: float) -> None:
        """Nothing of the variant can take a call."""
        if self.state is BreakerState.ADMITTING or (
            self.state is BreakerState.PROBING and self.share(now) > _MOST_BEFORE
        ):
            self._lost_at = now
        self.state = BreakerState.TRIPPED

    def admits(self, now: float, draw: float, is_open: bool) -> bool:
        """Should the variant get this call? draw: within [0, 1). is_open: could anything of it take one?"""
        if not is_open:
            self.trip(now)
            return False
        if self.state is BreakerState.TRIPPED:
            self.state = BreakerState.PROBING
            self._probing_since = now
            self._well = 0
        share = self.share(now)
        if share >= 1.0:
            self.state = BreakerState.ADMITTING
        return draw < share

    def share(self, now: float) -> float:
        """Of its calls that it gets."""
        if self.state is not BreakerState.PROBING:
            return 1.0 if self.state is BreakerState.ADMITTING else 0.0
        if self._well < PROBE_CALLS:
            return PROBE_SHARE
        share = PROBE_SHARE + (1.0 - PROBE_SHARE) * (now - self._probing_since) / RAMP_SECONDS
        return min(share, 1.0 if now - self._lost_at >= CALM_SECONDS else _MOST_BEFORE)

    @property
    def is_untried(self) -> bool:
        """Is the variant back, and it is not known yet whether calls go well?"""
        return self.state is BreakerState.PROBING and self._well < PROBE_CALLS

    def succeeded(self) -> None:
        """The variant has answered a call."""
        if self.state is BreakerState.PROBING:
            self._well += 1
