"""Restarts, killed workers, reloads and clocks that jump, under load: bars 54 to 56 and 59 of the reliability page.

Short here; `make soak` has them go on for longer (SOAK_SECONDS).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from books import Sent, Servers, Write
from command_line import Command, children, command, free_address
from ledger import Ledger, calling
from shared_regions import regions_of
from test_workers import connections
from traffic import config, http, until, until_readyz, write

SOAK = "SOAK_SECONDS" in os.environ
RESTARTS = 100 if SOAK else 3
KILLS = 60 if SOAK else 2
RELOADS = 60 if SOAK else 3
HERE = Path(__file__).parent
GRPC_JS = Path(os.environ.get("GRPC_JS", HERE.parents[1] / ".venv/grpc-js/node_modules/@grpc/grpc-js"))

pytestmark = pytest.mark.timeout(1800 if SOAK else 300)


async def serving(running: Command) -> str:
    """Wait until every worker of it serves; its admin address."""
    _, admin = await running.until_serving()
    await until_readyz(admin, True, within=30)
    return admin


@dataclass
class Instances:
    """Three gateways on one config, each at an address of its own, which stays."""

    file: Path
    folder: Path
    addresses: list[str]

    @contextlib.asynccontextmanager
    async def one(self, address: str) -> AsyncIterator[Command]:
        arguments = ("serve", "--config", str(self.file), "--listen", address)
        async with command(*arguments, folder=self.folder) as running:
            await serving(running)
            yield running

    @contextlib.asynccontextmanager
    async def all(self, clients: int) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        """All three; what it gives restarts them so many times, each when it is its turn.

        clients:  that hold a connection to each of them.
        """
        async with contextlib.AsyncExitStack() as exits:
            running = [await exits.enter_async_context(self.one(address)) for address in self.addresses]

            async def restart(times: int) -> None:
                for number in range(times):
                    which = number % len(running)
                    running[which].signal(signal.SIGTERM)
                    assert await running[which].wait() == 0
                    address = self.addresses[which]
                    running[which] = new = await exits.enter_async_context(self.one(address))
                    # Their backoff decides when that is.
                    await until(lambda: connections(new.pid, address) >= clients, 30, "clients")  # noqa: B023

            yield restart


@pytest.fixture
def instances(servers: Servers, write_config: Write, tmp_path: Path) -> Instances:
    server = servers.start(10)
    file = write_config(server.address, server={"drain_delay": "500ms", "drain": "20s"})
    return Instances(file, tmp_path, [free_address() for _ in range(3)])


async def test_gateways_that_are_restarted_in_turn_lose_no_call_of_grpcio(
    instances: Instances, servers: Servers
) -> None:
    ledger = Ledger()
    target = "ipv4:" + ",".join(instances.addresses)
    async with instances.all(6) as restart, calling(target, ledger, streams=2, timeout=20.0, pause=0.015):
        await restart(RESTARTS)
    assert not ledger.failed(), ledger.failed()
    ledger.check(servers.books)
    assert ledger.good() > 20 * RESTARTS


@pytest.mark.skipif(not GRPC_JS.exists(), reason="@grpc/grpc-js is not installed; `make soak` does where npm is")
async def test_gateways_that_are_restarted_in_turn_lose_no_call_of_grpc_js(instances: Instances) -> None:
    async with instances.all(6) as restart:
        caller = await asyncio.create_subprocess_exec(
            "node",
            str(HERE / "rolling_caller.js"),
            ",".join(instances.addresses),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "GRPC_JS": str(GRPC_JS)},
        )
        await restart(RESTARTS)
        told, _ = await caller.communicate(b"")
    counted = json.loads(told)
    assert not counted["failures"], counted
    assert counted["good"] > 20 * RESTARTS


async def test_a_worker_that_is_killed_each_second_costs_only_its_calls_in_flight(
    servers: Servers, write_config: Write, sent: Sent, tmp_path: Path
) -> None:
    server = servers.start(5)
    address, ledger = free_address(), Ledger()
    file = write_config(server.address, shared_memory=sent.shared_memory)
    arguments = ("serve", "--config", str(file), "--workers", "2", "--listen", address)
    kills, regions = 0, set[Path]()
    async with command(*arguments, folder=tmp_path) as supervisor:
        admin = await serving(supervisor)
        await until(lambda: supervisor.errors.count("serving gRPC") == 2, 30, "both workers")
        async with calling(address, ledger, unary=8, size=sent.size):
            for _ in range(KILLS):
                victim = children(supervisor.pid)[kills % 2]
                regions |= set(regions_of(victim))
                os.kill(victim, signal.SIGKILL)
                kills += 1
                started = supervisor.errors.count("serving gRPC")
                await asyncio.sleep(1)
                assert (await http(admin, "/healthz"))[0] == 200
                await until(lambda: supervisor.errors.count("serving gRPC") > started, 30, "another")  # noqa: B023
            last = time.monotonic()
            await asyncio.sleep(0.5)
            assert not ledger.failed(last)
        regions |= {region for worker in children(supervisor.pid) for region in regions_of(worker)}
        supervisor.signal(signal.SIGTERM)
        assert await supervisor.wait() == 0
    assert bool(regions) == (sent.shared_memory == "auto")
    assert not any(region.exists() for region in regions)
    ledger.check(servers.books)
    failures = ledger.failed()
    assert {text.partition(":")[0] for text in failures} <= {"UNAVAILABLE"}, failures
    assert failures.total() <= 4 * kills, failures  # half of the eight, with a call each
    assert ledger.good() > 100


async def test_reloads_each_second_fail_no_call_and_keep_the_split(servers: Servers, tmp_path: Path) -> None:
    server = servers.start()
    ledger = Ledger()
    variants = {name: {"upstream": "main", "model": f"echo-{name}"} for name in ("a", "b")}
    split = {"a": 3, "b": 1}

    def content(number: int) -> dict[str, object]:
        models = {"m": {"variants": variants, "split": split}, f"other-{number}": {"variants": {"a": variants["a"]}}}
        return config({"main": {"endpoints": [server.address]}}, models, listen=address)

    address = free_address()
    file = write(tmp_path / "gateway.yaml", content(0))
    async with command("serve", "--config", str(file), folder=tmp_path) as running:
        admin = await serving(running)
        async with calling(address, ledger, unary=16, pause=0.0):
            for number in range(1, RELOADS + 1):
                write(file, content(number))
                running.signal(signal.SIGHUP)
                await asyncio.sleep(1)
                await until(lambda n=number: running.errors.count("is in force") > n, 30, "it is read")  # type: ignore[misc]
        _, told = await http(admin, "/config")
        assert sum(change["accepted"] for change in told["changes"]) >= min(RELOADS, 3)
        _, metrics = await http(admin, "/metrics")
    assert not ledger.failed(), ledger.failed()
    ledger.check(servers.books)
    counted = by_variant(metrics)
    share, total = counted["a"] / counted.total(), counted.total()
    assert abs(share - 0.75) < max(0.01, 5 * (0.75 * 0.25 / total) ** 0.5), counted


def by_variant(metrics: str) -> Counter[str]:
    counted: Counter[str] = Counter()
    for line in metrics.splitlines():
        if line.startswith("gateway_requests_total{") and 'model="m"' in line:
            for name in "ab":
                if f'variant="{name}"' in line:
                    counted[name] += int(float(line.rpartition(" ")[2]))
    return counted


JUMPS = """
import random, time
true, began = time.time, time.monotonic()
def jumping():
    phase = int(time.monotonic() - began) % 4
    return true() + (0, 3600, -3600, random.choice((-3600, 0, 3600)))[phase]
time.time = jumping
"""


async def test_a_clock_that_jumps_by_hours_makes_no_deadline_and_no_storm(
    servers: Servers, write_config: Write, tmp_path: Path
) -> None:
    """It is set an hour forward, then two hours back, then jumps between any two readings, as no NTP does."""
    server = servers.start()
    (tmp_path / "jumping").mkdir()
    (tmp_path / "jumping" / "sitecustomize.py").write_text(JUMPS)
    address, ledger = free_address(), Ledger()
    arguments = ("serve", "--config", str(write_config(server.address)), "--listen", address)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "jumping")}
    async with command(*arguments, folder=tmp_path, environ=environ) as running:
        admin = await serving(running)
        async with calling(address, ledger, streams=2):
            await asyncio.sleep(4 if SOAK else 3)
            assert (await http(admin, "/readyz"))[0] == 200
            assert (await http(admin, "/metrics"))[0] == 200
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
    assert "Traceback" not in running.errors
    assert not ledger.failed(), ledger.failed()
    ledger.check(servers.books)
