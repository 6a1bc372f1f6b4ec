"""Pure: which parts of a region are in use, and by whom. No memory, no clock.

A slot has two holders: the call that laid its tensors there, which may need them again, and the server that reads them.
Several slots may be of one part, whose tensors then go to the server in several calls. A part is free once all of its
holders have let go, and the server lets go only by its answer. If nobody can tell any more whether a server reads it,
as after a lost connection, the part stays taken for as long as there is the region.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

GRAIN: Final = 4096  # bytes that parts are rounded up to: tensors begin on pages


class Slots:
    """The parts of one region: first fit, so that the same few pages are used again while there is little to do."""

    def __init__(self, size: int) -> None:
        """size: bytes; what is beyond the last whole grain is not used."""
        self.size = size - size % GRAIN
        self.taken = 0  # bytes
        self.open = 0  # parts that somebody holds
        self.stuck = 0  # slots whose part will never be free
        self.on_stuck: Callable[[], None] | None = None
        self._free: list[tuple[int, int]] = [(0, self.size)] if self.size else []  # begin and end, in order

    def __repr__(self) -> str:
        return f"<Slots {self.open} open, {self.stuck} stuck, {self.taken} of {self.size} bytes>"

    @property
    def is_half_taken(self) -> bool:
        """Is at least half of the region in use?"""
        return 2 * self.taken >= self.size

    def maybe_take(self, size: int) -> Slot | None:
        """A slot of at least so many bytes; None if there is no room for it in one piece."""
        size += -size % GRAIN
        free = self._free
        for index in range(len(free)):
            begin, end = free[index]
            if end - begin >= size > 0:
                if end - begin == size:
                    del free[index]
                else:
                    free[index] = (begin + size, end)
                self.taken += size
                self.open += 1
                return Slot(_Part(self, begin, size))
        return None

    def give(self, begin: int, size: int) -> None:
        """Put a part back among the free ones, joined with its neighbours."""
        free = self._free
        end, index = begin + size, 0
        while index < len(free) and free[index][0] < begin:
            index += 1
        if index < len(free) and free[index][0] == end:
            end = free[index][1]
            del free[index]
        if index and free[index - 1][1] == begin:
            free[index - 1] = (free[index - 1][0], end)
        else:
            free.insert(index, (begin, end))
        self.taken -= size
        self.open -= 1


class _Part:
    """What of a region one or several slots have in common."""

    __slots__ = ("begin", "holders", "size", "slots")

    def __init__(self, slots: Slots, begin: int, size: int) -> None:
        self.slots = slots
        self.begin = begin
        self.size = size
        self.holders = 0

    def let_go(self) -> None:
        """One of its holders has let go."""
        self.holders -= 1
        if not self.holders:
            self.slots.give(self.begin, self.size)


class Slot:
    """A part of a region, from `Slots.maybe_take` until both of its holders have let go."""

    __slots__ = ("_is_kept", "_is_read", "_part", "begin", "size")

    def __init__(self, part: _Part) -> None:
        self.begin = part.begin
        self.size = part.size
        self._part = part
        self._is_kept = True
        self._is_read = False
        part.holders += 1

    def again(self) -> Slot:
        """Another one of the same part, which must be held: one that is free may be another's at any time."""
        return Slot(self._part)

    def sent(self) -> None:
        """The server may read it from now on."""
        if not self._is_read:
            self._is_read = True
            self._part.holders += 1

    def released(self, is_answered: bool) -> None:
        """The call has ended upstream. is_answered: the server has said so itself, and reads no more."""
        if not self._is_read:
            return
        if is_answered:
            self._is_read = False
            self._part.let_go()
            return
        slots = self._part.slots
        slots.stuck += 1
        if slots.on_stuck is not None:
            slots.on_stuck()

    def drop(self) -> None:
        """The call needs its tensors no more."""
        if self._is_kept:
            self._is_kept = False
            self._part.let_go()
