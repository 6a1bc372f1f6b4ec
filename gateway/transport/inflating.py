"""Inflating beside the event loop: one thread for the whole process inflates a slice of one message, then of the next.

A message of any size blocks the loop no longer than a small one. All compressed requests together cost one core at
most, and a small message waits for one slice of each larger one. zlib releases the interpreter's lock while it works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

from gateway.rpc.codes import CallFailed
from gateway.rpc.framing import Inflater

SLICE: Final = 1 << 20  # bytes made in one step: some milliseconds


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "inflating")


def inflate_elsewhere(inflater: Inflater, stepped: Callable[[CallFailed | None], None]) -> None:
    """Do a step of an inflater on the thread. See `rpc.connection.Elsewhere`."""
    step = asyncio.get_running_loop().run_in_executor(_thread(), _step, inflater)
    step.add_done_callback(lambda done: None if done.cancelled() else stepped(done.result()))


def _step(inflater: Inflater) -> CallFailed | None:
    try:
        inflater.step(SLICE)
    except CallFailed as failure:
        return failure
    return None
