"""`python -m perf.tracing`: what traces cost the gateway, in CPU time for each call, and in latency.

The same calls through gateways that differ in the part of the calls that is recorded alone, in front of a played Triton
that answers at once: without traces, 1 %, and all. Spans go by OTLP to a sink. Rounds are interleaved; figures are
medians of the rounds, the CPU time that of the serving process and that of the process beside it, which exports. All
listens on loopback and ends with the run: about five seconds a round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc

from perf import gateways
from perf.children import Child, NotStarted, Ports
from perf.quotas import CALLS, MODEL, calls, cpu_seconds
from perf.sink import Sink
from perf.stack import until_ready

PARTS = {"no traces": 0.0, "1 % recorded": 0.01, "all recorded": 1.0}


@dataclass
class Round:
    serving: float  # microseconds of CPU a call
    exporting: float
    p50: float  # milliseconds
    p99: float


def measure(gateway: Child) -> Round:
    asyncio.run(calls(gateway.address, grpc.StatusCode.OK, CALLS // 10))
    pid = gateway.process.pid
    exporters = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    serving, exporting = cpu_seconds(pid), sum(map(cpu_seconds, exporters))
    took = sorted(asyncio.run(calls(gateway.address, grpc.StatusCode.OK, CALLS)))
    return Round(
        1e6 * (cpu_seconds(pid) - serving) / CALLS,
        1e6 * (sum(map(cpu_seconds, exporters)) - exporting) / CALLS,
        1e3 * took[len(took) // 2],
        1e3 * took[len(took) * 99 // 100],
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.tracing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    with ExitStack() as ended:
        folder, sink, ports = Path(ended.enter_context(tempfile.TemporaryDirectory())), Sink(), Ports()
        ended.enter_context(sink)
        port = ports.take()
        server = [sys.executable, "-m", "perf.scripted_server", str(port), "0"]
        ended.enter_context(Child(server, port, folder / "server.log"))
        config = {
            "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}"]}},
            "models": {MODEL: {"variants": {"only": {"upstream": "triton", "model": "echo"}}}},
            "telemetry": {"access_log": {"destination": "none"}},
        }
        started = {}
        for number, (name, part) in enumerate(PARTS.items()):
            endpoint = sink.endpoint if part else ""
            own = (ports.take(), ports.take())
            started[name] = ended.enter_context(
                gateways.gateway(config, f"traces-{number}", folder, own, endpoint, part)
            )
            until_ready(started[name].address, [MODEL])
        names, found = list(PARTS), {name: [] for name in PARTS}  # type: tuple[list[str], dict[str, list[Round]]]
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found[name].append(measure(started[name]))
    print("| traces | CPU a call, µs: serving | exporting | p50, ms | p99, ms |\n| --- | --- | --- | --- | --- |")
    for name, each in found.items():
        figures = [statistics.median(getattr(one, figure) for one in each) for figure in Round.__annotations__]
        print(f"| {name} | {figures[0]:.0f} | {figures[1]:.0f} | {figures[2]:.2f} | {figures[3]:.2f} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NotStarted as error:
        sys.exit(str(error))
