"""Threads of pipelines' steps: as many as the config says, and a process that ends lets them end their work first."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
from books import Servers
from command_line import command
from traffic import config, http, until_readyz, write
from v2_calls import Outcome, call, channel_to, infer

THREADS, CALLS = 2, 8
STEP = """
import time
from gateway.steps import Params, Step, TensorSpec

class Slow(Step):
    params_type = Params
    def __init__(self, params, read):
        self.reads = self.writes = (TensorSpec("IN", "FP32", (-1,)),)
    def __call__(self, tensors):
        time.sleep(0.2)
        return dict(tensors)
"""
TENSOR = {"name": "IN", "datatype": "FP32", "shape": [-1]}


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


async def begun(admin: str) -> int:
    """Steps that run or wait for a thread."""
    steps = (await http(admin, "/state"))[1]["pipelines"]["slow"]["steps"]
    return sum(each["running"] + each["waiting"] for each in steps.values())


async def test_sigterm_lets_steps_that_run_and_steps_that_wait_end_and_answers_all(
    servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "users_steps.py").write_text(STEP)
    pipeline = {"inputs": [TENSOR], "outputs": [TENSOR], "steps": [{"step": "users_steps:Slow"}]}
    upstreams = {"main": {"endpoints": [servers.start().address]}}
    models = {"slow": {"pipeline": pipeline}, "m": {"variants": {"only": {"upstream": "main", "model": "echo"}}}}
    file = write(tmp_path / "g.yaml", config(upstreams, models, pipelines={"threads": THREADS}))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    async with command("serve", "--config", str(file), folder=tmp_path, environ=environ) as running:
        address, admin = await running.until_serving()
        await until_readyz(admin, True, within=30)
        async with channel_to(address) as channel:
            before = threads(running.pid)
            for _ in range(2):  # threads are used again
                answers = await asyncio.gather(*(call(channel, infer("slow")) for _ in range(CALLS)))
                assert {answer.code for answer in answers} == {grpc.StatusCode.OK}
                assert threads(running.pid) <= before + THREADS + 1  # one beyond, as a thread ends
            calls: list[asyncio.Future[Outcome]] = []
            while await begun(admin) < CALLS // 2:
                # Before the first look, and where a busy machine was not asked in time.
                if all(each.done() for each in calls):
                    calls = [asyncio.ensure_future(call(channel, infer("slow"))) for _ in range(CALLS)]
            running.signal(signal.SIGTERM)
            assert {(await each).code for each in calls} == {grpc.StatusCode.OK}
        assert await running.wait() == 0
    assert "abandoned" not in running.errors
    assert "Traceback" not in running.errors
