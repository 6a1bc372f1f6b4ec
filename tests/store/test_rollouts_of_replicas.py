"""People move a rollout at any worker of any replica, and all of them follow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from played_triton import played
from postgres import Postgres
from replicas import Replica, replicas
from test_rollouts_in_gateway import plan, post
from traffic import http, write

from gateway.cli import main

LOOKS = 60.0  # seconds in which processes that share two cores are waited for


async def rollout_at(replica: Replica) -> dict[str, Any]:
    found = (await http(replica.admin, "/state"))[1]["rollouts"]
    return dict(found[0]) if found else {}  # before the workers are up


async def until_all(found: list[Replica], share: float, state: str) -> None:
    def holds(rollout: dict[str, Any]) -> bool:
        return (rollout.get("share"), rollout.get("state")) == (share, state)

    end = asyncio.get_running_loop().time() + LOOKS
    while not all(map(holds, seen := [await rollout_at(each) for each in found])):
        assert asyncio.get_running_loop().time() < end, (seen, [each.process.errors[-2000:] for each in found])
        await asyncio.sleep(0.05)


async def test_people_move_it_by_the_admin_plane_of_several_workers_and_by_command(
    tmp_path: Path, postgres: Postgres
) -> None:
    postgres.empty()
    async with played() as old, played() as new:
        steps = [{"share": share, "soak": "1h"} for share in ("25%", "50%")]
        told = plan(old.address, new.address, postgres.url, steps=steps)
        file = write(tmp_path / "gateway.yaml", told)

        async def do(*words: str) -> None:
            assert await asyncio.to_thread(main, ["rollout", *words, "spring", "--config", str(file)]) == 0

        async with replicas(tmp_path, told, (2, 1)) as found:
            await until_all(found, 0.25, "running")
            assert len([each for each in found if (await rollout_at(each))["decides"]]) == 1
            assert (await post(found[0].admin, "/rollouts/spring/pause"))[0] == 200  # which a worker does
            await until_all(found, 0.25, "paused")
            assert (await post(found[0].admin, "/rollouts/none/pause"))[0] == 404
            await do("resume")
            await until_all(found, 0.25, "running")
            await do("promote")
            await until_all(found, 0.5, "running")
            await do("abort")
            await until_all(found, 0.0, "rolled back")
