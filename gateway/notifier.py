"""Values: a signal that something about the gateway's state has changed, for whoever waits to tell it on."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes all who wait. Waiters compare states themselves, so several changes may be one wake-up."""

    def __init__(self) -> None:
        self._next: asyncio.Event = asyncio.Event()

    def notify(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Return at the next change after this call."""
        await self._next.wait()
