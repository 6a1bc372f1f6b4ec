"""Conversions of heavy messages beside the event loop: one thread for the whole process.

Its work is Python's, so more threads would only take more turns from the event loop. Who sends heavy messages waits for
others that do, and nobody else waits for them.
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
    """What `act` returns or raises; done here if it is brief, else on the thread."""
    return act() if is_brief else await asyncio.get_running_loop().run_in_executor(_thread(), act)
