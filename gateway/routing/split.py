"""routing (pure): the shares of a public model's variants, and what a caller is recognised by."""

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
    """Weights over variants, by name. Only their proportions count; a variant with 0 is there for rules and fallback.

    :raises ValueError: if a weight is negative or not finite, a name occurs twice, or all weights are 0.
    """

    weights: tuple[tuple[str, float], ...]
    shares: dict[str, float] = field(init=False, repr=False, compare=False)  # of the variants with any, sum 1
    _names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _borders: tuple[float, ...] = field(init=False, repr=False, compare=False)  # where the second share begins, …

    def __post_init__(self) -> None:
        names = [name for name, _ in self.weights]
        if len(set(names)) != len(names):
            raise ValueError("a split names a variant twice")
        if any(not isfinite(weight) or weight < 0 for _, weight in self.weights):
            raise ValueError("a weight must be a finite number of at least 0")
        total = sum([weight for _, weight in self.weights], 0.0)
        if not isfinite(total) or total <= 0:
            raise ValueError("a split needs a weight above 0")
        # A weight that is lost in the total (1e-320 beside 1e10) has no share: nothing may divide by it.
        shares = {name: weight / total for name, weight in self.weights if weight / total > 1e-12}
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "_names", tuple(shares))
        object.__setattr__(self, "_borders", tuple(accumulate(shares.values()))[:-1])

    @classmethod
    def all_to(cls, name: str) -> Split:
        return cls(((name, 1.0),))

    def draw(self, number: float) -> str:
        """The variant in whose share `number`, uniform in [0, 1), falls."""
        return self._names[bisect_right(self._borders, number)]

    def maybe_among(self, names: Collection[str]) -> Split | None:
        """The same proportions over fewer variants; None if none of them has a share."""
        left = tuple((name, weight) for name, weight in self.weights if name in names)
        return Split(left) if any(name in self.shares for name, _ in left) else None


@dataclass(frozen=True, slots=True)
class Sticky:
    """What a caller is recognised by: the first of `keys` that the request has and that is not empty.

    An empty value is none: else everybody who has no user id would be one user.
    """

    keys: tuple[Key, ...]
    salt: str  # one per split; the same salt in two routes gives a caller the same luck in both

    def maybe_read(self, facts: Facts) -> str | None:
        for key in self.keys:
            value = key.maybe_read(facts)
            if value:
                return value
        return None
