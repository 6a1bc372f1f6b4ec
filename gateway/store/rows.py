"""What is written and read, as values, and how that fails. Units and requests are hashed on their way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


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
    """Something that was reported of a unit. Of two with one report id the first counts."""

    report_id: str  # never empty
    experiment: str  # "" for all that ask for the name
    name: str
    value: float
    at: float
    unit: str = ""  # one of these two says whose it is
    request_id: str = ""


class Tallied(Protocol):
    """What the calls of one unit have come to, by places of outcomes."""

    @property
    def counts(self) -> list[int]: ...  # of the values that were added up
    @property
    def sums(self) -> list[float]: ...

    values: dict[tuple[int, float], int] | None  # calls by outcome and value, where each value counts


class MeasuredRow(NamedTuple):
    """What was measured of the calls of many units. Written twice, it counts once."""

    writer: str  # 16 hexadecimal digits that no other has
    number: int  # that the writer gives no other one
    experiment: str
    at: float
    outcomes: Sequence[str]
    tallies: Mapping[str, Tallied]  # by unit; nothing changes them any more
    records: int  # units, and values where each counts, by which it is weighed

    def first(self, records: int) -> MeasuredRow:
        """The first units of it, with so many records at most."""
        kept: dict[str, Tallied] = {}
        number = 0
        for unit, tally in self.tallies.items():
            more = 1 + len(tally.values or ())
            if number + more > records:
                break
            number += more
            kept[unit] = tally
        return self._replace(tallies=kept, records=number)


Row = ExposureRow | RequestRow | OutcomeRow | MeasuredRow


def weight(row: Row) -> int:
    """As how many records a row counts."""
    return row.records if isinstance(row, MeasuredRow) else 1


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
