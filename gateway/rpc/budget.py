"""How many bytes of messages may be collected at once: on one connection, and in the whole process.

Flow control bounds what waits for whoever passes it on. It can't bound a message that must be here whole before anybody
looks at it, since its window has to be given back or the rest would never come. Such bytes are taken from a budget.
"""

from __future__ import annotations

from typing import Final

from gateway.rpc.codes import CallFailed
from gateway.status import Code

SMALL_MESSAGE: Final = 64 * 1024  # bytes; what is no larger is still collected when larger ones have used all ...
_FOR_SMALL: Final = 8  # ... for which there is an eighth more
_FOR_WAITING: Final = 2  # what can be made to wait stops at a half, and leaves the other to what can only be refused


class Budget:
    """Bytes that are held, and the most that may be. One of a connection is a part of one of the process."""

    __slots__ = ("_name", "_parent", "held", "most")

    def __init__(self, most: int, name: str, parent: Budget | None = None) -> None:
        """name: of the setting, for whoever is refused."""
        self.most = most
        self.held = 0
        self._name = name
        self._parent = parent

    def take(self, size: int, so_far: int) -> None:
        """Hold `size` bytes more of a message that has `so_far` with them.

        raises: CallFailed RESOURCE_EXHAUSTED, and nothing is held, if they don't fit.
        """
        most = self.most if so_far > SMALL_MESSAGE else self.most + self.most // _FOR_SMALL
        if self.held + size > most:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                f"Messages that are collected whole have {self.held} bytes here and {size} more are over the limit "
                f"of {most} bytes ({self._name}); send fewer at once, or without compression and with the names before "
                "the tensors",
            )
        if self._parent is not None:
            self._parent.take(size, so_far)
        self.held += size

    @property
    def has_room(self) -> bool:
        """May more be held of what need not come now? Whoever asks can make its peer wait, and does if not."""
        if self.held >= self.most // _FOR_WAITING:
            return False
        return self._parent is None or self._parent.has_room

    def hold(self, size: int) -> None:
        """Hold bytes that are here already, whether there is room or not: see `has_room`."""
        self.held += size
        if self._parent is not None:
            self._parent.hold(size)

    def give(self, size: int) -> None:
        """Hold them no longer."""
        self.held -= size
        if self._parent is not None:
            self._parent.give(size)
