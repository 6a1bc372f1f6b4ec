"""stages (pure): memory that steps share. A step takes what it needs before it needs it, waits a little, or is refused.

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
"""How long a step waits for others to give memory back: several pictures of many megapixels take 0.1 to 1 s each."""


class TooLarge(Exception):
    """More than there is in all: no waiting helps. The text is fit for the caller."""


class Budget:
    """So many bytes, taken and given back by threads, first come first served: many small ones starve no large one.

    Nobody who holds some may take more, so nobody waits for somebody who waits.
    """

    def __init__(self, most: int | None = None) -> None:
        """most: bytes; None is no limit."""
        self.most = most
        self.held = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int, what: str, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Take `size` bytes for as long as the block runs.

        what:     what needs them, for the texts.
        patience: seconds to wait for them.

        :raises TooLarge: if there never can be so many.
        :raises Overloaded: if others do not give them back in time.
        """
        self._take(size, what, patience)
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()

    def _take(self, size: int, what: str, patience: float) -> None:
        ticket = object()
        with self._changed:
            most = self.most
            if most is not None and size > most:
                raise TooLarge(f"{what} takes {_mib(size)}; {_mib(most)} are there for all (pipelines.memory)")
            self._waiting.append(ticket)
            try:
                if not self._changed.wait_for(lambda: self._waiting[0] is ticket and self._has(size), patience):
                    raise Overloaded(
                        f"{what} takes {_mib(size)}, which others hold: {_mib(self.held)} of {_mib(most or 0)} "
                        "(pipelines.memory) are in use"
                    )
                self.held += size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _has(self, size: int) -> bool:
        return self.most is None or self.held + size <= self.most


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{size} bytes"


MEMORY: Final = Budget()
"""Of this process. Without a limit until somebody sets one."""
