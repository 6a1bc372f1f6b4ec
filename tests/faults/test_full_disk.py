"""No space is left on any disk that the gateway writes to: calls go on, it is said once, and all is kept again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from books import Servers
from command_line import children, command, free_address
from ledger import Ledger, calling
from small_disks import SmallDisk, small_disk, why_not
from traffic import config, http, until, until_readyz, write

SOAK = "SOAK_SECONDS" in os.environ


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    reason = why_not(tmp_path)
    if reason:
        pytest.skip(reason)
    with small_disk(4) as made:
        yield made


def content(address: str, servers: str, disk: SmallDisk, *models: str) -> dict[str, object]:
    variants = {"only": {"upstream": "main", "model": "echo"}}
    captures = [{"model": "m", "directory": str(disk.folder / "captured"), "share": 1.0}]
    return config(
        {"main": {"endpoints": [servers]}},
        {name: {"variants": variants} for name in models},
        listen=address,
        telemetry={"access_log": {"destination": "stdout", "sample": 1}, "capture": captures},
    )


async def counted(admin: str, model: str) -> int:
    """Calls of a model, as the metrics tell."""
    _, metrics = await http(admin, "/metrics")
    found = re.findall(rf'^gateway_requests_total{{.*model="{model}".*}} (\S+)$', metrics, re.MULTILINE)
    return int(sum(map(float, found)))


async def call_for(seconds: float, address: str, ledger: Ledger) -> None:
    async with calling(address, ledger, unary=4, streams=1):
        await asyncio.sleep(seconds)


async def test_full_disks_cost_no_call_and_no_worker_and_all_is_kept_again_when_there_is_room(
    disk: SmallDisk, servers: Servers, tmp_path: Path
) -> None:
    """The access log, captured requests, and the numbers of two workers, whose folder is on a full disk too."""
    server, address, ledger = servers.start(), free_address(), Ledger()
    temporary, log = disk.folder / "tmp", disk.folder / "access.log"
    temporary.mkdir()
    file = write(tmp_path / "gateway.yaml", content(address, server.address, disk, "m"))
    arguments = ("serve", "--config", str(file), "--workers", "2")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    environ = {**os.environ, "TMPDIR": str(temporary)}
    async with command(*arguments, folder=tmp_path, environ=environ, output=output) as running:
        os.close(output)
        _, admin = await running.until_serving()
        await until_readyz(admin, True, within=30)
        await until(lambda: running.errors.count("serving gRPC") == 2, 30, "both workers")
        await call_for(0.5, address, ledger)
        workers = children(running.pid)
        disk.fill()
        await call_for(1.0, address, ledger)
        file.write_text(write(tmp_path / "next.yaml", content(address, server.address, disk, "m", "new")).read_text())
        running.signal(signal.SIGHUP)  # a config that comes now is followed
        await until(lambda: running.errors.count("is in force") == 4, 30, "the config in both workers")
        await call_for(0.5, address, ledger)
        assert [(await http(admin, path))[0] for path in ("/healthz", "/readyz", "/metrics", "/state")] == [200] * 4
        assert children(running.pid) == workers
        os.kill(workers[0], signal.SIGKILL)  # its fellow goes on, whether it can be replaced or not
        await call_for(1.0, address, ledger)
        counted_before, size = await counted(admin, "m"), log.stat().st_size
        disk.make_room()
        await until(lambda: len(children(running.pid)) == 2, 30, "two workers")
        await call_for(1.0, address, ledger)
        assert await counted(admin, "m") > counted_before
        assert log.stat().st_size > size
        if SOAK:
            await asyncio.sleep(10.0)  # for so long nothing is captured after a failure
            await call_for(0.5, address, ledger)
            assert sum(each.stat().st_size for each in (disk.folder / "captured").iterdir()) > 0
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
    for complaint in ("access log: lines are lost", "capture: nothing of m is kept"):
        assert 1 <= running.errors.count(complaint) <= 3, running.errors  # once in each worker that there was
    assert not ledger.failed(), ledger.failed()
    ledger.check(servers.books)
