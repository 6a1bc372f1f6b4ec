"""Each step begins at its threshold, and ends only well below it."""

from __future__ import annotations

import pytest

from gateway.process.ladder import FROM, REFUSED, REST, Step, step_of

LIMIT = 1000
N, SPARING, SHEDDING, RESETTING = Step


@pytest.mark.parametrize(
    ("used", "steps"),
    {
        (0, 500, 849): (N, N, N),
        (850, 919, 920, 949, 950): (SPARING, SPARING, SHEDDING, SHEDDING, RESETTING),
        (1200, 100): (RESETTING, N),
        (850, 849, 820, 819): (SPARING, SPARING, SPARING, N),
        (920, 890, 889, 919, 920): (SHEDDING, SHEDDING, SPARING, SPARING, SHEDDING),
        (950, 920, 919, 890, 889, 819): (RESETTING, RESETTING, SHEDDING, SHEDDING, SPARING, N),
    }.items(),
    ids=str,
)
def test_the_step_follows_what_is_used_and_does_not_flap(used: tuple[int, ...], steps: tuple[Step, ...]) -> None:
    step, taken = Step.NORMAL, []
    for each in used:
        step = step_of(step, each, LIMIT)
        taken.append(step)
    assert tuple(taken) == steps


def test_every_step_says_what_is_refused_and_leaves_room_for_the_next() -> None:
    assert set(REFUSED) == set(Step)
    assert list(FROM) == sorted(FROM)
    assert list(FROM.values()) == sorted(FROM.values())
    assert all(0 < start - REST < start < 1 for start in FROM.values())
