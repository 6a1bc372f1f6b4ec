"""The figures of docs/scaling.md that are arithmetic are what its formulas give, and what the code does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.upstream.channel import MOST_WITH_TWO

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
FLEETS = ((10, 20), (20, 200), (100, 1000), (1000, 10_000))  # gateways, endpoints that each of them knows


def to_each(endpoints: int) -> int:
    """Connections."""
    return 1 if endpoints > MOST_WITH_TWO else 2


ROWS: dict[str, Callable[[int, int], int]] = {
    "connections of one gateway": lambda g, t: to_each(t) * t,
    "connections at one Triton": lambda g, t: to_each(t) * g,
    "connections in all": lambda g, t: to_each(t) * g * t,
    "probe calls at one Triton per second, i = 1 s": lambda g, t: 2 * g,
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_is_what_its_formulas_give(row: str) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    cells = [int(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+)(?= \|)", line)]
    assert cells == [ROWS[row](*fleet) for fleet in FLEETS]
