"""perf_analyzer, NVIDIA's load generator: one run of it against one address, and what it found.

source: triton-inference-server/perf_analyzer, docs/cli.md. It is taken from PERF_ANALYZER or from PATH.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tritonclient.grpc import InferenceServerClient

from perf.children import HUNG, run_bounded

_WINDOWS = 3  # perf_analyzer's own least
_ALWAYS_STABLE = "999"  # per cent: several short runs in turn say more than one run that waits for calm
_PATIENCE = 10.0  # seconds that a run may take beyond thrice its time
_POLL = 0.1  # seconds
_STRETCHED = 1.2  # perf_analyzer's windows are longer than it is told, by this much
_LATE = re.compile(r"([\d.]+)% of the requests were delayed")  # said only if they are more than 1 %
_TOO_LATE = 0.25  # the share above which a run says more of perf_analyzer than of what it calls


class LoadFailed(Exception):
    """perf_analyzer is missing, or ended without a result; the text has its last words."""


class _Hung(LoadFailed):
    """It did not end."""


@dataclass(frozen=True, slots=True)
class Load:
    """What perf_analyzer is to do. It waits for each answer before it sends the next request (closed loop), or not.

    concurrency:    requests in flight at once; with `rate`, threads that send.
    rate:           requests per second, at random times (Poisson; the same in every run), however many are unanswered:
                    open loop. Latency counts from when a request was sent, so it must be sent on time: see `late`.
    length:         how many times as long as other loads.
    per_connection: callers that share one connection; perf_analyzer's own default is 6.
    shape:          of the input `x`, if the model leaves it open.
    stream:         all of them on one ModelStreamInfer.
    requests:       send so many, instead of sending for a time. For large messages, of which perf_analyzer in its
                    windows keeps every one: 16 MiB at 8 clients then end it for want of memory.
    """

    concurrency: int
    shape: int | None = None
    stream: bool = False
    requests: int | None = None
    per_connection: int = 6
    rate: float | None = None
    length: int = 1


@dataclass(frozen=True, slots=True)
class Found:
    """rate: answers per second. p50, p99: µs. served: requests that Triton answered meanwhile, in all.

    client_seconds: CPU time of perf_analyzer. late: as in a Sample.
    """

    rate: float
    p50: float
    p99: float
    served: int
    client_seconds: float
    late: float


def perf_analyzer() -> str:
    """The program. raises: LoadFailed if there is none."""
    found = shutil.which(os.environ.get("PERF_ANALYZER") or "perf_analyzer")
    if found is None:
        raise LoadFailed(
            "perf_analyzer is neither on PATH nor named by PERF_ANALYZER. Where glibc is 2.38 or newer, "
            "`pip install perf-analyzer==2.60.0` has it."
        )
    return found


class Loads:
    """Runs loads, one at a time, and counts at Triton itself what was served."""

    def __init__(self, triton: str, work: Path, seconds: float) -> None:
        """triton: its gRPC address. seconds: that one run measures."""
        self._program = perf_analyzer()
        self._triton = InferenceServerClient(triton)
        self._work = work
        self._seconds = seconds

    def run(self, load: Load, address: str, model: str, count: Callable[[], int] | None = None) -> Found:
        """Once more if perf_analyzer does not end, which it does now and then, also against Triton itself.

        count: how many requests were served so far, if it is not Triton that serves them.
        :raises LoadFailed: if there is no result, as when a request fails, or if it is not to be believed.
        """
        try:
            return self._run(load, address, model, count or self._count)
        except _Hung:
            return self._run(load, address, model, count or self._count)

    def _run(self, load: Load, address: str, model: str, count: Callable[[], int]) -> Found:
        table, log = self._work / "perf_analyzer.csv", self._work / "perf_analyzer.log"
        table.unlink(missing_ok=True)
        before = count()
        rates = _Rate(count) if load.requests else None
        with log.open("wb") as out:
            status, cpu = run_bounded(
                [self._program, *self._options(load, address, model, table)],
                out,
                environment={"TRITON_CLIENT_GRPC_CHANNEL_MAX_SHARE_COUNT": str(load.per_connection)},
                seconds=3 * load.length * self._seconds + _PATIENCE,
            )
        rate = rates.stop() if rates else None
        told = log.read_text(errors="replace")
        if status != 0 or not table.exists():
            words = " / ".join(told.split("\n")[-6:]).strip(" /")
            kind = _Hung if status == HUNG else LoadFailed
            raise kind(f"perf_analyzer ended with {status} against {address}: {words}")
        with table.open() as file:
            row = next(csv.DictReader(file))
        found = Found(
            rate=rate or float(row["Inferences/Second"]),
            p50=float(row["p50 latency"]),
            p99=float(row["p99 latency"]),
            served=count() - before,
            client_seconds=cpu,
            late=late(told),
        )
        believe(found, 0.0 if rates else load.length * self._seconds * _STRETCHED)
        return found

    def _options(self, load: Load, address: str, model: str, table: Path) -> list[str]:
        window = str(int(1000 * load.length * self._seconds / _WINDOWS))
        options = ["-i", "grpc", "-u", address, "-m", model, "-f", str(table)]
        if load.rate is None:
            options += ["--concurrency-range", f"{load.concurrency}:{load.concurrency}"]
        else:
            options += ["--request-rate-range", f"{load.rate:.0f}", "--request-distribution", "poisson"]
            options += ["--async", "--max-threads", str(load.concurrency)]
        options += ["-H", "x-user-id:user-7"]  # the sticky key; the peers get it as well
        options += ["-s", _ALWAYS_STABLE]
        options += ["--request-count", str(load.requests)] if load.requests else ["-p", window, "-r", str(_WINDOWS)]
        options += ["--shape", f"x:{load.shape}"] if load.shape else []
        options += ["--async", "--streaming", "--max-threads", "1"] if load.stream else []
        return options

    def _count(self) -> int:
        """Rows that Triton has answered since its start. Every request here has one; merged ones are several rows."""
        told = self._triton.get_inference_statistics(as_json=True)
        return sum(int(each.get("inference_count", 0)) for each in told["model_stats"])


def late(log: str) -> float:
    """The share of an open loop's requests that left more than a millisecond late, by perf_analyzer's own words."""
    said = _LATE.search(log)
    return float(said[1]) / 100 if said else 0.0


def believe(found: Found, seconds: float) -> None:
    """seconds: for which perf_analyzer took its rate.

    :raises LoadFailed: if Triton served fewer rows than there were answers, or if the rate asked for was not sent.
    """
    if found.served < 0.9 * found.rate * seconds:
        answers = f"{found.rate:,.0f} answers/s for {seconds:g} s"
        raise LoadFailed(f"perf_analyzer counted {answers}, but it served only {found.served:,} rows")
    if found.late > _TOO_LATE:
        raise LoadFailed(f"perf_analyzer could not send as it should: {found.late:.0%} of the requests left late")


class _Rate:
    """Looks at a count in a thread, from now on, and tells its slope where it rose.

    With `requests`, perf_analyzer divides by a time in which it also makes and frees its buffers.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._seen: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_POLL):
            self._seen.append((time.monotonic(), self._count()))

    def stop(self) -> float | None:
        self._over.set()
        self._thread.join()
        return slope(self._seen)


def slope(seen: list[tuple[float, int]]) -> float | None:
    """The rate of a count between the first and the last look that found it changed; None if that is too little."""
    changed = [now for last, now in pairwise(seen) if now[1] != last[1]]
    if len(changed) < 2:
        return None
    (first_at, first), (last_at, last) = changed[0], changed[-1]
    return (last - first) / (last_at - first_at)
