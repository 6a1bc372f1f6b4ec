"""`python -m perf.quotas`: what quotas cost the gateway, in CPU time of its process for each call.

The same calls through gateways that differ in their quotas alone, in front of a played Triton that answers at once:
none, some that never bite (kept in the process, and in a Valkey or Redis), usage counted and logged, and one that is
used up, so that every call is refused. Beside them, what any answer costs that the gateway gives itself: to a call for
a model that there is not, and for a method that there is not, which is no more than to read a call and to write
trailers.
Rounds are interleaved; a ratio is taken within a round, then the median of the rounds, with the least and the most. All
listens on loopback and ends with the run: about fifteen seconds a round.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from perf import gateways
from perf.children import Child, NotStarted, Ports
from perf.stack import until_ready

MODEL = "net"
CALLS = 4000
INFER, NO_METHOD = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/NoMethod"
AT_ONCE = 16
ENOUGH = {"requests": 1_000_000, "bytes": "100GiB", "rows": 10_000_000, "concurrent": 100_000}
METADATA = (("x-tenant", "acme"),)
NONE, LOCAL, USAGE, SHARED, USED_UP = "none", "never bites", "never bites, usage log", "never bites, shared", "used up"
UNKNOWN_MODEL, UNKNOWN_METHOD = "none, and no such model", "none, and no such method"
CODES = {
    USED_UP: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    UNKNOWN_METHOD: grpc.StatusCode.UNIMPLEMENTED,
}


def quotas(name: str, folder: Path, store: str) -> dict[str, Any]:
    found: dict[str, Any] = {"caller": "x-tenant", "callers": {"acme": {**ENOUGH, "models": {MODEL: ENOUGH}}}}
    found["models"] = {MODEL: ENOUGH}
    if name == USAGE:
        found["usage"] = {"directory": str(folder / "usage"), "interval": "1s"}
    if name == SHARED:
        found["shared"] = {"url": store}
    if name == USED_UP:
        found["callers"] = {"acme": {"requests": 0.001}}
    return {} if name == NONE else {"quotas": found}


def request(model: str = MODEL) -> bytes:
    asked = pb.ModelInferRequest(model_name=model, raw_input_contents=[bytes(512)])
    asked.inputs.add(name="IN", datatype="UINT8", shape=[8, 64])
    return bytes(asked.SerializeToString())


async def calls(
    address: str, expected: grpc.StatusCode, count: int, method: str = INFER, model: str = MODEL
) -> list[float]:
    """How long each call took, in seconds."""
    took: list[float] = []
    body, left = request(model), iter(range(count))
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(method)

        async def caller() -> None:
            for _ in left:
                code, begun = grpc.StatusCode.OK, time.monotonic()
                try:
                    await infer(body, metadata=METADATA, timeout=20)
                except grpc.aio.AioRpcError as error:
                    code = error.code()
                if code is not expected:
                    raise RuntimeError(f"{code} in place of {expected}")
                took.append(time.monotonic() - begun)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return took


def measure(gateway: Child, name: str) -> float:
    """Microseconds of CPU for each call."""
    expected = CODES.get(name, grpc.StatusCode.OK)
    method = NO_METHOD if name == UNKNOWN_METHOD else INFER
    model = "missing" if name == UNKNOWN_MODEL else MODEL
    asyncio.run(calls(gateway.address, expected, CALLS // 10, method, model))
    before = cpu_seconds(gateway.process.pid)
    asyncio.run(calls(gateway.address, expected, CALLS, method, model))
    return 1e6 * (cpu_seconds(gateway.process.pid) - before) / CALLS


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, finer than the kernel's ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.quotas", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    with ExitStack() as ended:
        folder = Path(ended.enter_context(tempfile.TemporaryDirectory()))
        ports, port = Ports(), 0
        port = ports.take()
        server = [sys.executable, "-m", "perf.scripted_server", str(port), "0"]
        ended.enter_context(Child(server, port, folder / "server.log"))
        names = [NONE, LOCAL, USAGE, USED_UP]
        program, store = shutil.which("valkey-server") or shutil.which("redis-server"), ports.take()
        if program is not None:
            names.append(SHARED)
            options = ["--port", str(store), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
            ended.enter_context(Child([program, *options], store, folder / "store.log"))
        started = {}
        for name in names:
            config = {
                "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}"]}},
                "models": {MODEL: {"variants": {"only": {"upstream": "triton", "model": "echo"}}}},
                "telemetry": {"access_log": {"destination": "none"}},
                **quotas(name, folder, f"redis://127.0.0.1:{store}/0"),
            }
            file = name.replace(" ", "-")
            gateway = gateways.gateway(config, file, folder, (ports.take(), ports.take()))
            started[name] = ended.enter_context(gateway)
            until_ready(gateway.address, [MODEL])
        for name in (UNKNOWN_MODEL, UNKNOWN_METHOD):
            started[name] = started[NONE]
            names.append(name)
        asyncio.run(_use_up(started[USED_UP].address))
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found[name].append(measure(started[name], name))
    print("| quota | CPU a call, µs | as a share of none: median (least to most) |\n| --- | --- | --- |")
    for name, each in found.items():
        shares = [cpu / none for cpu, none in zip(each, found[NONE], strict=True)]
        print(
            f"| {name} | {statistics.median(each):.0f} | "
            f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f}) |"
        )


async def _use_up(address: str) -> None:
    await calls(address, grpc.StatusCode.OK, 1)
    await asyncio.sleep(0.1)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            await calls(address, grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
        except RuntimeError:
            continue
        return


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NotStarted as error:
        sys.exit(str(error))
