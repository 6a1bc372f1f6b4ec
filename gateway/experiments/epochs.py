"""The epochs of a bandit: what units were shared out by, and since when. Values only.

Units are cut into slices by their hash. An epoch opens one slice, with shares that are fixed from then on, so a unit
keeps its arm for good, and whoever knows the epochs knows the arm without having seen the unit. Units of slices that
are not open yet have the baseline, and are in no data. With the last slice all are in, and nothing moves any more.
What that costs: a unit that comes late may fall into an early slice, and is shared out by what little was known then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gateway.experiments.plan import BanditPlan, Plan

WITHOUT_SHARES: Final = "no further epoch begins, and units of those to come keep the baseline"
"""What follows where no shares can be found for the next one. The first one is even, and needs none."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """A slice of the units, and what they are shared out by. Never changed."""

    shares: Mapping[str, float]  # by arm; the sum is 1
    since: float  # Unix time
    units: int = 0  # whose rewards were known when these shares were found


@dataclass(frozen=True, slots=True)
class Epochs:
    """Those of one bandit so far, and what of its plan must not change under them.

    Of two that know another number of epochs both say the same of each unit that both know to be in.
    """

    model: str
    baseline: str
    slices: int
    so_far: tuple[Epoch, ...] = ()  # the oldest first

    def is_of(self, plan: Plan) -> bool:
        """May units of this plan be assigned by them? With other arms it is another experiment."""
        arms = self.so_far[0].shares if self.so_far else {}
        is_model = plan.model in ("", self.model)  # a file with experiments alone names none
        return is_model and (self.baseline, set(arms)) == (plan.baseline, set(plan.order))

    def overdue(self, plan: BanditPlan, now: float) -> float | None:
        """For how many seconds another epoch has been due, below 0 if it is not; None if there will be none.

        Clocks that differ make an epoch longer or shorter, and nothing else.
        """
        if len(self.so_far) >= self.slices:
            return None
        return now - self.so_far[-1].since - plan.epoch if self.so_far else 0.0
