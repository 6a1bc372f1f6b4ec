"""Values: no garbage collections while many objects are made that stay, or that reference counts will free.

A collection stops every thread. Its time grows with the number of all objects, and making many objects starts several.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Holders:
    """Who needs collections to wait, in whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._collects = False  # did it before the first of them?

    def add(self) -> None:
        with self._lock:
            if not self._count:
                self._collects = gc.isenabled()
                gc.disable()
            self._count += 1

    def remove(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count and self._collects:
                gc.enable()


_HOLDERS = _Holders()


@contextmanager
def no_collections() -> Iterator[None]:
    """No collections inside the block. If blocks overlap, they begin again when the last one has ended."""
    _HOLDERS.add()
    try:
        yield
    finally:
        _HOLDERS.remove()
