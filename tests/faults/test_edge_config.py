"""deploy/examples/edge.yaml serves every task in 1 GiB of memory: no process is killed, and no call fails.

Only `make soak` runs it (SOAK_SECONDS, five minutes at most): what is served takes half a minute to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from command_line import command, free_address
from memory_groups import MemoryGroup, memory_group, needs_cgroup

from gateway.demo.tasks import TASKS, Site, Task
from gateway.models.catalogue import build
from perf.edge import EDGE, EDGE_ENVIRONMENT, edge_models, first_call

CHECKOUT = Path(__file__).parents[2]
REPOSITORY = CHECKOUT / "model_repository"
SECONDS = min(300.0, float(os.environ.get("SOAK_SECONDS", "0")))
MIB = 1 << 20
ALL, GATEWAY = 1024 * MIB, 224 * MIB
"""What both have together, and what of that the gateway may use at most. Triton may use the rest."""
AT_ONCE = 2  # callers of each task

pytestmark = [
    needs_cgroup,
    pytest.mark.skipif(not SECONDS, reason="make soak runs it"),
    pytest.mark.timeout(SECONDS + 300),
]


@contextlib.asynccontextmanager
async def serving(folder: Path, triton: MemoryGroup, gateway: MemoryGroup) -> AsyncIterator[str]:
    """As docs/edge.md says to start it. Gives the gateway's address."""
    ports = {name: free_address().rpartition(":")[2] for name in ("grpc", "http", "metrics")}
    options = [each for name, port in ports.items() for each in (f"--{name}-port", port)]
    models = [each for model in edge_models() for each in ("--model", model)]
    triton_start = ("triton", "start", "--model-config", "edge", *options, *models)
    async with command(*triton_start, folder=folder, environ=EDGE_ENVIRONMENT, start=triton.start) as running:
        await running.until_said("Ctrl-C stops it", within=120)
        environ = {**EDGE_ENVIRONMENT, "TRITON_ENDPOINT": f"127.0.0.1:{ports['grpc']}"}
        environ |= {"GATEWAY_LISTEN": "127.0.0.1:0", "GATEWAY_ADMIN_LISTEN": "127.0.0.1:0"}
        serve = ("serve", "--config", str(EDGE))
        async with command(*serve, folder=folder, environ=environ, start=gateway.start) as served:
            yield (await served.until_serving())[0]
        running.process.terminate()
        await running.wait()


async def test_every_task_is_served_in_a_gibibyte(tmp_path: Path) -> None:
    await asyncio.to_thread(build, edge_models(), REPOSITORY)
    with (
        memory_group(ALL) as together,
        memory_group(ALL - GATEWAY, within=together) as triton,
        memory_group(GATEWAY, within=together) as gateway,
    ):
        async with serving(tmp_path, triton, gateway) as address, grpc.aio.insecure_channel(address) as channel:
            site = Site(channel, REPOSITORY)
            inputs = {task: await first_call(task, site) for task in TASKS}
            end = time.monotonic() + SECONDS
            callers = (call_until(end, task, site, given) for task, given in inputs.items() for _ in range(AT_ONCE))
            outcomes = sum(await asyncio.gather(*callers), Counter[tuple[str, str]]())
        groups = {"together": together, "Triton": triton, "gateway": gateway}
        most = {name: group.number("memory.max_usage_in_bytes") // MIB for name, group in groups.items()}
        print(f"most in use, file cache included, MiB: {most}; calls: {dict(outcomes)}")
        assert (triton.kills, gateway.kills) == (0, 0)
        no_room = {"RESOURCE_EXHAUSTED"}  # a page beside another one may be told to come again
        allowed = {
            (task.name, end) for task in TASKS for end in {"OK"} | (no_room if task.name == "reading" else set())
        }
        assert outcomes.keys() <= allowed, outcomes
        assert {name for name, end in outcomes if end == "OK"} == {task.name for task in TASKS}


async def call_until(end: float, task: Task, site: Site, given: bytes) -> Counter[tuple[str, str]]:
    """How often it ended how: the task's name, and "OK" or the code."""
    outcomes = Counter[tuple[str, str]]()
    while time.monotonic() < end:
        try:
            await task.ask(site, given)
            outcomes[task.name, "OK"] += 1
        except grpc.aio.AioRpcError as error:
            outcomes[task.name, error.code().name] += 1
            await asyncio.sleep(0.2)
    return outcomes
