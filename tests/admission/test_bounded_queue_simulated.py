"""A gate before a Triton whose queue is bounded, which begins only when it is asked at the right moment."""

from __future__ import annotations

import pytest
from simulation import Ledger, Sleeper, World

CAPACITY = 50.0  # answers per second
SECONDS = 40.0
SMALL = [f"small {n}" for n in range(9)]


def world(*, is_known: bool = True, free_after: float = 0.0002, seed: int = 1) -> World:
    """One instance, 20 ms, at most 8 in its queue. free_after: its mean, in seconds."""
    made = World(
        lambda clock, chance: Sleeper(clock, lambda: 0.02, lambda: chance.expovariate(1 / free_after), 8),
        is_gated=False,
        seed=seed,
    )
    if is_known:
        made.know(1, 9)
    return made


def run(load: float, **kinds: float) -> Ledger:
    made = world(**kinds)
    made.calls("caller", load * CAPACITY, SECONDS)
    made.run(SECONDS + 10)
    return made.ledgers["caller"]


def test_alone_it_answers_two_calls_a_second_at_five_times_the_load() -> None:
    """As it was measured: else this is no picture of it."""
    made = world(is_known=False)
    made.calls("caller", 5 * CAPACITY, SECONDS)
    made.run(SECONDS + 10)
    assert made.ledgers["caller"].goodput(5, SECONDS) < 0.1 * CAPACITY


@pytest.mark.parametrize("load", [2, 5, 10])
@pytest.mark.parametrize(
    ("free_after", "least"), [(0.0002, 0.88), (0.0005, 0.78)], ids=["idle machine", "busy machine"]
)
def test_it_does_nearly_what_it_can_under_any_load_and_refuses_nobody(
    load: float, free_after: float, least: float
) -> None:
    """Of the rest a part is the breath between two calls, and one half second in some hundred calls that it sleeps."""
    ledger, full = run(load, free_after=free_after), run(1, free_after=free_after)
    assert ledger.goodput(2, SECONDS) >= least * CAPACITY
    assert ledger.by_server == 0
    assert ledger.quantile(0.95, 2) <= 2 * full.quantile(0.95, 2)
    assert all(seconds == 0.0 for seconds in ledger.refused)


@pytest.mark.parametrize("kept", [4, 8])
def test_to_keep_calls_in_its_queue_is_worse_while_the_overload_lasts_and_after_it(kept: int) -> None:
    """Each of them needs another one after it at the right moment; and what is there stays there."""

    def overloaded(in_flight: int) -> tuple[float, float]:
        made = world()
        made.know(in_flight, 9)
        made.calls("overload", 5 * CAPACITY, 20)
        made.run(25)
        made.calls("after", CAPACITY / 2, 45)
        made.run(55)
        return made.ledgers["overload"].goodput(2, 20), made.ledgers["after"].quantile(0.5)

    (goodput, after), (empty_goodput, empty_after) = overloaded(kept), overloaded(1)
    assert goodput < 0.9 * empty_goodput
    assert after > 4 * empty_after


def test_half_the_load_is_never_refused() -> None:
    ledger = run(0.5)
    assert (ledger.refused, ledger.by_server) == ([], 0)
    assert ledger.quantile(0.5) < 0.03


def test_all_is_as_before_within_five_seconds_of_the_end_of_an_overload() -> None:
    made = world()
    made.calls("overload", 5 * CAPACITY, 20)
    made.run(25)
    made.calls("after", CAPACITY / 2, 60)
    made.run(70)
    after = made.ledgers["after"]
    assert after.refused == []
    assert after.quantile(0.99) <= 1.5 * run(0.5).quantile(0.99)


def test_a_caller_at_ten_times_the_capacity_does_no_harm_to_nine_small_ones() -> None:
    """Each of the nine sends a hundredth of what can be answered."""
    ledgers = []
    for flood in (False, True):
        made = world()
        for name in SMALL:
            made.calls(name, 0.01 * CAPACITY, 400)
        if flood:
            made.calls("flood", 10 * CAPACITY, 400)
        else:
            made.calls("other", 0.5 * CAPACITY, 400)
        made.run(410)
        ledgers.append([made.ledgers[name] for name in SMALL])
    alone, beside = ledgers
    sent, answered = sum(x.sent for x in beside), sum(len(x.answered) for x in beside)
    assert answered >= 0.999 * sent
    assert max(x.quantile(0.99) for x in beside) <= 2 * max(x.quantile(0.99) for x in alone)
