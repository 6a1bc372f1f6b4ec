"""Telemetry: the numbers of several processes in files of one directory, prometheus_client's multiprocess mode.

Depends on prometheus_client alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import Metric, multiprocess, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.registry import Collector

TOTALS_SUFFIX: Final = ".totals"
"""Of the files beside prometheus_client's in which each worker counts its pipelines' requests: `pipeline_totals`."""


@dataclass(frozen=True, slots=True)
class SharedDirectory:
    """Where the workers of one pod keep their numbers, best in memory (tmpfs).

    worker: distinct among the processes alive now, without "_" or "/". A worker that replaces a dead one takes over its
            name and goes on counting in its files, so neither the files nor the sums grow with restarts.
    """

    path: Path
    worker: str


def prepare_directory(path: Path) -> None:
    """Make the shared directory, empty of what an earlier run left. For the supervisor, before it starts workers."""
    path.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.db", f"*{TOTALS_SUFFIX}"):
        for file in path.glob(pattern):
            file.unlink()


def worker_ended(shared: SharedDirectory) -> None:
    """Forget the gauges of a worker that is gone; what it counted stays. For the supervisor, when it sees the end."""
    multiprocess.mark_process_dead(shared.worker, str(shared.path))  # type: ignore[no-untyped-call]


class SharedValues(Collector):
    """The numbers of all workers; a series that one of them gave up as not a number is none."""

    def __init__(self, path: Path) -> None:
        self._all = multiprocess.MultiProcessCollector(None, str(path))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        for family in self._all.collect():  # type: ignore[no-untyped-call]
            family.samples = [sample for sample in family.samples if not math.isnan(sample.value)]
            yield family


_shared: SharedDirectory | None = None  # what this process's storage is bound to; prometheus_client has one per process


def keep_values_in(shared: SharedDirectory) -> None:
    """Switch prometheus_client to shared files, wherever it was imported first.

    It decides by the environment at its import, which no caller can be asked to precede; the variable is still set,
    because its files are opened by it. The worker's name stands for the process id in their names.
    """
    global _shared  # noqa: PLW0603  # one per process, as the library's own storage is
    if _shared is not None and _shared != shared:
        raise RuntimeError(f"metrics of this process are already kept in {_shared.path} as worker {_shared.worker}")
    if _shared is None:
        worker_ended(shared)  # a killed predecessor of this name may still show calls in flight
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.path)
        values.MmapedDict = _ReservedFile  # type: ignore[attr-defined]  # imported there, exported or not
        values.ValueClass = values.MultiProcessValue(lambda: shared.worker)  # type: ignore[no-untyped-call]
        _shared = shared


class _ReservedFile(MmapedDict):
    """The library's file of values, with its space reserved before it is written to.

    The library's own has holes. Writing to a hole on a full disk through a memory map raises nothing: it kills the
    process (SIGBUS), and each one that is started in its place.

    :raises OSError: from wherever a value is first used, if there is no room for it.
    """

    _FIRST_BYTES = 1 << 16  # as the library has it
    _BESIDE_KEY_BYTES = 32  # its length, padding, the value, its time

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if not read_mode:
            with open(filename, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, max(self._FIRST_BYTES, file.tell()))
        super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]

    def _init_value(self, key: str) -> None:
        size = self._capacity
        while self._used + len(key.encode()) + self._BESIDE_KEY_BYTES > size:
            size *= 2
        if size > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, size)
        super()._init_value(key)  # type: ignore[no-untyped-call]
