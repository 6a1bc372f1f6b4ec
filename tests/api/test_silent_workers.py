"""A worker that hangs is killed and replaced, and the supervisor's health says when none answers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import free_address
from patience import wait_until

from gateway import supervisor as supervising
from gateway.config import load
from gateway.supervisor import Supervisor

CONFIG = """
listen: {listen}
admin: {{listen: "127.0.0.1:0"}}
workers: 2
server: {{drain: 1s, drain_delay: 0s}}
upstreams: {{main: {{endpoints: ["127.0.0.1:1"]}}}}
models: {{adder: {{variants: {{only: {{upstream: main, model: add_one}}}}}}}}
telemetry: {{access_log: {{destination: none}}}}
"""


def pids(supervisor: Supervisor) -> list[int]:
    return [worker.process.pid for worker in supervisor._workers if worker.process is not None and worker.state]


async def test_a_stopped_worker_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervising, "_ASK_SECONDS", 2.0)
    monkeypatch.setattr(supervising, "_DOUBT_SECONDS", 2.5)
    monkeypatch.setattr(supervising, "_SILENT_SECONDS", 5.0)
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG.format(listen=free_address()))
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(file)]
    supervisor = Supervisor(load(file, {}).config, command, os.environ)
    running = asyncio.ensure_future(supervisor.run())
    await wait_until(lambda: len(pids(supervisor)) == 2)
    first, second = pids(supervisor)
    os.kill(first, signal.SIGSTOP)
    await wait_until(lambda: len(pids(supervisor)) == 2 and first not in pids(supervisor))
    assert second in pids(supervisor)
    assert "worker 0 has not answered for" in caplog.text

    for pid in pids(supervisor):
        os.kill(pid, signal.SIGSTOP)
    await wait_until(lambda: not supervisor.is_live())
    await wait_until(supervisor.is_live)  # others have taken their places
    supervisor._told_to_stop()
    assert await running == 0
