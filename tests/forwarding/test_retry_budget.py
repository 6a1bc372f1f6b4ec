"""A fifth of the calls of the last ten seconds, and ten per second; of these no caller has more than his part."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway.forwarding.retry_budget import RetryBudget
from gateway.upstream.failures import NOBODY_KNOWN, Scopes, scopes_of

EVE, ANN, BOB = (scopes_of(name, None) for name in ("eve", "ann", "bob"))


def spend(budget: RetryBudget, now: float, scopes: Scopes = NOBODY_KNOWN) -> int:
    """Until there is none left."""
    spent = 0
    while budget.has_some(now, scopes):
        budget.take(now, scopes)
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


def test_what_is_left_is_told_of_the_caller_who_has_fewest() -> None:
    budget = RetryBudget()
    spend(budget, 1000.0, EVE)
    budget.take(1000.0, ANN)
    assert [budget.left(1000.0 + later) for later in (0.0, 9.5, 11.5)] == [0, 0, 100]
    assert spend(budget, 1011.5, EVE) == 80


def test_one_caller_leaves_a_fifth_to_others_and_the_last_one_finds_some_yet() -> None:
    budget = RetryBudget()
    assert [spend(budget, 1000.0, scopes) for scopes in (EVE, ANN, BOB)] == [80, 16, 4]
    assert spend(budget, 1000.0) == 0
    assert spend(budget, 1011.5, EVE) == 80  # what was long ago counts no more


def test_one_user_leaves_a_fifth_of_his_caller_s_part_to_the_others() -> None:
    budget = RetryBudget()
    one, two = scopes_of("proxy", "one"), scopes_of("proxy", "two")
    assert [spend(budget, 1000.0, scopes) for scopes in (one, two, ANN)] == [64, 13, 19]


def test_names_that_a_caller_makes_up_get_him_no_more_and_take_little_memory() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.began(1000.0)
    spent = 0
    for number in range(5000):
        scopes = scopes_of("eve", f"user {number}")
        if budget.has_some(1000.0, scopes):
            budget.take(1000.0, scopes)
            spent += 1
    assert spent == 0.8 * 2100
    assert len(budget._spent_by[-1]) <= 256
    assert spend(budget, 1000.0, ANN) == 0.16 * 2100


@dataclass
class Caller:
    """One who calls at random instants."""

    scopes: Scopes
    rate: float  # calls a second
    fails: Callable[[float], float]  # the share of his calls that fail and are sent again if they may be, by the time
    wanted: Counter[int] = field(default_factory=Counter)  # retries, by second
    had: Counter[int] = field(default_factory=Counter)


def simulate(callers: Sequence[Caller], seconds: float) -> int:
    """Answers how many calls were made."""
    chance, budget, now, calls = random.Random(1), RetryBudget(), 0.0, 0
    rates = [caller.rate for caller in callers]
    while (now := now + chance.expovariate(sum(rates))) < seconds:
        (caller,) = chance.choices(callers, rates)
        budget.began(now)
        calls += 1
        if chance.random() < caller.fails(now):
            caller.wanted[int(now)] += 1
            if budget.has_some(now, caller.scopes):
                budget.take(now, caller.scopes)
                caller.had[int(now)] += 1
    return calls


def always(now: float) -> float:
    return 1.0


def test_when_a_server_dies_the_calls_of_others_are_sent_again_beside_one_whose_calls_always_fail() -> None:
    def dies(now: float) -> float:
        """One of two, for two seconds until it is ejected."""
        return 0.5 if 40.0 <= now < 42.0 else 0.0

    bad = Caller(EVE, 100.0, always)
    good = [Caller(scopes_of(f"10.0.0.{number}", None), 10.0, dies) for number in range(8)]
    simulate([bad, *good], 60.0)
    assert sum(bad.had.values()) < sum(bad.wanted.values())  # he takes all that he may
    assert sum(sum(each.wanted.values()) for each in good) > 50
    assert [each.had for each in good] == [each.wanted for each in good]


def test_who_wants_more_than_there_is_gets_as_much_as_the_others_who_do_whatever_he_calls() -> None:
    rates = [200.0, 50.0, 50.0]
    callers = [Caller(scopes_of(f"10.0.0.{number}", None), rate, always) for number, rate in enumerate(rates)]
    modest = Caller(ANN, 5.0, lambda now: 0.5)
    calls = simulate([*callers, modest], 120.0)
    had = [sum(count for second, count in caller.had.items() if second >= 20) for caller in callers]
    assert max(had) < 1.2 * min(had), had
    assert modest.had == modest.wanted
    assert sum(sum(each.had.values()) for each in (*callers, modest)) <= 0.2 * calls + 10 * 120 + 100


def test_a_caller_who_is_alone_gets_four_fifths() -> None:
    alone = Caller(EVE, 200.0, always)
    calls = simulate([alone], 120.0)
    assert 0.75 < sum(alone.had.values()) / (0.2 * calls + 10 * 120) < 0.85
