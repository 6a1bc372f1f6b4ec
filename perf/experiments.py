"""`python -m perf.experiments`: what shadows, experiments and looking at answers cost the gateway, and its store.

The same calls, of a thousand users, through gateways that differ in this alone, from 16 callers that each wait for an
answer before the next call. With `--triton` they go to the local Triton, as in other runs; without to a server that
answers at once and costs next to nothing, so that the gateway is what is busy. Answers per second, and CPU time for
each call of the gateway's process, with the threads that compare and write and all processes below it. One client
calls them in turns, a fraction of a second each, so that whatever else the machine does meets all of them alike. What
is written once in five seconds is in few of the turns, so a median has little of it.
A ratio is taken within a round, then the median of the rounds, with its quartiles.

Then 5,000 records a second for `--seconds`: half are outcomes, reported to a gateway that writes them into PostgreSQL
(Debian's package, started here), and half are exposures of new users who call it. It writes what it measures of their
calls, too; and how much of its memory that takes. All listens on loopback and ends with the run.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import grpc
import uvloop

from gateway.transport.dialer import ChannelOptions, WireChannel
from gateway.v1 import outcomes_pb2 as outcomes
from gateway.v1.outcomes_pb2_grpc import OutcomeServiceStub
from perf import gateways, models
from perf.children import Child, NotStarted, Ports
from perf.quotas import cpu_seconds
from perf.stack import until_ready
from perf.users import Users

MODEL = "net"
AT_ONCE = 16
USERS = 1000
RATE = 2500  # outcomes a second, and as many exposures
PER_REPORT = 50  # outcomes of one request
NOTHING, ANSWERS, ALL = "nothing", "answers looked at", "all of it, 1 % shadowed"
REPORTED, EXPOSED = "an experiment, reported", "an experiment, four outcomes measured"
SHADOWS = {f"shadow of {share:.0%}": share for share in (0.0, 0.01, 0.1, 1.0)}
NAMES = [NOTHING, *SHADOWS, REPORTED, EXPOSED, ANSWERS, ALL]

_POSTGRES = Path(__file__).parents[1] / "tests" / "store" / "postgres.py"


def experiment(is_measured: bool) -> dict[str, Any]:
    measured = (
        {}
        if not is_measured
        else {
            "latency": {"kind": "duration", "better": "lower", "measure": "latency"},
            "errors": {"kind": "ratio", "better": "lower", "measure": "error"},
            "bytes": {"kind": "numeric", "better": "lower", "measure": "size"},
            "sure": {"kind": "numeric", "better": "higher", "measure": "confidence"},
        }
    )
    return {
        "model": MODEL,
        "arms": {"a": 1, "b": 1},
        "outcomes": {"bought": {"kind": "binary", "better": "higher"}, **measured},
        "primary": "bought",
        "secondary": list(measured),
        "smallest_effect": "5%",
        "request_ids": False,
    }


def config(name: str, port: int, store: str) -> dict[str, Any]:
    names = {"a": models.TINY_A, "b": models.TINY_B, "c": models.TINY_A}
    variants = {variant: {"upstream": "triton", "model": model} for variant, model in names.items()}
    model: dict[str, Any] = {"variants": variants, "split": {"a": 50, "b": 50}, "sticky": {"metadata": "x-user-id"}}
    share = SHADOWS.get(name, 0.01 if name == ALL else None)
    if share is not None:
        model["shadow"] = {"c": {"share": share, "in_flight": 16}}
    if name in (ANSWERS, ALL):
        model["answers"] = {"finite": "fallback", "contract": "fallback"}
    found: dict[str, Any] = {
        "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}"]}},
        "models": {MODEL: model},
        "telemetry": {"access_log": {"destination": "none"}},
    }
    if name in (REPORTED, EXPOSED, ALL):
        found |= {"experiments": {"spring": experiment(name != REPORTED)}, "store": {"url": store}}
    return found


class Load:
    """Callers of one gateway. `with` connects them."""

    def __init__(self, gateway: Child) -> None:
        self._gateway = gateway
        self._channel = WireChannel(gateway.address, ChannelOptions(connections=4, together=8))
        self._users = Users(self._channel, MODEL, USERS)

    async def __aenter__(self) -> Load:
        await self._channel.__aenter__()
        await self._users.call(2.0, AT_ONCE)  # so that each unit is known
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._channel.__aexit__(*reason)

    async def measure(self, seconds: float) -> tuple[float, float]:
        """Call it for so long. Answers per second, and microseconds of CPU for each.

        :raises NotStarted: if a call failed.
        """
        self._users.answers = 0
        before, began = self._gateway.busy_seconds(), time.monotonic()
        await self._users.call(seconds, AT_ONCE)
        took, busy = time.monotonic() - began, self._gateway.busy_seconds() - before
        if self._users.failed:
            raise NotStarted(f"calls failed: {self._users.failed}")
        return self._users.answers / took, 1e6 * busy / self._users.answers


def server(is_triton: bool, folder: Path, ports: Ports, ended: ExitStack) -> int:
    """Its port."""
    if is_triton:
        triton = gateways.triton(
            models.build_tiny(folder / "models"), folder, (ports.take(), ports.take(), ports.take())
        )
        until_ready(ended.enter_context(triton).address, [models.TINY_A, models.TINY_B])
        return triton.port
    port = ports.take()
    command = [sys.executable, "-m", "perf.quick_server", str(port)]
    ended.enter_context(Child(command, port, folder / f"server-{port}.log"))
    return port


def costs(rounds: int, each: float, port: int, folder: Path, ports: Ports, ended: ExitStack) -> None:
    started = {}
    for name in NAMES:
        file = "".join(letter if letter.isalnum() else "-" for letter in name)
        content = config(name, port, f"sqlite:///{folder}/{file}.db")
        started[name] = ended.enter_context(gateways.gateway(content, file, folder, (ports.take(), ports.take())))
        until_ready(started[name].address, [MODEL])
    found = uvloop.run(in_turns(started, rounds, each))
    print("| configured | CPU a call, µs | ÷ nothing: median (quartiles) | answers/s ÷ nothing |")
    print("| --- | ---: | --- | --- |")
    for name, runs in found.items():
        rates, cpus = (_ratios(runs, found[NOTHING], kind) for kind in (0, 1))
        print(f"| {name} | {statistics.median(run[1] for run in runs):.1f} | {cpus} | {rates} |")


async def in_turns(started: dict[str, Child], rounds: int, each: float) -> dict[str, list[tuple[float, float]]]:
    names = list(started)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    async with AsyncExitStack() as ended:
        loads = {name: await ended.enter_async_context(Load(gateway)) for name, gateway in started.items()}
        for number in range(rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order if number % 2 else reversed(order):
                found[name].append(await loads[name].measure(each))
    return found


def _ratios(runs: list[tuple[float, float]], nothing: list[tuple[float, float]], kind: int) -> str:
    each = [run[kind] / base[kind] for run, base in zip(runs, nothing, strict=True)]
    lower, median, upper = statistics.quantiles(each, n=4)
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"


def postgres(ended: ExitStack) -> str:
    """The URL of a server of our own; the same that the tests start. :raises NotStarted: if there is none here."""
    spec = importlib.util.spec_from_file_location("postgres", _POSTGRES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.BINARIES:
        raise NotStarted("PostgreSQL is not here (Debian: postgresql)")
    server = module.Postgres()
    ended.callback(server.remove)
    return str(server.url)


async def report(address: str, seconds: float) -> tuple[int, int]:
    """Report RATE outcomes a second, in an open loop. Answers how many were accepted, and refused."""
    accepted = refused = 0
    numbers = itertools.count()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = OutcomeServiceStub(channel)

        async def one(first: int) -> None:
            nonlocal accepted, refused
            told = [
                outcomes.Outcome(unit=f"user-{n % 100_000}", name="bought", binary=n % 7 == 0, report_id=f"r{n}")
                for n in range(first, first + PER_REPORT)
            ]
            try:
                await stub.Report(outcomes.ReportRequest(outcomes=told), timeout=20)
                accepted += PER_REPORT
            except grpc.aio.AioRpcError:
                refused += PER_REPORT

        began, tasks = time.monotonic(), set()
        while (elapsed := time.monotonic() - began) < seconds:
            while (sent := len(tasks) * PER_REPORT) < RATE * elapsed:
                tasks.add(asyncio.ensure_future(one(PER_REPORT * next(numbers))))
                if sent % (20 * PER_REPORT) == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
    return accepted, refused


async def watched(address: str, admin: int, pid: int, seconds: float) -> None:
    """Report, look at the gateway meanwhile, and print what was seen."""
    waiting: list[int] = []
    memory = [resident(pid)]
    before, began = cpu_seconds(pid), time.monotonic()
    users = [
        sys.executable,
        "-m",
        "perf.users",
        address,
        MODEL,
        str(seconds),
        "0",
        str(int(2 * RATE * seconds)),
        str(RATE),
    ]
    calling = await asyncio.create_subprocess_exec(*users, stdout=asyncio.subprocess.PIPE)
    reporting = asyncio.ensure_future(report(address, seconds))
    while not reporting.done():
        await asyncio.sleep(0.5)
        store = (await asyncio.to_thread(state, admin))["store"]
        waiting.append(store["waiting"])
        memory.append(resident(pid))
    took = time.monotonic() - began
    accepted, refused = reporting.result()
    called = json.loads((await calling.communicate())[0])
    cpu = (cpu_seconds(pid) - before) / took
    await asyncio.sleep(8.0)  # until what waits is written, and what was measured, too
    store = (await asyncio.to_thread(state, admin))["store"]
    print(
        f"\n{accepted:,} outcomes in {took:.1f} s, with the wait for the last answer: {accepted / took:,.0f} a second, "
        f"{refused} refused; {called['answers']:,} calls of as many users, failed: {called['failed'] or 'none'}; "
        f"{store['written']:,} records written since the start, {sum(store['dropped'].values())} "
        f"dropped, {store['waiting']} wait, at most {max(waiting):,} did; memory {memory[0] >> 20} MiB before, "
        f"{max(memory) >> 20} MiB at most; {cpu:.0%} of a core"
    )


def state(admin: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/state", timeout=20) as answer:
        return json.load(answer)


def resident(pid: int) -> int:
    """Bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def into_the_store(seconds: float, folder: Path, ports: Ports, ended: ExitStack) -> None:
    port = server(False, folder, ports, ended)
    content = config(EXPOSED, port, postgres(ended))
    listening = (ports.take(), ports.take())
    gateway = ended.enter_context(gateways.gateway(content, "store", folder, listening))
    until_ready(gateway.address, [MODEL])
    asyncio.run(report(gateway.address, 3.0))  # what is loaded at first is no growth
    asyncio.run(watched(gateway.address, listening[1], gateway.process.pid, seconds))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.experiments", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--triton", action="store_true", help="in front of the local Triton (default: a played one)")
    parser.add_argument("--each", type=float, default=0.3, help="seconds of calls in each turn (default: 0.3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of reports into PostgreSQL (default: 30)")
    given = parser.parse_args(arguments)
    with ExitStack() as ended:
        folder, ports = Path(ended.enter_context(tempfile.TemporaryDirectory())), Ports()
        if given.rounds:
            costs(given.rounds, given.each, server(given.triton, folder, ports, ended), folder, ports, ended)
    if given.seconds:
        with ExitStack() as ended:
            into_the_store(given.seconds, Path(ended.enter_context(tempfile.TemporaryDirectory())), Ports(), ended)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NotStarted as error:
        sys.exit(str(error))
