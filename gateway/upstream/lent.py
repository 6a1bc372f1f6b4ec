"""I/O: memory that is lent to whoever sends it, and comes back by itself once nobody has a part of it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable

import numpy as np


def lend(memory: memoryview, returned: Callable[[], None]) -> memoryview:
    """The same memory. The event loop calls `returned` once nobody has it or a slice of it any more.

    A memoryview does not tell when its last slice goes, but each slice keeps the object below it alive. So an array is
    put there, which a finalizer can watch.
    """
    array = np.frombuffer(memory, np.uint8)
    back = weakref.finalize(array, _call_soon, asyncio.get_running_loop(), threading.get_ident(), returned)
    back.atexit = False
    return array.data


def _call_soon(loop: asyncio.AbstractEventLoop, thread: int, returned: Callable[[], None]) -> None:
    """Never at once: this may be any moment at which Python looks for cycles, and any thread."""
    call_soon = loop.call_soon if threading.get_ident() == thread else loop.call_soon_threadsafe
    with contextlib.suppress(RuntimeError):  # the loop is closed
        call_soon(returned)
