"""Deadlines are noticed on time, and keeping them costs no memory."""

from __future__ import annotations

import pytest

from gateway.wire.deadlines import FAR, FAR_TICKS, SLACK, TICK, Deadlines


class Item:
    def __init__(self) -> None:
        self.expired = 0

    def expire(self) -> None:
        self.expired += 1


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.01, 1.0, 19.0, 21.0, 3600.0])
def test_a_deadline_is_never_early_and_at_most_a_tick_late(seconds: float) -> None:
    deadlines, item, now = Deadlines(), Item(), 1000.0
    deadlines.add(now + seconds, item, now)
    deadlines.expire(now + seconds - 1e-6)
    assert item.expired == 0
    late = TICK * (FAR_TICKS if seconds > FAR else 1)
    deadlines.expire(now + seconds + late + 1e-6)
    assert item.expired == 1
    assert len(deadlines) == 0


def test_what_was_dropped_does_not_expire() -> None:
    deadlines, kept, dropped = Deadlines(), Item(), Item()
    deadlines.add(1001.0, kept, 1000.0)
    deadlines.discard(deadlines.add(1001.0, dropped, 1000.0), dropped)
    deadlines.expire(1002.0)
    assert (kept.expired, dropped.expired) == (1, 0)
    assert deadlines.next_at() is None


def test_one_that_fails_does_not_keep_the_others_waiting() -> None:
    class Broken(Item):
        def expire(self) -> None:
            raise RuntimeError("boom")

    deadlines, items, bugs = Deadlines(), [Broken(), Item(), Broken(), Item()], list[Exception]()
    deadlines.on_bug = bugs.append
    for item in items:
        deadlines.add(1001.0, item, 1000.0)
    deadlines.expire(1002.0)
    assert [item.expired for item in items] == [0, 1, 0, 1]
    assert len(bugs) == 2


def test_only_an_earlier_deadline_moves_the_alarm() -> None:
    deadlines, alarms = Deadlines(), list[float]()
    deadlines.on_earlier = alarms.append
    for at in (1005.0, 1006.0, 1004.0, 1004.0):
        deadlines.add(at, Item(), 1000.0)
    assert [round(at) for at in alarms] == [1005, 1004]


def test_a_million_short_calls_with_long_deadlines_leave_few_sets() -> None:
    deadlines, item = Deadlines(), Item()
    for number in range(100_000):
        now = 1000.0 + number / 1000
        deadlines.discard(deadlines.add(now + 3600, item, now), item)
    assert len(deadlines._due) < 200


@pytest.mark.parametrize("at_once", [1, 50])
@pytest.mark.parametrize("first", [0.02, 5.0, 86_400.0, 99_999_000.0], ids=["ms", "seconds", "a day", "the most"])
def test_deadlines_of_ended_calls_cost_nothing_however_far_and_different_they_are(first: float, at_once: int) -> None:
    """Callers choose them: 10,000 a second, each another, each call over at once."""
    deadlines, now = Deadlines(), 1000.0
    running: list[tuple[int, Item]] = []
    for number in range(50_000):
        now += 0.0001
        item = Item()
        running.append((deadlines.add(now + first + number, item, now), item))
        if len(running) > at_once:
            deadlines.discard(*running.pop(0))
        deadlines.expire(now)
    assert len(deadlines) <= at_once + 1
    assert deadlines.size <= 2 * at_once + FAR / TICK + SLACK


def test_a_far_tick_that_was_dropped_and_comes_again_is_still_noticed() -> None:
    deadlines, dropped, kept = Deadlines(), Item(), Item()
    for _ in range(3):
        deadlines.discard(deadlines.add(5000.0, dropped, 1000.0), dropped)
    deadlines.add(5000.0, kept, 1000.0)
    at = deadlines.next_at()
    assert at is not None
    deadlines.expire(at)
    assert (kept.expired, dropped.expired) == (1, 0)
    assert deadlines.next_at() is None
