"""What is written and read, as values, and how that fails. Units and requests are hashed on their way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ExposureRow(NamedTuple):
    """A unit met an arm. Told again it changes nothing, but that the earliest time counts."""

    experiment: str
    arm: str
    unit: str
    at: float  # Unix time
    is_forced: bool
    epoch: int | None = None  # of a bandit …
    propensity: float | None = None  # … and the probability with which the unit got this arm


class RequestRow(NamedTuple):
    """Whose a request was, so that outcomes may be reported by its id."""

    request_id: str
    unit: str
    at: float


class OutcomeRow(NamedTuple):
    """Something about a unit, once or several times. Of two with one report id the first counts."""

    report_id: str  # never empty
    experiment: str  # "" for all that ask for the name
    name: str
    value: float
    at: float
    unit: str = ""  # one of these two says whose it is
    request_id: str = ""
    times: int = 1
    is_own: bool = False  # is the report's id made here, of HASH hexadecimal digits? Then it is kept as it is


Row = ExposureRow | RequestRow | OutcomeRow


class StoreAway(Exception):
    """The database cannot be used now; later it may. The text names no secret."""


class StoreReadOnly(StoreAway):
    """It can be read, and not written: its user may not, or it is a standby."""


class StoreFailed(Exception):
    """What was to be written can never be."""


@dataclass(frozen=True, slots=True)
class Stop:
    """An experiment has ended, and everybody gets this arm."""

    experiment: str
    arm: str
    at: float
