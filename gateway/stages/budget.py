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


_SMALL: Final = 16
_KEPT_FOR_SMALL: Final = 8
"""What is up to 1/16 of all is small; 1/8 of all is for small ones only. Of 512 MiB that is 32 and 64 MiB: a photo that
is decoded at a fraction of its size takes 3."""


class TooLarge(Exception):
    """More than there is in all: no waiting helps. The text is fit for the caller."""


class Budget:
    """So many bytes, taken and given back by threads.

    Large ones queue, first come first served, so that none starves; they leave an eighth of it alone. Small ones pass
    them, so that nobody's photo waits for somebody's poster. Nobody who holds some may take more, so nobody waits for
    somebody who waits.
    """

    def __init__(self, most: int | None = None) -> None:
        """most: bytes; None is no limit."""
        self.most = most
        self.held = 0
        self._waiting: deque[object] = deque()  # large ones
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
        with self._changed:
            if self.most is not None:
                self._wait(self.most, size, what, patience)
            self.held += size

    def _wait(self, most: int, size: int, what: str, patience: float) -> None:
        """Return when it can be taken. most: in all."""
        for_large = most - most // _KEPT_FOR_SMALL
        if size > for_large:
            raise TooLarge(f"{what} takes {_mib(size)}; {_mib(for_large)} are there for one (pipelines.memory)")
        if size <= most // _SMALL:
            has_room = self._changed.wait_for(lambda: self.held + size <= most, patience)
        else:
            ticket = object()
            self._waiting.append(ticket)
            try:
                has_room = self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self.held + size <= for_large, patience
                )
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        if not has_room:
            raise Overloaded(
                f"{what} takes {_mib(size)}, and others hold or wait for what there is: {_mib(self.held)} of "
                f"{_mib(most)} (pipelines.memory) are in use"
            )


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB" if size >= MIB else f"{size} bytes"


MEMORY: Final = Budget()
"""Of this process. Without a limit until somebody sets one."""
