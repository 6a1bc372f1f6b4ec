"""I/O: the event loop of a command, from its start to the end of the process, and calls to it from other threads.

Depends on nothing of this package, so that a command that only looks after other processes, as `triton start`, has
nothing else in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

_LAST_SECONDS = 0.5  # how long threads may take to end by themselves


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run an asynchronous command on uvloop and return its exit code.

    After that the process ends within a moment. The interpreter itself would wait for every thread, even for one that
    hangs in a file system or in a connection.
    """

    async def to_its_end() -> int:
        code = await main
        last = threading.Timer(_LAST_SECONDS, _end, [code])
        last.daemon = True
        last.start()
        return code

    return uvloop.run(to_its_end())  # type: ignore[no-any-return]


def call_from_thread(loop: asyncio.AbstractEventLoop | None, callback: Callable[[], object]) -> None:
    """Have a loop call this soon; nothing happens if there is none, or if it is closed."""
    if loop is not None:
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(callback)


def _end(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or nothing reads it
            stream.flush()
    os._exit(code)
