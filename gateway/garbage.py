"""Values: Python's collector of garbage, held off while much is made that stays or goes by its reference counts.

A collection stops every thread. Its length grows with all that there is, and making a lot of objects starts several.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """May overlap with others: collections begin again when the first of them ends, or at the latest the last."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
