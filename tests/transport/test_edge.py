"""The timer of a connection: whatever a deadline's end brings about, the next one is rung for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.transport.edge import Alarm


class Item:
    def __init__(self, expire: Callable[[], object]) -> None:
        self.expire = expire


async def test_a_deadline_that_begins_as_another_ends_is_rung_for() -> None:
    """As when an attempt's time is up and the next attempt, with a time of its own, begins in the same turn."""
    loop = asyncio.get_running_loop()
    bugs: list[object] = []
    loop.set_exception_handler(lambda loop, context: bugs.append(context))
    alarm, rung = Alarm(loop), asyncio.Event()

    def begin(item: Item) -> None:
        now = loop.time()
        alarm.deadlines.add(now + 0.01, item, now)

    begin(Item(lambda: begin(Item(rung.set))))
    try:
        await asyncio.wait_for(rung.wait(), 60)
    finally:
        alarm.stop()
    assert not bugs
