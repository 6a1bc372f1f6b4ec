"""The figures of docs/scaling.md that are arithmetic are what its formulas give, and what the code does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gateway.upstream.channel import MOST_WITH_TWO
from gateway.upstream.subset import part_of, place_of, ring_of

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


# A subset

SUBSET = 50
SUBSET_ROWS: dict[str, Callable[[int, int], int]] = {
    "connections of one gateway, without sequences": lambda g, t: to_each(t) * SUBSET,
    "connections at one Triton, on average": lambda g, t: to_each(t) * SUBSET * g // t,
    "connections in all, without sequences": lambda g, t: to_each(t) * SUBSET * g,
    "probe calls at one Triton per second, on average, m = 1, i = 1 s": lambda g, t: 2 * SUBSET * g // t,
}


@pytest.mark.parametrize("row", SUBSET_ROWS)
def test_the_table_of_subsets_is_what_its_formulas_give(row: str) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    cells = [int(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+)(?= \|)", line)]
    assert cells == [SUBSET_ROWS[row](*fleet) for fleet in FLEETS[2:]]


@pytest.fixture(scope="module")
def ring() -> Sequence[str]:
    return ring_of([f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8001" for n in range(10_000)])


@pytest.mark.parametrize("size", [20, 50, 100, 200])
def test_a_thousand_gateways_use_ten_thousand_endpoints_as_evenly_as_the_page_says(
    ring: Sequence[str], size: int
) -> None:
    found = []
    for name in ("gateway-{}", "gateway-{}-x"):
        used = Counter[str]()
        for gateway in range(1000):
            part = part_of(ring, size, place_of(name.format(gateway), 0, 1))
            assert len(part) == size
            used.update(part)
        found += [max(used.values()) / (1000 * size / len(ring)), 100 - 100 * len(used) / len(ring)]
    expected = f"| {size} | × {found[0]:.2f} | {found[1]:.1f} % | × {found[2]:.2f} | {found[3]:.1f} % |".replace(
        ".0 %", " %"
    )
    assert expected in PAGE
