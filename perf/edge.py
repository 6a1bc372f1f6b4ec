"""What `deploy/examples/edge.yaml` needs of memory: `python -m perf.edge`. docs/edge.md has its figures.

The gateway and the local Triton serve every task on two cores: after one call of each, then each task alone, then all
tasks at once by several callers each. After each the memory of both with all their child processes is read from /proc:
RSS, which counts a page of a library once for each process that has it; what is really taken, which counts it once; and
what of that is no page of a file, which no limit can make the kernel drop.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc

from gateway.demo.tasks import EVERYTHING, TASKS, Site, Task, models_of
from gateway.models.catalogue import build
from gateway.triton import LocalTriton

_CHECKOUT = Path(__file__).parents[1]
_REPOSITORY = _CHECKOUT / "model_repository"
EDGE: Final = _CHECKOUT / "deploy/examples" / EVERYTHING
_ADDRESS = "127.0.0.1:19721"
_CORES = 2
_AT_ONCE = 2  # callers of each task
_ROUNDS = 5
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ (?P<offset>\S+) \S+ \d+\s*(?P<file>.*)$")
_MIB = 1024  # /proc counts in KiB
EDGE_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""What docs/edge.md says to start both with: glibc else keeps what a large request has freed."""


def family(pid: int) -> Iterator[int]:
    """The process and all that it has started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text(encoding="ascii").split():
            yield from family(int(child))


def mebibytes(pids: Sequence[int]) -> tuple[float, float, float]:
    """What the processes have resident: each by itself (RSS), with pages of files counted once, and without them."""
    resident, own = 0, 0
    files: dict[tuple[str, str], int] = {}  # by file and place in it: the most that one process has of it
    for pid in pids:
        place = ("", "")
        shared = 0
        for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
            if header := _MAPPING.match(line):
                place = (header["file"], header["offset"])
            elif line.startswith("Rss:"):
                shared = int(line.split()[1])
                resident += shared
            elif line.startswith("Anonymous:"):
                anonymous = int(line.split()[1])
                own += anonymous
                files[place] = max(files.get(place, 0), shared - anonymous)
    return resident / _MIB, (own + sum(files.values())) / _MIB, own / _MIB


async def measure() -> None:
    os.environ.update(EDGE_ENVIRONMENT)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    await asyncio.to_thread(build, models_of(TASKS), _REPOSITORY)
    with tempfile.TemporaryFile() as log:
        extra = ["--model-config-name=edge"]
        async with LocalTriton(_REPOSITORY, models=edge_models(), extra=extra) as triton:
            environ = {**os.environ, "TRITON_ENDPOINT": triton.grpc_address, "GATEWAY_LISTEN": _ADDRESS}
            environ["GATEWAY_ADMIN_LISTEN"] = "127.0.0.1:0"
            command = [sys.executable, "-m", "gateway", "serve", "--config", str(EDGE)]
            gateway = subprocess.Popen(command, env=environ, stdout=log, stderr=log)  # noqa: ASYNC220  # it only starts
            try:
                assert triton.pid is not None  # it has started
                await _measure({"gateway": gateway.pid, "Triton": triton.pid})
            finally:
                gateway.terminate()
                gateway.wait()


def edge_models() -> list[str]:
    """The models that the config names; the FP32 variant is not among them."""
    text = EDGE.read_text("utf-8")
    return sorted(model for model in models_of(TASKS) if f"model: {model}}}" in text)


async def _measure(parts: dict[str, int]) -> None:
    async with grpc.aio.insecure_channel(_ADDRESS) as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
        site = Site(channel, _REPOSITORY)
        inputs = [(task, await first_call(task, site)) for task in TASKS]
        _print("after one call of each task", parts)
        for task, given in inputs:
            began = time.monotonic()
            for _ in range(_ROUNDS):
                await task.ask(site, given)
            _print(f"{task.name}, {(time.monotonic() - began) / _ROUNDS:.2f} s for two calls", parts)
        refused = 0
        for _ in range(_ROUNDS):
            each = (_is_refused(task, site, given) for task, given in inputs for _ in range(_AT_ONCE))
            refused += sum(await asyncio.gather(*each))
        calls = _ROUNDS * _AT_ONCE * len(inputs)
        _print(f"all at once, {_AT_ONCE} callers each: {refused} of {calls} had no room", parts)


async def _is_refused(task: Task, site: Site, given: bytes) -> bool:
    """Did the gateway have no room for it? Other errors pass."""
    try:
        await task.ask(site, given)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return True
    return False


async def first_call(task: Task, site: Site) -> bytes:
    """Its input, after one call; the gateway may still be looking at its upstream."""
    end = time.monotonic() + 30
    while True:
        try:
            given = await task.sample(site)
            await task.ask(site, given)
            return given
        except grpc.aio.AioRpcError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.5)


def _print(what: str, parts: dict[str, int]) -> None:
    families = [list(family(pid)) for pid in parts.values()]
    each = [mebibytes(pids)[0] for pids in families]
    together = mebibytes([pid for pids in families for pid in pids])
    figures = " | ".join(f"{figure:.0f} MiB" for figure in (*each, *together))
    sys.stdout.write(f"| {what} | {figures} |\n")
    sys.stdout.flush()


def main() -> None:
    headings = ("", "gateway, RSS", "Triton, RSS", "together, RSS", "files once", "without files")
    sys.stdout.write(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}\n")
    asyncio.run(measure())


if __name__ == "__main__":
    main()
