"""Values: no garbage collections while many objects are made that stay, or that reference counts will free.

A collection stops every thread. Its time grows with the number of all objects, and making many objects starts several.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """No collections inside the block. If blocks overlap, they begin again when the first or a later one ends."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
