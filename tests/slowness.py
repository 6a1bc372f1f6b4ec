"""How slow the machine is right now: what bounds of CPU time are multiplied by.

What else runs makes the same work cost more CPU time, as it takes caches and the other half of a core, and other
machines are slower at all times. So a bound says what the work may cost beside other work of Python.
"""

from __future__ import annotations

import time
from typing import Final

from gateway.compiled import is_compiled

_USUAL: Final = 0.003  # seconds of CPU that the work below takes on the machine that the bounds were set on


def slowness() -> float:
    """How many times as much CPU time as usual Python's work takes now; 1 at least, and twice that interpreted."""
    took = []
    for _ in range(5):
        began = time.thread_time()
        made: dict[int, bytes] = {}
        for number in range(20_000):
            made[number % 1000] = b"%d" % number
        took.append(time.thread_time() - began)
    return max(1.0, sorted(took)[2] / _USUAL) * (1.0 if is_compiled() else 2.0)
