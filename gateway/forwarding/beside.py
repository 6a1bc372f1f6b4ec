"""I/O: conversions of heavy messages beside the event loop, on one thread for the whole process.

The work holds the interpreter's lock, so more threads would only take more time from the event loop. Callers with heavy
messages wait for each other, and no other caller waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "converting")


async def beside(is_brief: bool, act: Callable[[], _T]) -> _T:
    """Return what `act` returns, or raise what it raises. It runs here if it is brief, else on the thread."""
    return act() if is_brief else await asyncio.get_running_loop().run_in_executor(_thread(), act)
