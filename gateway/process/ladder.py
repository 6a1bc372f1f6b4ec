"""Pure: what a process does without as memory gets scarce, step by step, so that the kernel never has to end it.

The budgets (`server.max_collected_bytes`, `pipelines.memory`, windows) bound each kind of use by itself. All of them
used up at once, by many connections, are more than a small container has. docs/limits.md has the thresholds' reasons.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Step(IntEnum):
    """Each step also does what those below it do."""

    NORMAL = 0
    SPARING = 1  # nothing large is collected or kept, and no answer is remembered
    SHEDDING = 2  # no new connections, and no new calls of the batch class
    RESETTING = 3  # the connection that holds the most is closed, one after the other


FROM: Final = {Step.SPARING: 0.85, Step.SHEDDING: 0.92, Step.RESETTING: 0.95}  # of the limit
REST: Final = 0.03  # of the limit: a step that was reached is left so far below its threshold, so that it does not flap

REFUSED: Final = {
    Step.NORMAL: "nothing is refused on account of it",
    Step.SPARING: "messages over 64 KiB that must be here whole are refused, and nothing is kept for later",
    Step.SHEDDING: "also new connections, and calls of the batch class, are refused",
    Step.RESETTING: "also connections are closed, the one that holds the most first",
}


def step_of(before: Step, used: int, limit: int) -> Step:
    """The step at `used` of `limit` bytes, after the step `before`."""
    share = used / limit
    reached = [step for step, start in FROM.items() if share >= (start - REST if step <= before else start)]
    return max(reached, default=Step.NORMAL)
