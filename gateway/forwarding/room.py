"""What the requests of pipelines hold in this process: their messages and tensors, from arrival to answer."""

from __future__ import annotations

from typing import Final

from gateway.errors import Overloaded

MIB = 1 << 20

_SMALL: Final = 16
_KEPT_FOR_SMALL: Final = 8
"""A request of up to 1/16 of the room is small. Small ones have 1/8 of it for themselves, whatever else is there: a
page that fills the room must not keep texts of some bytes out. source: `steps.budget`, which does so for pictures."""


class Room:
    """Counts bytes. A request gets in, and may take more, while there is room for it or no other large one is there."""

    def __init__(self, most: int | None = None) -> None:
        """most: bytes; None is no limit."""
        self.most = most
        self.held = 0  # by all requests
        self.large = 0  # by those that are not small

    def share(self) -> Share:
        """For one request, which must `leave`."""
        return Share(self)


class Share:
    """What one request holds of a room."""

    __slots__ = ("_is_large", "_room", "held")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._is_large = False
        self.held = 0

    def take(self, size: int) -> None:
        """Count what is about to be made.

        :raises Overloaded: if there is no room for it beside the others.
        """
        room = self._room
        if room.most is not None and not self._fits(room.most, self.held + size):
            raise Overloaded(
                f"the requests of pipelines hold {room.held / MIB:.0f} MiB, and this one takes {size / MIB:.1f} more; "
                f"{room.most / MIB:.0f} are there for them (half of pipelines.memory)"
            )
        self.grow(size)

    def _fits(self, most: int, total: int) -> bool:
        room = self._room
        own_large = self.held if self._is_large else 0
        if total * _SMALL <= most:
            other_small = room.held - room.large - (self.held - own_large)
            if (other_small + total) * _KEPT_FOR_SMALL <= most:
                return True
        elif room.large == own_large:
            return True
        return room.held - self.held + total <= most

    def grow(self, size: int) -> None:
        """Count what a step or a model has made."""
        room = self._room
        room.held += size
        if self._is_large:
            room.large += size
        self.held += size
        if not self._is_large and (room.most is None or self.held * _SMALL > room.most):
            self._is_large = True
            room.large += self.held

    def leave(self, size: int) -> None:
        """What was counted is given back."""
        self._room.held -= size
        self.held -= size
        if self._is_large:
            self._room.large -= size
