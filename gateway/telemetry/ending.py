"""Telemetry: blocking work at the end of a process, which a receiver that is gone must not hold up.

Depends on nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


async def finish(work: Callable[[], object], seconds: float, what: str) -> None:
    """Do it in a thread, and wait for it no longer than this. An error is logged, and so is giving up.

    The thread is a daemon, for which the interpreter's end does not wait; one of `asyncio.to_thread` it would wait for.
    what:  for the log, as in "the last spans".
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def run() -> None:
        try:
            work()
        except Exception:  # the edge: exporters come from elsewhere
            _log.warning("%s could not be sent", what, exc_info=True)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="last-telemetry", daemon=True).start()
    try:
        await asyncio.wait_for(ended.wait(), seconds)
    except asyncio.TimeoutError:
        _log.warning("%s could not be sent within %g s and are given up", what, seconds)
