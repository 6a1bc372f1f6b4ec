"""Telemetry: what each worker of a pod says of itself: its process, and which config it runs.

Depends on prometheus_client alone. Files of values (`shared_values`) cannot take a series back, so a digest of each
past config would stay in them for ever. A note is a small file that is replaced as a whole, and goes with its worker.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from gateway.telemetry.shared_values import NOTE_SUFFIX, SharedDirectory

CONFIG_INFO: Final = "gateway_config_info"
CONFIG_INFO_HELP: Final = "How many workers run the config with this digest."


def note(shared: SharedDirectory, digest: str = "") -> None:
    """Say that this process is the worker, and which config it runs.

    :raises OSError: if the directory takes no file.
    """
    file = shared.path / f"{shared.worker}{NOTE_SUFFIX}"
    new = file.with_suffix(".new")
    new.write_text(json.dumps([os.getpid(), digest]))
    new.replace(file)


class Notes(Collector):
    """The numbers that follow from the notes of all workers: `gateway_config_info`, and `process_*` by worker."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        notes = dict(self._read())
        digests = Counter(digest for _, digest in notes.values() if digest)
        info = GaugeMetricFamily(CONFIG_INFO, CONFIG_INFO_HELP, labels=["digest"])
        for digest, workers in digests.items():
            info.add_metric([digest], workers)
        yield info
        families: dict[str, Metric] = {}
        for worker, (pid, _) in notes.items():
            for told in _of_process(pid):
                family = families.setdefault(told.name, Metric(told.name, told.documentation, told.type))
                for sample in told.samples:
                    family.add_sample(sample.name, {"worker": worker}, sample.value)
        yield from families.values()

    def _read(self) -> Iterator[tuple[str, tuple[int, str]]]:
        for file in sorted(self._path.glob(f"*{NOTE_SUFFIX}")):
            try:
                pid, digest = json.loads(file.read_text())
            except FileNotFoundError:  # it has just ended
                continue
            yield file.stem, (pid, digest)


def _of_process(pid: int) -> list[Metric]:
    """Empty if there is no such process any more."""
    return list(ProcessCollector(pid=lambda: pid, registry=None).collect())
