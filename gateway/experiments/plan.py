"""An experiment as a person would write it down before starting it. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

REPORTED_SECONDS: Final = 2.0  # after which what has been reported to a gateway is in the store
MEASURED_SECONDS: Final = 10.0  # the same of what it measures of calls: added up for 5 s, queued, and sent


class Kind(Enum):
    """What one unit's reports of an outcome become."""

    BINARY = "binary"  # whether any of them is 1
    NUMERIC = "numeric"  # their mean, or their sum
    DURATION = "duration"  # likewise, in seconds, never negative
    RATIO = "ratio"  # their sum, over how many they are or over the sum of another outcome's
    QUANTILE = "quantile"  # all of them, of which the arm's quantile is asked


class Better(Enum):
    """In which direction an outcome is better."""

    HIGHER = "higher"
    LOWER = "lower"


class PerUnit(Enum):
    """How several reports of one unit become its value, for numbers and durations."""

    MEAN = "mean"
    SUM = "sum"


class Missing(Enum):
    """What a unit without a report is."""

    ZERO = "zero"  # such as one that bought nothing
    EXCLUDED = "excluded"  # such as one whose latency nobody measured


@dataclass(frozen=True, slots=True)
class OutcomeSpec:
    """One thing that is measured, and how."""

    name: str
    kind: Kind
    better: Better
    quantile: float = 0.0  # in (0, 1), of that kind
    over: str = ""  # of a ratio: the outcome whose sum is below the line; "" for the number of reports
    per_unit: PerUnit = PerUnit.MEAN
    missing: Missing = Missing.EXCLUDED  # a binary outcome is always 0 without a report
    measure: str = (
        ""  # what of each call the gateway measures for it: "latency", "error", "size", …; "": it is reported
    )

    @property
    def is_of_compared(self) -> bool:
        """Is a unit's value in [0, 1], and there only if some of its answers were compared with a reference's?"""
        is_mean = self.kind is Kind.NUMERIC and self.per_unit is PerUnit.MEAN and self.missing is Missing.EXCLUDED
        return self.measure in {"agreement", "disagreement"} and (self.kind is Kind.BINARY or is_mean)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of a difference: 0.02 of the baseline's value, or 0.02 in the outcome's own unit."""

    size: float
    is_relative: bool


@dataclass(frozen=True, slots=True)
class Guardrail:
    """An outcome that may not get worse by so much, however good the primary one is."""

    outcome: OutcomeSpec
    worse_by: Amount


@dataclass(frozen=True, slots=True)
class BanditPlan:
    """How shares follow what is seen, where they are to: better arms get more of the units that come later.

    :raises ValueError: if there are not two arms, or floors leave nothing to move
    """

    arms: tuple[str, ...]
    reward: OutcomeSpec  # a mean or a proportion
    floor: float  # the least share of each arm, above 0: what is never tried is never known
    slices: int  # of the units, of equal size, an epoch each
    epoch: float  # least seconds of each

    def __post_init__(self) -> None:
        if len(set(self.arms)) != len(self.arms) or len(self.arms) < 2:
            raise ValueError("a bandit has at least two arms, each once")
        if not 0.0 < self.floor < 1.0 / len(self.arms):
            raise ValueError(f"the floor of {len(self.arms)} arms is above 0 and below {1.0 / len(self.arms):.4g}")
        if self.slices < 1 or not self.epoch > 0.0:
            raise ValueError("a bandit has at least one slice, and epochs of more than 0 seconds")

    def even(self) -> dict[str, float]:
        """The shares while nothing is known."""
        return dict.fromkeys(self.arms, 1.0 / len(self.arms))


@dataclass(frozen=True, slots=True)
class Plan:
    """One experiment."""

    name: str
    shares: Mapping[str, float]  # by arm, above 0, in any unit of measure; at least two
    baseline: str  # the arm that the others are compared with
    primary: OutcomeSpec  # the one that decides
    smallest_effect: Amount  # what is smaller is not worth knowing
    guardrails: tuple[Guardrail, ...] = ()
    secondary: tuple[OutcomeSpec, ...] = ()
    alpha: float = 0.05  # probability of ever calling a difference of the primary outcome where there is none
    sample_ratio_alpha: float = 0.01
    units: int = 10_000  # about how many are expected: where intervals are narrowest, not where they hold
    window: float | None = None  # seconds after exposure in which reports count, and after which a unit does
    unit: str = "unit"  # what is assigned to an arm, for readers
    model: str = ""  # the public model
    bandit: BanditPlan | None = None  # then `shares` are even, and those in force are of epochs (`epochs`)
    order: tuple[str, ...] = field(init=False)  # all arms, the baseline first

    def __post_init__(self) -> None:
        order = (self.baseline, *(arm for arm in self.shares if arm != self.baseline))
        object.__setattr__(self, "order", order)

    @property
    def treatments(self) -> tuple[str, ...]:
        """The arms that are compared with the baseline."""
        return self.order[1:]

    def share(self, *arms: str) -> float:
        """The part of all units that comes to these arms together, in (0, 1]."""
        return sum((self.shares[arm] for arm in arms), 0.0) / sum(self.shares.values(), 0.0)

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        """Everything that is measured, each once."""
        all_of_them = (self.primary, *(each.outcome for each in self.guardrails), *self.secondary)
        if self.bandit is not None:
            all_of_them = (*all_of_them, self.bandit.reward)
        return tuple({each.name: each for each in all_of_them}.values())

    @property
    def measured(self) -> dict[str, bool]:
        """All that is needed, by name, and whether the gateway measures it. What is below a line is reported."""
        found = {each.name: bool(each.measure) for each in self.outcomes}
        return {each.over: False for each in self.outcomes if each.over} | found
