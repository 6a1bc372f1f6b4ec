"""When a worker says that it is ready."""

from __future__ import annotations

import asyncio

from gateway.process.notifier import Changes
from gateway.readiness import Readiness


async def test_a_worker_is_ready_from_its_start_to_its_drain_while_something_can_be_served() -> None:
    problems, changes = ["no endpoint is up"], Changes()
    readiness = Readiness(lambda: problems, changes)
    assert readiness.reasons() == ["starting"]
    for step, reasons in ((readiness.started, problems), (readiness.draining, ["draining"])):
        told = asyncio.ensure_future(changes.wait())
        await asyncio.sleep(0)
        step()
        await asyncio.wait_for(told, 60)
        assert (readiness.is_ready(), readiness.reasons()) == (False, reasons)


def test_an_endpoint_that_comes_up_makes_it_ready() -> None:
    problems = ["no endpoint is up"]
    readiness = Readiness(lambda: problems, Changes())
    readiness.started()
    assert not readiness.is_ready()
    problems.clear()
    assert readiness.is_ready()
