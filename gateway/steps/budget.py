"""steps (pure): a budget of memory that steps share. A step reserves memory before it uses it, and may wait a little.

There is one budget in a process, as there is one memory: `MEMORY`. Whoever runs the process says how much it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gateway.errors import Overloaded

MIB: Final = 1 << 20

PATIENCE_SECONDS: Final = 2.0
"""How long a step waits for memory: others hold it for 0.1 to 1 s per picture of many megapixels."""


_SMALL: Final = 16
_KEPT_FOR_SMALL: Final = 8
"""A request of up to 1/16 of the budget is small, and only small ones get the last 1/8. Of 512 MiB that is 32 and 64
MiB; a photo that is decoded at a fraction of its size takes 3."""


class TooLarge(Exception):
    """The request exceeds the whole budget, so waiting would not help. The text may be shown to the caller."""


class Budget:
    """A number of bytes that threads reserve and give back.

    Large requests queue, first come first served, so that none starves, and they leave an eighth of the budget free.
    Small ones overtake them, so that no photo waits for a poster. A thread that holds memory may not reserve more, so
    there is no deadlock.
    """

    def __init__(self, most: int | None = None) -> None:
        """most: bytes; None is no limit."""
        self.most = most
        self.spare: int | None = None  # bytes that all that is held may grow to at the moment; None: as `most` says
        self.held = 0
        self._waiting: deque[object] = deque()  # large requests that wait, first come first
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int, what: str, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Reserve `size` bytes for as long as the block runs.

        what:     what needs the memory, for error texts.
        patience: seconds to wait.

        :raises TooLarge: if `size` exceeds the whole budget.
        :raises Overloaded: if other threads do not give enough back in time.
        """
        self._take(size, what, patience)
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()

    def _take(self, size: int, what: str, patience: float) -> None:
        with self._changed:
            if self.most is not None:
                self._wait(self.most, size, what, patience)
            self.held += size

    def _wait(self, most: int, size: int, what: str, patience: float) -> None:
        """Wait until a small or large request fits. most: the limit for this request."""
        for_large = most - most // _KEPT_FOR_SMALL
        if size > for_large:
            raise TooLarge(f"{what} takes {_mib(size)}; at most {_mib(for_large)} are allowed (pipelines.memory)")
        if size <= most // _SMALL:
            has_room = self._changed.wait_for(lambda: self._fits(size, most), patience)
        else:
            ticket = object()
            self._waiting.append(ticket)
            try:
                has_room = self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self._fits(size, for_large), patience
                )
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        if not has_room:
            raise Overloaded(
                f"{what} takes {_mib(size)}, and others hold or wait for what there is: {_mib(self.held)} of "
                f"{_mib(most)} (pipelines.memory) are in use"
            )

    def _fits(self, size: int, most: int) -> bool:
        limit = most if self.spare is None else min(most, self.spare)
        return self.held + size <= limit


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{size} bytes"


MEMORY: Final = Budget()
"""The budget of this process; it has no limit until one is set."""
