"""`python -m perf.overload`: more calls than a real Triton can answer, through the gateway, and what none can mend.

Three models that sleep: `bounded` and `endless` for 20 ms, one row at a time, so 50 answers a second at most, the first
with a queue of 8; `batched` for 40 ms, up to four rows at once, with a queue of 8, so 100 a second. All listens on
loopback and ends with the run, which takes two and a half minutes a round. Prints a table of medians, with the least
and the most of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb

from gateway.artifacts import FetchFailed
from perf import gateways
from perf.children import Child, NotStarted, Ports
from perf.reliability import OK, Load, load_on
from perf.stack import until_ready

MODELS = {"bounded": (20, 1, 8), "endless": (20, 1, 0), "batched": (40, 4, 8)}
"""Milliseconds, rows at once, and how many may wait; 0 if any number may."""
SHAPE = (1, 32)
PAUSES = (0.0, 0.00025, 0.0005, 0.001, 0.002)  # seconds between an answer and a caller's next call
SECONDS = 15.0
FIRST = 2.0  # seconds of an overload that do not count
TIMEOUT = 5.0

_CODE = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep({seconds})
        rows = [pb_utils.get_input_tensor_by_name(each, "IN").as_numpy() for each in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", each)]) for each in rows]
"""
_CONFIG = """
backend: "python"
max_batch_size: {rows}
input [ {{ name: "IN" data_type: TYPE_UINT8 dims: [ 32 ] }} ]
output [ {{ name: "OUT" data_type: TYPE_UINT8 dims: [ 32 ] }} ]
dynamic_batching {{ {policy} }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""

Figures = dict[str, float]


def repository(folder: Path) -> Path:
    for name, (milliseconds, rows, queue) in MODELS.items():
        (folder / name / "1").mkdir(parents=True)
        policy = f"default_queue_policy {{ max_queue_size: {queue} }}" if queue else ""
        (folder / name / "config.pbtxt").write_text(_CONFIG.format(rows=rows, policy=policy))
        (folder / name / "1" / "model.py").write_text(_CODE.format(seconds=milliseconds / 1000))
    return folder


def closed(address: str, model: str, callers: int, pause: float, seconds: float = 5.0) -> float:
    """Answers a second of callers that each ask again `pause` after an answer, without a gateway."""

    def request(number: int) -> bytes:
        asked = pb.ModelInferRequest(model_name=model, id=str(number), raw_input_contents=[bytes(32)])
        asked.inputs.add(name="IN", datatype="UINT8", shape=SHAPE)
        return bytes(asked.SerializeToString())

    async def run() -> float:
        loop = asyncio.get_running_loop()
        return sum(await asyncio.gather(*(loop.run_in_executor(None, caller, n) for n in range(callers))))

    def caller(number: int) -> float:
        answers, end = 0, time.monotonic() + seconds
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while time.monotonic() < end:
                infer(request(number), timeout=TIMEOUT)
                answers += 1
                until = time.perf_counter() + pause
                while time.perf_counter() < until:  # a timer would add more than the pause
                    pass
        return answers / seconds

    return asyncio.run(run())


async def together(address: str, *loads: tuple[str, float, str], seconds: float = SECONDS) -> list[Load]:
    """Open load of several callers: model, calls a second, and the caller's name."""
    found, channels = [], []
    for model, _, caller in loads:
        load, opened = await load_on(address, TIMEOUT)
        load.model, load.shape, load.metadata = model, SHAPE, (("x-tenant", caller),)
        found.append(load)
        channels += opened
    for load in found:
        load.start = time.monotonic()
    rates = [rate for _, rate, _ in loads]
    await asyncio.gather(
        *(load.open(rate, seconds, n) for n, (load, rate) in enumerate(zip(found, rates, strict=True)))
    )
    for channel in channels:
        await channel.close()
    return found


