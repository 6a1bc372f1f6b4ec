"""Inflating beside the event loop: one thread for the whole process, which takes a slice of one message after another.

So a body of any size holds the loop no longer than a small one, all that callers compress costs one core at most, and
a small message waits for one slice of each larger one. zlib lets go of the interpreter's lock while it works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

from gateway.wire.codes import CallFailed
from gateway.wire.messages import Inflater

SLICE: Final = 1 << 20  # bytes made in one go: some milliseconds


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "inflating")


def inflate_elsewhere(inflater: Inflater, stepped: Callable[[CallFailed | None], None]) -> None:
    """See `wire.connection.Elsewhere`."""
    step = asyncio.get_running_loop().run_in_executor(_thread(), _step, inflater)
    step.add_done_callback(lambda done: None if done.cancelled() else stepped(done.result()))


def _step(inflater: Inflater) -> CallFailed | None:
    try:
        inflater.step(SLICE)
    except CallFailed as failure:
        return failure
    return None
