"""Two and four gateways in processes of their own follow one rollout in one PostgreSQL, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from played_triton import fails_at_once, played
from postgres import Postgres
from replicas import Replica, replicas
from test_rollouts_in_gateway import plan, post
from traffic import OK, Traffic, http, traffic, write
from v2_calls import infer

from gateway.cli import main

COUNTS = (2, 4) if "SOAK_SECONDS" in os.environ else (2,)
LOOKS = 20.0 if COUNTS == (2,) else 60.0  # seconds in which processes that share two cores are waited for


@contextlib.asynccontextmanager
async def following(folder: Path, told: dict[str, Any], workers: Sequence[int]) -> AsyncIterator[list[Replica]]:
    """Replicas whose workers know the rollout, each with so many of them."""
    async with replicas(folder, told, workers) as found:
        await until_all(found, bool)
        yield found


async def rollout_at(replica: Replica) -> dict[str, Any]:
    found = (await http(replica.admin, "/state"))[1]["rollouts"]
    return dict(found[0]) if found else {}  # before the workers are up


async def until_all(found: list[Replica], holds: Callable[[dict[str, Any]], bool], within: float = LOOKS) -> float:
    """Wait until it holds for all of them; answers for how many seconds."""
    began = time.monotonic()
    while not all(map(holds, seen := [await rollout_at(each) for each in found])):
        assert time.monotonic() - began < within, (seen, [each.process.errors[-2000:] for each in found])
        await asyncio.sleep(0.05)
    return time.monotonic() - began


def at(share: float, state: str) -> Callable[[dict[str, Any]], bool]:
    return lambda rollout: (rollout["share"], rollout["state"]) == (share, state)


@contextlib.asynccontextmanager
async def load(found: list[Replica]) -> AsyncIterator[list[Traffic]]:
    metadata = lambda number: [("x-user", f"user {number % 400}")]  # noqa: E731
    async with contextlib.AsyncExitStack() as exits:
        yield [
            await exits.enter_async_context(
                traffic(each.listen, infer("net"), metadata=metadata, callers=2, pause=0.01, timeout=60)
            )
            for each in found
        ]


async def deciding(found: list[Replica]) -> list[Replica]:
    return [each for each in found if (await rollout_at(each))["decides"]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", COUNTS)
async def test_replicas_agree_while_the_database_restarts_and_people_move_the_rollout(
    tmp_path: Path, postgres: Postgres, count: int
) -> None:
    postgres.empty()
    async with played() as old, played() as new:
        steps = [{"share": share, "soak": "1h"} for share in ("25%", "50%")]
        told = plan(old.address, new.address, postgres.url, steps=steps)
        file = write(tmp_path / "gateway.yaml", told)

        async def do(*words: str) -> None:
            assert await asyncio.to_thread(main, ["rollout", *words, "spring", "--config", str(file)]) == 0

        workers = (2, *[1] * (count - 1))
        async with following(tmp_path, told, workers) as found, load(found) as calls:
            await until_all(found, at(0.25, "running"))
            assert len(await deciding(found)) == 1
            assert (await post(found[0].admin, "/rollouts/spring/pause"))[0] == 200  # which a worker does
            await until_all(found, at(0.25, "paused"))
            assert (await post(found[0].admin, "/rollouts/none/pause"))[0] == 404
            await do("resume")
            await until_all(found, at(0.25, "running"))
            await asyncio.to_thread(postgres.stop)
            try:
                await until_all(found, lambda rollout: "store is away" in rollout["trouble"])
                await until_all(found, at(0.25, "running"))
                assert await deciding(found) == []
            finally:
                await asyncio.to_thread(postgres.start)
            await until_all(found, lambda rollout: not rollout["trouble"])
            await do("promote")
            took = await until_all(found, at(0.5, "running"))
            print(f"in force on all after {took:.2f} s")
            assert took < 10  # it is two seconds where the machine has time
            for each in calls:
                await each.more(50)
            since = time.monotonic()
            for each in calls:
                await each.more(100)
            shares = [each.variants(since) for each in calls]
            assert all(each["new"] > 0 and each["old"] > 0 for each in shares), shares
            assert [each.why() for each in calls if each.failed] == []
        async with following(tmp_path, told, (1,)) as found:  # after a restart of everything
            await until_all(found, at(0.5, "running"))
            await do("abort")
            await until_all(found, at(0.0, "rolled back"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", COUNTS)
async def test_a_leader_that_was_stopped_is_replaced_and_cannot_undo_what_was_decided_meanwhile(
    tmp_path: Path, postgres: Postgres, count: int
) -> None:
    """When it goes on it finds its step's time over, and nothing bad in what it has seen."""
    postgres.empty()
    async with played() as old, played() as new:
        steps = [{"share": share, "soak": f"{6 * count - 8}s", "units": 0} for share in ("40%", "60%")]
        told = plan(old.address, new.address, postgres.url, steps=steps)
        async with following(tmp_path, told, [1] * count) as found, load(found) as calls:
            await until_all(found, lambda rollout: rollout["state"] == "running")
            (leader,) = await deciding(found)
            others = [each for each in found if each is not leader]
            elsewhere = [calls[found.index(each)] for each in others]
            leader.process.signal(signal.SIGSTOP)
            try:
                new.behaviour = fails_at_once
                await until_all(others, at(0.0, "rolled back"), 1.5 * LOOKS)
                decided = time.monotonic()
            finally:
                leader.process.signal(signal.SIGCONT)
            await until_all(found, at(0.0, "rolled back"))
            await asyncio.sleep(2.5)
            await until_all(found, at(0.0, "rolled back"))
            for each in calls:
                assert {one.code for one in await each.more(30)} == {OK}
            assert {one.code for each in elsewhere for one in each.since(decided + 0.5)} == {OK}
            assert {one.code for each in elsewhere for one in each.failed} == {grpc.StatusCode.INTERNAL}
        history = (await asyncio.to_thread(_history, postgres.url))[-1]
        assert history.phase.value == "rolled back"


def _history(url: str) -> list[Any]:
    from gateway.store.rollouts import RolloutStore  # noqa: PLC0415

    store = RolloutStore(url)
    try:
        return [each.state for each in store.history("spring")]
    finally:
        store.close()
