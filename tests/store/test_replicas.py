"""Two and four gateway processes on one PostgreSQL agree, while one is paused and while the database restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Command, command, free_address
from patience import HANG
from played_triton import played
from postgres import Postgres
from test_in_gateway import KEY, ask, bought, plan, seen, tell
from traffic import http, until_readyz, write
from v2_calls import channel_to

from gateway.store import Stop
from gateway.store.database import Store

COUNTS = (2, 4) if "SOAK_SECONDS" in os.environ else (2,)


@dataclass(frozen=True, slots=True)
class Replica:
    process: Command
    listen: str
    admin: str

    async def arm(self, user: str) -> str:
        async with channel_to(self.listen) as channel:
            return await ask(channel, user)

    async def tell(self, report: str, user: str) -> bool:
        async with channel_to(self.listen) as channel:
            return await tell(channel, bought(report, unit=user))

    async def stopped_with(self) -> str | None:
        (experiment,) = (await http(self.admin, "/state"))[1]["experiments"]
        return str(experiment["stopped_with"]) if experiment["stopped_with"] else None

    async def is_away(self) -> bool:
        return (await http(self.admin, "/state"))[1]["store"]["away"] is not None


@contextlib.asynccontextmanager
async def replicas(count: int, folder: Path, url: str) -> AsyncIterator[Sequence[Replica]]:
    """Each is a process with a config of its own."""
    async with contextlib.AsyncExitStack() as entered:
        triton = await entered.enter_async_context(played())
        found = []
        for number in range(count):
            home = folder / str(number)
            home.mkdir()
            told = plan(triton.address, url)
            told["listen"], told["admin"]["listen"] = free_address(), free_address()
            file = write(home / "gateway.yaml", told)
            process = await entered.enter_async_context(command("serve", "--config", str(file), folder=home))
            found.append(Replica(process, told["listen"], told["admin"]["listen"]))
        for each in found:
            await each.process.until_serving()
            await until_readyz(each.admin, True, 60)
        yield found


async def until_all(replicas: Sequence[Replica], arm: str | None) -> None:
    """Wait until they all say so."""
    began = time.monotonic()
    while {await each.stopped_with() for each in replicas} != {arm}:
        assert time.monotonic() - began < HANG
        await asyncio.sleep(0.05)


async def until_back(replicas: Sequence[Replica]) -> None:
    began = time.monotonic()
    while any([await each.is_away() for each in replicas]):
        assert time.monotonic() - began < HANG
        await asyncio.sleep(0.1)


def stop_experiment(url: str) -> None:
    store = Store(url, KEY)
    store.stop(Stop("spring", "b", time.time()))
    store.close()


@pytest.mark.parametrize("count", COUNTS)
async def test_replicas_agree_while_one_is_paused_and_the_database_restarts(
    tmp_path: Path, postgres: Postgres, count: int
) -> None:
    postgres.empty()
    url = postgres.url
    async with replicas(count, tmp_path, url) as all_of_them:
        users = [f"user {number}" for number in range(24)]
        arms = {user: await all_of_them[0].arm(user) for user in users}
        for each in all_of_them[1:]:
            assert {user: await each.arm(user) for user in users} == arms
        for number, user in enumerate(users):  # each report twice, to two of them
            for each in (all_of_them[number % count], all_of_them[(number + 1) % count]):
                await each.tell(user, user)

        paused, *others = all_of_them
        paused.process.signal(signal.SIGSTOP)
        try:
            later = [f"later {number}" for number in range(6)]
            await asyncio.to_thread(postgres.stop)
            try:
                arms |= {user: await others[0].arm(user) for user in later}
                assert not await others[-1].tell("while away", "later 1")
            finally:
                await asyncio.to_thread(postgres.start)
            await until_back(others)
            await asyncio.to_thread(stop_experiment, url)
            await until_all(others, "b")
            assert {await each.arm("after the stop") for each in others} == {"b"}
        finally:
            paused.process.signal(signal.SIGCONT)
        await until_all([paused], "b")
        assert await paused.arm("after the stop") == "b"
        for each in all_of_them:
            each.process.signal(signal.SIGTERM)
        assert [await each.process.wait() for each in all_of_them] == [0] * count
    assert seen(url) == (Counter(arms.values()), len(users) + 1)
