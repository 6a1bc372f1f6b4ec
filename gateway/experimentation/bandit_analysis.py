"""I/O: what a bandit's arms were worth so far, as the store has it, and the shares that follow. Asked in a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import MEASURED_SECONDS, REPORTED_SECONDS, Plan


@dataclass(frozen=True, slots=True)
class RewardQuestion:
    """What shall the next units of this experiment be shared out by?"""

    url: str
    unit_key: str | None
    plan: Plan
    epochs: Epochs
    asked: float  # when, by the store's clock

    def answered(self) -> NextShares:
        """:raises StoreAway: if the store can't be used. ImportError: without SciPy."""
        from gateway.experiments.analysis.experiment import rewards  # noqa: PLC0415
        from gateway.experiments.bandit import shares  # noqa: PLC0415
        from gateway.experiments.units import join  # noqa: PLC0415
        from gateway.store.database import Store  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

        plan, bandit = self.plan, self.plan.bandit
        assert bandit is not None  # noqa: S101  (it is asked of bandits)
        store = Store(self.url, self.unit_key)
        try:
            reported = store.outcomes(plan.name, {bandit.reward.name: bool(bandit.reward.measure)})
            units = join(plan, store.exposures(plan.name), reported, self.epochs.so_far)
        finally:
            store.close()
        written = MEASURED_SECONDS if bandit.reward.measure else REPORTED_SECONDS
        seen = rewards(plan, bandit.reward, units, self.asked - written)
        known = sum(tally.units for each in seen for tally in each.values())
        return NextShares(self, shares(bandit, self.epochs.so_far, seen), known)

    def failed(self, trouble: str) -> NextShares:
        return NextShares(self, trouble=trouble)


@dataclass(frozen=True, slots=True)
class NextShares:
    """What was found."""

    question: RewardQuestion
    shares: Mapping[str, float] = field(default_factory=dict)  # by arm
    units: int = 0  # whose rewards say so
    trouble: str = ""  # why nothing was found