def goodput(load: Load, seconds: float = SECONDS) -> float:
    good = sum(call.code is OK and FIRST <= call.began + call.took < seconds for call in load.calls)
    return good / (seconds - FIRST)


def overload(address: str, model: str, rate: float) -> Figures:
    (load,) = asyncio.run(together(address, (model, rate, "one")))
    return {
        "answers a second": goodput(load),
        "p50, ms": load.quantile(0.5, since=FIRST),
        "p99, ms": load.quantile(0.99, since=FIRST),
        "p99 of refusals, ms": load.quantile(0.99, ok=False, since=FIRST),
    }


def fairness(address: str, model: str) -> Figures:
    """One caller sends ten times what the other does, who sends less than half of what can be answered."""
    big, small = asyncio.run(together(address, (model, 150.0, "big"), (model, 15.0, "small"), seconds=2 * SECONDS))
    shares = [goodput(load, 2 * SECONDS) for load in (big, small)]
    return {
        "answers a second, big": shares[0],
        "answers a second, small": shares[1],
        "answered of the small one's, %": 100 - small.failed(FIRST),
        "p50 of the small one, ms": small.quantile(0.5, since=FIRST),
        "p99 of the small one, ms": small.quantile(0.99, since=FIRST),
        "p99 of the big one, ms": big.quantile(0.99, since=FIRST),
    }


def start(work: Path, ended: ExitStack) -> tuple[Child, Child]:
    """A Triton, and a gateway before it with `endless` limited to 3 calls in flight."""
    ports = Ports()
    triton = ended.enter_context(
        gateways.triton(repository(work / "models"), work, (ports.take(), ports.take(), ports.take()))
    )
    until_ready(triton.address, list(MODELS))
    variants = {name: {"upstream": "triton", "model": name} for name in MODELS}
    variants["endless"] |= {"limit": 3}  # type: ignore[dict-item]
    config = {
        "upstreams": {"triton": {"endpoints": [triton.address]}},
        "models": {name: {"variants": {"only": variant}} for name, variant in variants.items()},
        "admission": {"caller": "x-tenant"},
        "telemetry": {"access_log": {"destination": "none"}},
    }
    front = ended.enter_context(gateways.gateway(config, "gateway", work, (ports.take(), ports.take())))
    until_ready(front.address, list(MODELS))
    return triton, front


def measured(triton: Child, front: Child) -> Iterator[tuple[str, Figures]]:
    """One round."""
    yield "without a bound, 3 direct callers", {"answers a second": closed(triton.address, "endless", 3, 0.0)}
    for pause in PAUSES:
        what = f"queue of 8, 1 direct caller, {1000 * pause:g} ms between its calls"
        yield what, {"answers a second": closed(triton.address, "bounded", 1, pause)}
    yield "queue of 8, 5 times the load, `auto`", overload(front.address, "bounded", 250.0)
    yield "without a bound, 5 times the load, `limit: 3`", overload(front.address, "endless", 250.0)
    yield "batches of 4, queue of 8, 5 times the load, `auto`", overload(front.address, "batched", 500.0)
    yield "a big and a small caller, queue of 8, `auto`", fairness(front.address, "bounded")
    yield "a big and a small caller, no bound, `limit: 3`", fairness(front.address, "endless")


def cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.overload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that what was started is ended
    found: dict[tuple[str, str], list[float]] = {}
    try:
        with tempfile.TemporaryDirectory() as work, ExitStack() as ended:
            triton, front = start(Path(work), ended)
            for number in range(arguments.rounds):
                for what, figures in measured(triton, front):
                    load = os.getloadavg()[0]
                    told = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
                    print(f"round {number + 1}  {what}: {told} (load average {load:.1f})", flush=True)
                    for name, value in figures.items():
                        found.setdefault((what, name), []).append(value)
    except (NotStarted, FetchFailed) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    print("", "| what | figure | |", "| --- | --- | ---: |", sep="\n")
    for (what, name), values in found.items():
        print(f"| {what} | {name} | {cell(values)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
