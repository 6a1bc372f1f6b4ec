"""routing (pure): which units of a variant another one has by now, while a rollout moves them."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.routing.arms import place_in
from gateway.routing.split import Split
from gateway.types import ROLLOUT


@dataclass(frozen=True, slots=True)
class Rolling:
    """A share of what the split gives to one variant goes to another.

    A unit's place is a hash of its key under the rollout's name. So as the share rises units only come, as it falls
    they only go, and which they are has nothing to do with the split and with other rollouts.
    """

    name: str
    before: str  # the variant that units come from
    after: str  # the one that they go to
    share: float  # of the units of `before`, in [0, 1]

    @property
    def reason(self) -> str:
        return ROLLOUT + self.name

    @property
    def is_over(self) -> bool:
        """Has the new variant taken the place of the old one?"""
        return self.share >= 1.0

    def place(self, key: str) -> float:
        """In [0, 1); the unit is moved once the share is above it."""
        return place_in(f"rollout {self.name}", key)

    def choose(self, key: str) -> str:
        return self.after if self.place(key) < self.share else self.before

    def of_split(self, split: Split) -> Split:
        """The split for calls without a key."""
        weights = dict(split.weights)
        moved = weights.get(self.before, 0.0)
        weights[self.before] = moved * (1.0 - self.share)
        weights[self.after] = weights.get(self.after, 0.0) + moved * self.share
        return Split(tuple(weights.items()))
