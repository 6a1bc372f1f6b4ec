"""What was seen: a unit came to an arm, and later something was reported of it. Values only."""

from __future__ import annotations

from typing import NamedTuple


class Exposure(NamedTuple):
    """A unit met an arm. Once per unit is enough; of several the first counts."""

    arm: str
    unit: str  # who or what was assigned, as a keyed hash
    at: float  # seconds of Unix time
    is_forced: bool = False  # a tester chose the arm, so the unit is left out
    request_id: str = ""
    epoch: int | None = None  # of a bandit: the number of that it came in, from 0 on …
    propensity: float | None = None  # … and the probability with which it got its arm


class Outcome(NamedTuple):
    """One report about a unit. One of `unit` and `request_id` says which."""

    name: str
    value: float  # 0 or 1 if binary; seconds if it is a duration
    at: float  # seconds of Unix time; before the unit's exposure it is its past
    unit: str = ""
    request_id: str = ""
    report_id: str = ""  # two reports with one id are one report; "" if it has none
    times: int = 1  # as how many reports it counts
