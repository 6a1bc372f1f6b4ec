"""I/O: an edge's socket read into one buffer that is used again and again, while bodies are laid into memory of ours.

A read of an asyncio.Protocol is a new bytes object, which the engine cuts into frames. A body that is copied to where
it belongs anyway needs neither. Interpreted: a native class can't have asyncio's class as its base.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

BUFFER: Final = 262_144  # bytes: about what a socket holds while the loop has its turn

_buffer: Final = memoryview(bytearray(BUFFER))
"""One for all connections: what is read is taken before the next read begins."""


class InPlace(asyncio.BufferedProtocol):
    """Stands for a protocol while that one wants its bytes where they are read."""

    def __init__(self, protocol: asyncio.Protocol, take: Callable[[memoryview], None]) -> None:
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self._take = take

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._take(_buffer[:nbytes])
