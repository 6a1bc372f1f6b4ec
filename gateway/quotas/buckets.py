"""quotas (pure): how fast something may be used, by GCRA, alone and together with other processes.

The generic cell rate algorithm keeps one instant for a limit: when the next cell would be due if all came evenly. A
cell may come early, by a tolerance, which is the burst. So whoever waits is told exactly when to try again, and
nothing has to run while nobody calls.

Sources: ATM Forum, Traffic Management Specification 4.0, section 4.4.2 (the virtual scheduling algorithm); Brandur
Leach, "Rate limiting, cells, and GCRA" (cells of different weights; one instant per key in a store).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

_ROUNDING: Final = 1e-9  # seconds that floating-point numbers may be off
_STALE_PERIODS: Final = 2  # after so many periods without news, what is left in the store is reckoned by the clock


@mypyc_attr(allow_interpreted_subclasses=True)
class Bucket:
    """Units that may be used at a rate, and so many at once as the rate gives in `burst` seconds.

    What costs more than a full bucket has is let through when the bucket is full, and those after it wait the longer:
    else it could never come. The same holds for what is known only afterwards, and so taken without asking.
    """

    def __init__(self, rate: float, burst: float) -> None:
        """rate: units per second, above 0. burst: seconds."""
        self.rate = rate
        self.interval = 1.0 / rate
        self.tolerance = max(burst, self.interval)  # seconds; one unit can always come
        self._due = 0.0  # the theoretical arrival time

    @property
    def capacity(self) -> float:
        """Units of a full bucket."""
        return self.tolerance * self.rate

    def wait(self, units: float, now: float) -> float:
        """Seconds until so many units may be taken; 0.0: now."""
        ahead = self._due - now
        if ahead <= 0.0:
            return 0.0
        late = ahead - max(0.0, self.tolerance - units * self.interval)
        return late if late > _ROUNDING else 0.0

    def take(self, units: float, now: float) -> None:
        """Use units, whether there are so many or not."""
        self._due = max(self._due, now) + units * self.interval

    def left(self, now: float) -> float:
        """Units that may be used now; below 0 if more were used."""
        return (self.tolerance - max(0.0, self._due - now)) * self.rate

    def set_left(self, units: float, now: float) -> None:
        """Have so many units left, whatever was used."""
        self._due = now + self.tolerance - units * self.interval


@mypyc_attr(allow_interpreted_subclasses=True)
class SharedBuckets:
    """What the leases of one process have in common: how they stand to the store that all gateways share."""

    def __init__(self, share: float, period: float) -> None:
        """share: of this process in all that gateways may use together. period: seconds between two reports."""
        self.share = share
        self.period = period
        self.is_away = True  # does the store not answer? Before it has, it does not
        self.switches = 0  # times that it came back or went away, after each of which leases are counted in another way
        self.leases: dict[str, Lease] = {}  # by key in the store: those with something to report or to ask
        self.on_hungry: Callable[[], None] | None = None  # a lease is used up: report at once

    def came_back(self) -> None:
        self._switch(is_away=False)

    def went_away(self) -> None:
        self._switch(is_away=True)

    def _switch(self, *, is_away: bool) -> None:
        self.switches += self.is_away is not is_away
        self.is_away = is_away
        self.leases.clear()

    def report(self, lease: Lease) -> None:
        self.leases[lease.key] = lease

    def hungry(self, lease: Lease) -> None:
        self.leases[lease.key] = lease
        if self.on_hungry is not None:
            self.on_hungry()


@mypyc_attr(allow_interpreted_subclasses=True)
class Lease(Bucket):
    """What one process may use of a bucket in a store: its share of what was left there when it last heard.

    No call waits for the store. What was used is reported in the background, all of it, so that the store's account is
    exact; the answer says how full the bucket is, and this process's share of that is the next lease. What others
    don't use stays in the bucket and makes the next leases larger, so that one busy process among idle ones gets
    nearly all. While the store is away, the process has its share of the rate. What is left stays left when the store
    goes or comes back: one that does so again and again must not give a burst each time.
    """

    def __init__(self, key: str, rate: float, burst: float, shared: SharedBuckets) -> None:
        super().__init__(rate, burst)
        self.key = key
        self._shared = shared
        self._local = Bucket(rate * shared.share, burst)
        self._local_share = shared.share
        self.used = 0.0  # units, that the store has not heard of
        self._credit = self.capacity * shared.share  # units that may be used before it answers next
        self._ahead = 0.0  # seconds by which the store's bucket was ahead of its rate when it last answered
        self._heard_at = self._credit_at = 0.0
        self._switches = shared.switches
        self._was_away = shared.is_away

    def wait(self, units: float, now: float) -> float:
        shared = self._shared
        if self._switches != shared.switches:
            self._carry_over(now)
        if shared.is_away:
            return self._local_bucket().wait(units, now)
        need = min(units, self.capacity * shared.share)
        if self._credit + _ROUNDING >= need:
            return 0.0
        if now - self._heard_at > _STALE_PERIODS * shared.period:
            self._reckon(now)
            if self._credit + _ROUNDING >= need:
                return 0.0
        shared.hungry(self)
        return max(shared.period, (need - self._credit) / (shared.share * self.rate))

    def take(self, units: float, now: float) -> None:
        if self._switches != self._shared.switches:
            self._carry_over(now)
        if self._shared.is_away:
            self._local_bucket().take(units, now)
            return
        if now - self._credit_at > _STALE_PERIODS * self._shared.period:
            self._reckon(now)  # else what is used now would be there once more, for the time since, if the store goes
        self._credit -= units
        self.used += units
        self._shared.report(self)

    def left(self, now: float) -> float:
        """Of the lease, or of the share while the store is away."""
        return self._local_bucket().left(now) if self._shared.is_away else self._credit

    def reported(self) -> float:
        """The units to report now. The store's answer goes to `heard`."""
        used, self.used = self.used, 0.0
        return used

    def heard(self, ahead: float, now: float) -> None:
        """ahead: seconds by which the store's bucket is ahead of its rate, all that was reported included."""
        self._ahead, self._heard_at = ahead, now
        self._reckon(now)

    def _carry_over(self, now: float) -> None:
        """The store has gone or come back. What was used up in one account is used up in the other."""
        shared, was_away, full = self._shared, self._was_away, self.capacity * self._shared.share
        self._switches, self._was_away = shared.switches, shared.is_away
        if was_away and not shared.is_away:
            self.used = 0.0  # what was used while it was away came of the local share
            left = full - (self._local.capacity - self._local.left(now))
            self.heard(self.tolerance - left / (shared.share * self.rate), now)
        elif shared.is_away and not was_away:
            local = self._local_bucket()
            local.set_left(local.capacity - (full - self._credit), self._credit_at)

    def _reckon(self, now: float) -> None:
        """The lease, if nobody has used anything since the store answered."""
        ahead = max(0.0, self._ahead - (now - self._heard_at))
        self._credit, self._credit_at = self._shared.share * (self.tolerance - ahead) * self.rate - self.used, now

    def _local_bucket(self) -> Bucket:
        if self._local_share != self._shared.share:
            self._local_share = self._shared.share
            self._local = Bucket(self.rate * self._local_share, self.tolerance)
        return self._local
