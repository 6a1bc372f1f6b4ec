"""routing (pure): how a public model's callers are split over its variants, and what identifies a caller."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from math import isfinite

from gateway.routing.match import Key
from gateway.types import Facts


@dataclass(frozen=True, slots=True)
class Split:
    """Weights of variants, by name. Only proportions count. Weight 0 keeps a variant for rules and the fallback.

    :raises ValueError: if a weight is negative or not finite, a name occurs twice, or all weights are 0.
    """

    weights: tuple[tuple[str, float], ...]
    shares: dict[str, float] = field(init=False, repr=False, compare=False)  # of variants with a share; the sum is 1
    _names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _borders: tuple[float, ...] = field(init=False, repr=False, compare=False)  # where each share but the first begins

    def __post_init__(self) -> None:
        names = [name for name, _ in self.weights]
        if len(set(names)) != len(names):
            raise ValueError("a split names a variant twice")
        if any(not isfinite(weight) or weight < 0 for _, weight in self.weights):
            raise ValueError("a weight must be a finite number of at least 0")
        total = sum([weight for _, weight in self.weights], 0.0)
        if not isfinite(total) or total <= 0:
            raise ValueError("a split needs a weight above 0")
        # A weight that rounds to nothing beside the others (1e-320 and 1e10) gets no share: nothing may divide by it.
        shares = {name: weight / total for name, weight in self.weights if weight / total > 1e-12}
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "_names", tuple(shares))
        object.__setattr__(self, "_borders", tuple(accumulate(shares.values()))[:-1])

    @classmethod
    def all_to(cls, name: str) -> Split:
        return cls(((name, 1.0),))

    def draw(self, number: float) -> str:
        """The variant whose share contains `number`, which is uniform in [0, 1)."""
        return self._names[bisect_right(self._borders, number)]

    def maybe_among(self, names: Collection[str]) -> Split | None:
        """The same proportions over these variants alone; None if none of them has a share."""
        left = tuple((name, weight) for name, weight in self.weights if name in names)
        return Split(left) if any(name in self.shares for name, _ in left) else None


@dataclass(frozen=True, slots=True)
class Sticky:
    """What identifies a caller: the first of `keys` for which the request has a value that is not empty.

    An empty value does not count, or all callers without a user id would be one user.
    """

    keys: tuple[Key, ...]
    salt: str  # one per split; with equal salts, a caller would fall into the same share of two routes

    def maybe_read(self, facts: Facts) -> str | None:
        for key in self.keys:
            value = key.maybe_read(facts)
            if value:
                return value
        return None
