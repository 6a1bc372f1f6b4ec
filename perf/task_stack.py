"""A local Triton with models of a task, and a gateway of its own process in front of it, for `perf/task_*.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import grpc
import yaml

from gateway.models import catalogue
from gateway.triton import LocalTriton

CHECKOUT = Path(__file__).parents[1]
_PORT = 19701
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Served:
    """triton, gateway: channels. cpu: CPU seconds of the gateway so far."""

    triton: grpc.aio.Channel
    gateway: grpc.aio.Channel
    cpu: Callable[[], float]


@asynccontextmanager
async def served(
    example: str, models: Sequence[str], change: Callable[[dict[str, Any], Path], None] | None = None
) -> AsyncIterator[Served]:
    """example: the file's name in deploy/examples. change: alters its config; gets the models' folder too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in models:
            shutil.copytree(CHECKOUT / "model_repository" / model, folder / "models" / model)
        catalogue.build(models, folder / "models")
        text = (CHECKOUT / "deploy/examples" / example).read_text("utf-8")
        config = yaml.safe_load(text.replace("../../model_repository", str(folder / "models")))
        if change is not None:
            change(config, folder / "models")
        async with LocalTriton(folder / "models") as triton:
            config |= {"listen": f"127.0.0.1:{_PORT}", "admin": {"listen": "127.0.0.1:0"}, "workers": 1}
            config["telemetry"] = {"access_log": {"destination": "none"}}
            config["upstreams"]["local"]["endpoints"] = [triton.grpc_address]
            (folder / "gateway.yaml").write_text(yaml.safe_dump(config), "utf-8")
            command = [sys.executable, "-m", "gateway", "serve", "--config", str(folder / "gateway.yaml")]
            gateway = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: ASYNC220  (it only starts)
            options = [("grpc.max_receive_message_length", -1)]
            try:
                async with (
                    grpc.aio.insecure_channel(triton.grpc_address, options) as direct,
                    grpc.aio.insecure_channel(config["listen"], options) as through,
                ):
                    await through.channel_ready()
                    yield Served(direct, through, lambda: _cpu(gateway.pid))
            finally:
                gateway.terminate()
                gateway.wait()


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each of the calls that are made one after another for so long."""
    took = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        await call()
        took.append((time.perf_counter() - began) * 1000)
    return took


def told(milliseconds: Sequence[float]) -> str:
    """Median and 99th percentile."""
    cuts = quantiles(milliseconds, n=100)
    return f"{cuts[49]:.2f} ms (p99 {cuts[98]:.2f})"
