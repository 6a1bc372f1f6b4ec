"""Telemetry: numbers of several processes, in files of one directory (prometheus_client's multiprocess mode).

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
"""Suffix of the files in which each worker counts the requests of pipelines: see `pipeline_totals`."""

NOTE_SUFFIX: Final = ".worker"
"""Suffix of the files in which each worker says what it is: see `worker_notes`."""


@dataclass(frozen=True, slots=True)
class SharedDirectory:
    """Where the workers of one pod keep their numbers; best in memory (tmpfs).

    worker: distinct among the processes alive now, without "_" or "/". A worker that replaces a dead one takes over its
            name and goes on counting in its files, so neither the files nor the sums grow with restarts.
    """

    path: Path
    worker: str


def prepare_directory(path: Path) -> None:
    """Make the shared directory, and empty it of an earlier run's files. The supervisor does so before it starts
    workers."""
    path.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.db", f"*{TOTALS_SUFFIX}", f"*{NOTE_SUFFIX}"):
        for file in path.glob(pattern):
            file.unlink()


def worker_ended(shared: SharedDirectory) -> None:
    """Forget the gauges of a worker that has ended, and its note; its counters stay. The supervisor calls this."""
    (shared.path / f"{shared.worker}{NOTE_SUFFIX}").unlink(missing_ok=True)
    multiprocess.mark_process_dead(shared.worker, str(shared.path))  # type: ignore[no-untyped-call]


class SharedValues(Collector):
    """The numbers of all workers. A series that a worker has set to NaN is left out."""

    def __init__(self, path: Path) -> None:
        self._all = multiprocess.MultiProcessCollector(None, str(path))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        for family in self._all.collect():  # type: ignore[no-untyped-call]
            family.samples = [sample for sample in family.samples if not math.isnan(sample.value)]
            yield family


_shared: SharedDirectory | None = None  # the directory that this process uses; prometheus_client allows one per process


def keep_values_in(shared: SharedDirectory) -> None:
    """Switch prometheus_client to shared files, wherever it was imported first.

    The library looks at the environment when it is imported, which may have happened already; the variable is set all
    the same, because the library opens its files by it. Their names have the worker's name in place of the process id.
    """
    global _shared  # noqa: PLW0603  # one per process, as the library's own storage is
    if _shared is not None and _shared != shared:
        raise RuntimeError(f"metrics of this process are already kept in {_shared.path} as worker {_shared.worker}")
    if _shared is None:
        worker_ended(shared)  # a killed worker of this name may still show calls in flight
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared.path)
        values.MmapedDict = _ReservedFile  # type: ignore[attr-defined]  # imported there, exported or not
        values.ValueClass = values.MultiProcessValue(lambda: shared.worker)  # type: ignore[no-untyped-call]
        _shared = shared


class _ReservedFile(MmapedDict):
    """The library's file of values, which reserves its space before it is written.

    The library's own has holes. Writing to a hole on a full disk through a memory map raises nothing: it kills the
    process (SIGBUS), and each one that is started in its place.

    :raises OSError: where a value is first used, if there is no room for it.
    """

    _FIRST_BYTES = 1 << 16  # the library's value
    _BESIDE_KEY_BYTES = 32  # length, padding, value and time beside each key

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
