"""I/O: the event loop of a command, from its start to the end of the process. Depends on nothing of this package.

So a command that only looks after other processes, as `triton start`, has nothing else in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Coroutine
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


def _end(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or nothing reads it
            stream.flush()
    os._exit(code)
