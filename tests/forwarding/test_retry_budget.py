"""A fifth of the calls of the last ten seconds, and ten per second."""

from __future__ import annotations

from gateway.forwarding.retry_budget import RetryBudget


def spend(budget: RetryBudget, now: float) -> int:
    """Until there is none left."""
    spent = 0
    while budget.has_some(now):
        budget.take(now)
        spent += 1
    return spent


def test_without_calls_there_are_ten_for_each_of_ten_seconds() -> None:
    budget = RetryBudget()
    assert spend(budget, 1000.0) == 100
    assert spend(budget, 1005.0) == 0
    assert spend(budget, 1011.5) == 100


def test_each_fifth_call_gives_one() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.began(5.0)
    assert spend(budget, 5.0) == 300


def test_calls_of_long_ago_give_none() -> None:
    budget = RetryBudget()
    for _ in range(100_000):
        budget.began(5.0)
    assert spend(budget, 8.0) == 20_100
    assert spend(budget, 3600.0) == 100


def test_in_an_outage_of_a_minute_retries_stay_below_a_fifth_and_ten_per_second() -> None:
    budget, retries, calls = RetryBudget(), 0, 0
    for tick in range(60 * 200):
        now = tick / 200
        budget.began(now)
        calls += 1
        if budget.has_some(now):
            budget.take(now)
            retries += 1
    assert retries <= 0.2 * calls + 10 * 60 + 100
    assert retries > 0.2 * calls


def test_what_is_left_is_told_to_people_and_changes_nothing() -> None:
    """As the budget itself says, at any time after it was used last."""
    for later in (0.0, 0.4, 1.2, 3.7, 9.9, 10.3, 500.0):
        budget = RetryBudget()
        for second in range(12):
            budget.began(100.0 + second)
            for _ in range(second):
                budget.take(100.0 + second)
        now = 111.0 + later
        assert budget.left(now) == budget.left(now) == int(budget.balance(now)), later
