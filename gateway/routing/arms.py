"""routing (pure): which units take part in an experiment, and which arm each of them has.

A unit's place in a layer is a hash of its key, in [0, 1). Experiments of one layer have slices of it that do not
overlap, so that a unit is in one of them at most. The first part of a slice is the holdout, which keeps the baseline.
The others come to arms by a hash that depends on the experiment's name, and so on no other experiment.

With a bandit another hash says in which epoch a unit comes in, and each epoch has shares of its own, that never change.
A unit whose epoch has not begun keeps the baseline, and is in no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from gateway.routing.rendezvous import Rendezvous
from gateway.types import EXPERIMENT

_WHOLE: Final = 2.0**64


def place_in(layer: str, key: str) -> float:
    """Where a unit is in a layer, in [0, 1)."""
    state = blake2b(key=blake2b(layer.encode(), digest_size=32).digest(), digest_size=8)
    state.update(key.encode("utf-8", "surrogatepass"))
    return (int.from_bytes(state.digest(), "big") >> 11 << 11) / _WHOLE  # 53 bits, so that it never rounds to 1


@dataclass(frozen=True, slots=True)
class Arms:
    """One experiment on one route."""

    name: str
    shares: Mapping[str, float]  # by arm, each above 0
    baseline: str
    layer: str
    begin: float = 0.0  # its slice of the layer …
    end: float = 1.0
    holdout: float = 0.0  # … and the part of it that keeps the baseline, and is in no arm
    ended_with: str = ""  # the arm that everybody gets since it was stopped
    slices: int = 0  # of a bandit: how many epochs it has …
    epochs: tuple[Mapping[str, float], ...] = ()  # … and the shares of those that have begun, each by arm
    _wheels: tuple[Rendezvous, ...] = field(init=False, repr=False, compare=False)  # of these, or the one of the shares

    def __post_init__(self) -> None:
        shares = self.epochs if self.slices else (self.shares,)
        wheels = tuple([Rendezvous(each, f"experiment {self.name}") for each in shares])
        object.__setattr__(self, "_wheels", wheels)

    def maybe_assign(self, key: str) -> tuple[str, str] | None:
        """The reason and the variant of a unit; None if the experiment is not about it."""
        if self.begin > 0.0 or self.end < 1.0 or self.holdout > 0.0:
            place = place_in(self.layer, key)
            if not self.begin <= place < self.end:
                return None
            if self.ended_with:
                return self.ended_reason, self.ended_with
            if place < self.begin + self.holdout * (self.end - self.begin):
                return self.holdout_reason, self.baseline
        elif self.ended_with:
            return self.ended_reason, self.ended_with
        if self.slices:
            return self._of_epoch(key)
        return self.reason, self._wheels[0].choose(key)

    def _of_epoch(self, key: str) -> tuple[str, str]:
        number = self.maybe_epoch(key)
        if number is None:
            return self.waiting_reason, self.baseline
        return self.reason, self._wheels[number].choose(key)

    def maybe_epoch(self, key: str) -> int | None:
        """Of a bandit: in which epoch a unit comes in, from 0 on; None if that has not begun."""
        number = int(place_in(f"bandit {self.name}", key) * self.slices)
        return number if number < len(self.epochs) else None

    def maybe_propensity(self, key: str, arm: str) -> tuple[int, float] | None:
        """Of a bandit: a unit's epoch, and the probability with which it gets that arm there."""
        number = self.maybe_epoch(key)
        return None if number is None else (number, self.epochs[number].get(arm, 0.0))

    def hashes(self, key: str) -> Mapping[str, int]:
        """For people: by what the unit's arm is chosen. Of a bandit: of a unit whose epoch has begun."""
        number = self.maybe_epoch(key) if self.slices else None
        return self._wheels[number or 0].hashes(key)

    @property
    def reason(self) -> str:
        return EXPERIMENT + self.name

    @property
    def holdout_reason(self) -> str:
        return f"holdout:{self.name}"

    @property
    def waiting_reason(self) -> str:
        return f"waiting:{self.name}"

    @property
    def ended_reason(self) -> str:
        return f"stopped:{self.name}"

    @property
    def variants(self) -> frozenset[str]:
        """All that a unit may be assigned."""
        return frozenset((*self.shares, self.baseline, *((self.ended_with,) if self.ended_with else ())))
