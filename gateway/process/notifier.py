"""Values: a signal that the state of the gateway has changed, for tasks that report the state."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes all waiting tasks. They compare states themselves, so several changes may cause one wake-up."""

    def __init__(self) -> None:
        self._next: asyncio.Event = asyncio.Event()

    def notify(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next change after this call."""
        await self._next.wait()
