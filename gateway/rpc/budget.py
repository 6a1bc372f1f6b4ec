"""How many bytes of messages may be collected at once: on one connection, and in the whole process.

Flow control bounds the bytes that wait to be passed on. It can't bound a message that must be complete before anybody
reads it: unless its window is returned, the rest never arrives. The bytes of such messages count in a budget.
"""

from __future__ import annotations

from typing import Final

from gateway.rpc.codes import CallFailed
from gateway.status import Code

# A message up to SMALL_MESSAGE bytes may use an eighth more than the limit, so that large ones can't keep it out.
SMALL_MESSAGE: Final = 64 * 1024
_FOR_SMALL: Final = 8
_FOR_WAITING: Final = 2  # bytes whose peer can wait get half, and leave the rest to messages that can only be refused
_FOR_KEPT: Final = 4  # copies that could be done without get a quarter, beside the limit: they take nothing from others


class Budget:
    """A limit of bytes, and how many of them are in use. A connection's budget is a part of the process's."""

    __slots__ = ("_name", "_parent", "held", "is_sparing", "kept", "most")

    def __init__(self, most: int, name: str, parent: Budget | None = None) -> None:
        """name: the setting that the error text tells."""
        self.most = most
        self.held = 0
        self.kept = 0  # bytes of copies, which are not among those held
        self.is_sparing = False  # is memory so scarce that only small messages get any?
        self._name = name
        self._parent = parent

    def take(self, size: int, so_far: int) -> None:
        """Count `size` bytes more of a message of which `so_far` bytes have arrived, those included.

        raises: CallFailed RESOURCE_EXHAUSTED, having counted nothing, if they exceed the limit.
        """
        if self.is_sparing and so_far > SMALL_MESSAGE:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                f"Messages over {SMALL_MESSAGE} bytes are not collected for the moment, since the gateway's memory is "
                "nearly used up; try again later, or without compression and with the names before the tensors",
            )
        most = self.most if so_far > SMALL_MESSAGE else self.most + self.most // _FOR_SMALL
        if self.held + size > most:
            raise CallFailed(
                Code.RESOURCE_EXHAUSTED,
                f"Messages that have to be collected are over the limit of {most} bytes ({self._name}): {self.held} "
                f"are in use and {size} more are needed; send fewer at once, or without compression and with the "
                "names before the tensors",
            )
        if self._parent is not None:
            self._parent.take(size, so_far)
        self.held += size

    @property
    def has_room(self) -> bool:
        """Is there room for bytes that can wait? If not, the caller makes its peer wait."""
        if self.is_sparing or self.held >= self.most // _FOR_WAITING:
            return False
        return self._parent is None or self._parent.has_room

    def hold(self, size: int) -> None:
        """Count bytes that have arrived, even above the limit; see `has_room`."""
        self.held += size
        if self._parent is not None:
            self._parent.hold(size)

    def give(self, size: int) -> None:
        """Count `size` bytes less."""
        self.held -= size
        if self._parent is not None:
            self._parent.give(size)

    @property
    def may_keep(self) -> bool:
        """Is there room for a copy? A connection keeps no more than it leaves free for others.

        source: dynamic thresholds for shared buffers, Choudhury and Hahne 1998.
        """
        whole = self if self._parent is None else self._parent
        return not whole.is_sparing and self.kept < whole.most // _FOR_KEPT - whole.kept

    def keep(self, size: int) -> None:
        """Count bytes of a copy, or, if negative, that it has gone."""
        self.kept += size
        if self._parent is not None:
            self._parent.keep(size)
