"""What was measured of many units at once, as bytes of one row of the store. Pure. May use numpy.

A row for each unit and outcome would cost some microseconds each, which calls pay for. The bytes: a line of JSON,
`{"outcomes": [...], "units": n, "values": n}`; the units' hashes, 16 bytes each; then, for all values, the unit's place
(uint32), the outcome's place (uint16), the mean (float64) and of how many calls it is (uint32), each as one array,
little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.store.rows import Tallied

UNITS: Final = 1000  # of one block, so that a row has some 100 KB
_HASH: Final = 16  # bytes
_COLUMNS: Final = ("<u4", "<u2", "<f8", "<u4")


class Value(NamedTuple):
    """What calls of one unit had in the mean."""

    unit: str  # its hash
    outcome: str
    value: float
    calls: int


def encoded(outcomes: Sequence[str], tallies: Sequence[tuple[str, Tallied]]) -> bytes:
    """tallies: with their units' hashes, of 32 hexadecimal digits."""
    counts = np.array([each.counts for _, each in tallies], np.int64).reshape(len(tallies), len(outcomes))
    sums = np.array([each.sums for _, each in tallies], np.float64).reshape(counts.shape)
    unit, outcome = np.nonzero(counts)
    calls = counts[unit, outcome]
    columns: list[NDArray[Any]] = [unit, outcome, sums[unit, outcome] / calls, calls]
    singly = [
        (place, at, value, number)
        for place, (_, each) in enumerate(tallies)
        if each.values
        for (at, value), number in each.values.items()
    ]
    if singly:
        columns = [np.append(one, more) for one, more in zip(columns, zip(*singly, strict=True), strict=True)]
    head = {"outcomes": list(outcomes), "units": len(tallies), "values": len(columns[0])}
    arrays = [column.astype(kind).tobytes() for column, kind in zip(columns, _COLUMNS, strict=True)]
    return b"".join((json.dumps(head).encode(), b"\n", bytes.fromhex("".join(unit for unit, _ in tallies)), *arrays))


def decoded(data: bytes) -> Iterator[Value]:
    """:raises ValueError: if `encoded` has not made the bytes."""
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    outcomes, values, at = head["outcomes"], int(head["values"]), _HASH * int(head["units"])
    hashes = [rest[begin : begin + _HASH].hex() for begin in range(0, at, _HASH)]
    columns = []
    for kind in _COLUMNS:
        columns.append(np.frombuffer(rest, kind, values, at).tolist())
        at += values * np.dtype(kind).itemsize
    for unit, outcome, value, calls in zip(*columns, strict=True):
        yield Value(hashes[unit], outcomes[outcome], value, calls)
