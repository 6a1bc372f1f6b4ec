"""I/O: one worker process from its start to its drained end: event loop, signals, exit code."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import uvloop

from gateway.app import Gateway, Place
from gateway.config import Loaded

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
MIB = 1 << 20


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run an asynchronous command on uvloop and return its exit code."""
    return uvloop.run(main)  # type: ignore[no-any-return]


async def serve(loaded: Loaded, load: Callable[[], Loaded], environ: Mapping[str, str], place: Place) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends the process without waiting."""
    keep_freed_memory(environ)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopped() -> None:
        if stop.is_set():
            _log.warning("told to stop twice: ending now")
            os._exit(1)
        stop.set()

    gateway = Gateway(loaded, load, environ, place)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    async with gateway:
        await stop.wait()
        await gateway.drain()
    if gateway.left_steps_behind:  # what their libraries have begun might be joined at the interpreter's end, for ever
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


def keep_freed_memory(environ: Mapping[str, str]) -> None:
    """Have malloc keep what was freed, up to 16 MiB a thread, for the next call. glibc only; see mallopt(3).

    By default memory goes back to the kernel from 128 KiB on, so that a picture's pixels and tensor, 0.6 to 1 MB each,
    cost a page fault for every 4 KiB in every call: a fifth of its CPU. Messages from 4 MiB on go back at once.
    Whoever sets malloc's environment variables knows better.
    """
    if sys.platform != "linux" or _MALLOC_SETTINGS & environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may lack it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 16 * MIB)


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent dies, so that no worker is left behind. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)  # it died before we asked
