"""Telemetry: blocking work at the end of a process, for as long as it may take and no longer.

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
    """Do `work` in a thread, and wait at most `seconds` for it. An error is logged, and so is giving up.

    The thread is a daemon: the interpreter's end would wait for one of `asyncio.to_thread`.
    what:  names the work in the log, as in "the last spans".
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def run() -> None:
        try:
            work()
        except Exception:  # exporters are other people's code, and may raise anything
            _log.warning("%s could not be sent", what, exc_info=True)
        with contextlib.suppress(RuntimeError):  # a closed loop has nobody waiting
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="last-telemetry", daemon=True).start()
    try:
        await asyncio.wait_for(ended.wait(), seconds)
    except asyncio.TimeoutError:
        _log.warning("%s could not be sent within %g s and are given up", what, seconds)
