"""I/O: an edge's socket read to where its bytes belong, while bodies are laid into memory of ours.

A read of an asyncio.Protocol is a new bytes object, which the engine cuts into frames. A body that has a place needs
neither: while nothing but a part of it can come next, the socket is read straight to that place. What comes between
bodies is read into one buffer that is used again and again, in small reads, since they may take the beginning of the
next body along. Interpreted: a native class can't have asyncio's class as its base.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

BUFFER: Final = 262_144  # bytes: about what a socket holds while the loop has its turn
BETWEEN: Final = 16_384  # bytes read at once between bodies; of what follows a frame's head so much is copied

_buffer: Final = memoryview(bytearray(BUFFER))
"""One for all connections: what is read is taken before the next read begins."""


class InPlace(asyncio.BufferedProtocol):
    """Stands for a protocol while that one wants its bytes where they are read."""

    def __init__(
        self,
        protocol: asyncio.Protocol,
        take: Callable[[memoryview], None],
        maybe_room: Callable[[], memoryview | None],
        filled: Callable[[int], None],
    ) -> None:
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self._take = take
        self._maybe_room = maybe_room
        self._filled = filled
        self._most = BETWEEN  # bytes of the next read into the buffer
        self._is_room = False  # is this read one straight to where its bytes belong?

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self._maybe_room()
        self._is_room = room is not None
        return _buffer[: self._most] if room is None else room

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_room:
            self._most = BETWEEN
            self._filled(nbytes)
        else:
            if nbytes == self._most:
                self._most = BUFFER  # what comes has no place
            elif nbytes < BETWEEN:
                self._most = BETWEEN
            self._take(_buffer[:nbytes])
