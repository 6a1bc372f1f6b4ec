"""A table that peers fill never grows beyond its bound, and never loses all that is in it."""

from __future__ import annotations

import pytest

from gateway.bounded import make_room


@pytest.mark.parametrize("most", [1, 2, 7, 16, 1024])
def test_a_full_table_loses_its_oldest_entries_and_not_all(most: int) -> None:
    table: dict[int, int] = {}
    for number in range(10 * most):
        make_room(table, most)
        table[number] = number
        assert len(table) <= most
        assert list(table) == list(range(number + 1 - len(table), number + 1))
        assert len(table) >= min(number + 1, most - most // 8)


def test_a_table_with_room_is_left_alone() -> None:
    table = dict.fromkeys(range(15))
    make_room(table, 16)
    assert len(table) == 15
