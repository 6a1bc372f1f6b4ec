"""A change wakes everybody who waits for one, and nobody who comes later."""

from __future__ import annotations

import asyncio

from gateway.process.notifier import Changes


async def test_a_change_wakes_all_who_wait_and_not_who_comes_later() -> None:
    changes = Changes()
    changes.notify()  # nobody waits yet
    early = [asyncio.ensure_future(changes.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(waiter.done() for waiter in early)
    changes.notify()
    late = asyncio.ensure_future(changes.wait())
    await asyncio.wait_for(asyncio.gather(*early), 60)
    assert not late.done()
    changes.notify()
    await asyncio.wait_for(late, 60)
