"""What is written, as values. Units and requests are as the caller gave them here, and hashed on their way out."""

from __future__ import annotations

from typing import NamedTuple


class ExposureRow(NamedTuple):
    """A unit met an arm. Told again it changes nothing, but that the earliest time counts."""

    experiment: str
    arm: str
    unit: str
    at: float  # Unix time
    is_forced: bool


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


Row = ExposureRow | RequestRow | OutcomeRow
