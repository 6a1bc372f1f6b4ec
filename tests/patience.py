"""Waiting for what comes about by itself: for as long as only a hang takes, however busy the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

HANG: Final = 60.0
"""Seconds. What has happened by then was in time."""


async def wait_until(is_so: Callable[[], bool]) -> None:
    """Return once it is so. raises: AssertionError if it is not in time."""
    give_up = time.monotonic() + HANG
    while not is_so():
        assert time.monotonic() < give_up, "it did not come about in time"
        await asyncio.sleep(0.005)


async def ask_until(ask: Callable[[], Awaitable[T]], is_so: Callable[[T], bool]) -> T:
    """Ask until the answer is so; answers that. raises: AssertionError if none is in time."""
    give_up = time.monotonic() + HANG
    while not is_so(answer := await ask()):
        assert time.monotonic() < give_up, answer
        await asyncio.sleep(0.05)
    return answer
