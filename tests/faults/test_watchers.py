"""A thousand who watch health while models come and go: each is told each change once, and no call notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from books import Servers
from command_line import command, free_address
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ledger import OPTIONS, Ledger, calling
from traffic import config, until, until_readyz, write

WATCHERS = 1000
CHANNELS = 10
CHANGES = 60 if "SOAK_SECONDS" in os.environ else 2
SERVING, UNKNOWN = 1, 3

pytestmark = pytest.mark.timeout(600)


class Watcher:
    """Of one model: what it was told, in order."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.told: list[int] = []

    async def run(self, stub: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=self.model)):
                self.told.append(answer.status)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_a_thousand_watchers_hear_each_change_once_while_configs_are_reloaded(
    servers: Servers, tmp_path: Path
) -> None:
    server, address, ledger = servers.start(), free_address(), Ledger()
    variants = {"only": {"upstream": "main", "model": "echo"}}

    def content(is_there: bool) -> dict[str, object]:
        models = {"m": {"variants": variants}, **({"comes-and-goes": {"variants": variants}} if is_there else {})}
        return config({"main": {"endpoints": [server.address]}}, models, listen=address)

    file = write(tmp_path / "gateway.yaml", content(False))
    watchers = [Watcher("comes-and-goes" if number % 2 else "m") for number in range(WATCHERS)]
    comes, stays = watchers[1::2], watchers[::2]
    async with command("serve", "--config", str(file), folder=tmp_path) as running:
        _, admin = await running.until_serving()
        await until_readyz(admin, True, within=30)
        before = descriptors(running.pid)
        async with calling(address, ledger), contextlib.AsyncExitStack() as exits:
            channels = [
                await exits.enter_async_context(grpc.aio.insecure_channel(address, OPTIONS)) for _ in range(CHANNELS)
            ]
            stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
            tasks = [asyncio.ensure_future(each.run(stubs[n % CHANNELS])) for n, each in enumerate(watchers)]
            await until(lambda: all(each.told for each in watchers), 60, "the first answers")
            for number in range(1, CHANGES + 1):
                write(file, content(bool(number % 2)))
                running.signal(signal.SIGHUP)
                await until(lambda: all(len(each.told) > number for each in comes), 60, "a change")  # noqa: B023
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks)
        await until(lambda: descriptors(running.pid) <= before + 4, 20, "descriptors as before")  # two to the server
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
    assert [each.told for each in comes] == [[(UNKNOWN, SERVING)[n % 2] for n in range(CHANGES + 1)]] * len(comes)
    assert [each.told for each in stays] == [[SERVING]] * len(stays)
    assert "Traceback" not in running.errors
    assert not ledger.failed(), ledger.failed()
    ledger.check(servers.books)
