"""What may be collected at once: all that is taken comes back, whoever refused; small messages have a reserve."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rpc.budget import SMALL_MESSAGE, Budget
from gateway.rpc.codes import CallFailed
from gateway.status import Code

LARGE = SMALL_MESSAGE + 1
MOST = 8 * LARGE


def test_it_fills_to_its_last_byte_and_then_refuses_with_the_setting_s_name() -> None:
    budget = Budget(MOST, "collected_bytes")
    budget.take(MOST, LARGE)
    with pytest.raises(CallFailed, match="collected_bytes") as caught:
        budget.take(1, LARGE)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert budget.held == MOST


def test_small_messages_have_an_eighth_more() -> None:
    budget = Budget(MOST, "it")
    budget.take(MOST, LARGE)
    budget.take(MOST // 8, SMALL_MESSAGE)
    with pytest.raises(CallFailed):
        budget.take(1, SMALL_MESSAGE)


def test_who_is_refused_by_the_process_holds_nothing_of_the_connection_either() -> None:
    process = Budget(MOST, "process")
    first, second = Budget(MOST, "connection", process), Budget(MOST, "connection", process)
    first.take(MOST, LARGE)
    with pytest.raises(CallFailed, match="process"):
        second.take(1, LARGE)
    assert (first.held, second.held, process.held) == (MOST, 0, MOST)


def test_what_can_wait_stops_at_half_of_the_connection_s_or_of_the_process_s() -> None:
    process = Budget(MOST, "process")
    first, second = Budget(MOST, "connection", process), Budget(MOST, "connection", process)
    first.hold(MOST // 2 - 1)
    assert first.has_room
    assert second.has_room
    first.hold(1)
    assert not first.has_room
    assert not second.has_room


def test_what_is_here_already_is_held_beyond_the_most() -> None:
    process = Budget(10, "process")
    budget = Budget(10, "connection", process)
    budget.hold(25)
    assert (budget.held, process.held) == (25, 25)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, MOST), st.integers(0, MOST))))
def test_whatever_is_taken_and_given_both_add_up(steps: list[tuple[bool, int, int]]) -> None:
    process = Budget(MOST, "process")
    budgets = Budget(MOST, "a", process), Budget(MOST // 2, "b", process)
    taken: list[tuple[Budget, int]] = []
    for of_first, size, so_far in steps:
        budget = budgets[0 if of_first else 1]
        try:
            budget.take(size, so_far)
            taken.append((budget, size))
        except CallFailed:
            if taken:
                held_by, bytes_ = taken.pop()
                held_by.give(bytes_)
        for each in budgets:
            assert each.held == sum(bytes_ for held_by, bytes_ in taken if held_by is each)
            assert each.held <= each.most + each.most // 8
        assert process.held == budgets[0].held + budgets[1].held


def test_copies_take_nothing_from_messages_and_a_connection_leaves_others_as_much_as_it_has() -> None:
    process = Budget(MOST, "process")
    one, other = (Budget(MOST // 2, "connection", process) for _ in range(2))
    while one.may_keep:
        one.keep(1)
    assert one.kept == MOST // 8  # half of the quarter that there is
    while other.may_keep:
        other.keep(1)
    assert abs(other.kept - MOST // 16) <= 1
    assert one.has_room
    one.take(MOST // 2, LARGE)
    other.take(MOST // 2, LARGE)
    one.keep(-one.kept)
    other.keep(-other.kept)
    assert process.kept == 0
