"""Telemetry: counts of pipelines, over all workers of a pod, for ModelStatistics.

Each worker writes a file of its own in the shared directory, and reads those of all. So every worker gives the same
answer, and no count ever falls from one answer to the next.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from gateway.telemetry.shared_values import TOTALS_SUFFIX, SharedDirectory

_log = logging.getLogger(__name__)

_NUMBERS: Final = struct.Struct("<16s6q")  # the hash of a pipeline's name, and its counts


class PipelineTotals:
    """The counts of this process's pipelines, and of its fellow workers'."""

    def __init__(self, shared: SharedDirectory) -> None:
        self._folder = shared.path
        self._own = shared.path / f"{shared.worker}{TOTALS_SUFFIX}"
        self._places: dict[str, int] = {}  # offset of each pipeline in this worker's file
        self._failed = False

    def own(self, pipeline: str) -> Sequence[int]:
        """The counts of this worker, and of a dead one that it replaces; empty if there are none."""
        return next((numbers for _, numbers in _read(self._own, pipeline)), ())

    def of_all(self, pipeline: str) -> Sequence[Sequence[int]]:
        """The counts of each worker that has any."""
        files = sorted(self._folder.glob(f"*{TOTALS_SUFFIX}"))
        return [numbers for file in files for _, numbers in _read(file, pipeline)]

    def keep(self, pipeline: str, numbers: Sequence[int]) -> None:
        """Write this worker's counts. If the disk is full they are lost, and calls go on."""
        try:
            self._write(pipeline, _NUMBERS.pack(_key(pipeline), *numbers))
        except OSError:
            if not self._failed:
                _log.exception("pipelines' counts cannot be written; further failures of this are not logged")
            self._failed = True

    def _write(self, pipeline: str, record: bytes) -> None:
        file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            place = self._places.get(pipeline)
            if place is None:
                known = next((place for place, _ in _read(self._own, pipeline)), None)
                end = os.fstat(file).st_size // _NUMBERS.size * _NUMBERS.size
                place = self._places[pipeline] = end if known is None else known
            os.pwrite(file, record, place)
        finally:
            os.close(file)


def _key(pipeline: str) -> bytes:
    return sha256(pipeline.encode()).digest()[:16]


def _read(file: Path, pipeline: str) -> Iterator[tuple[int, Sequence[int]]]:
    """The offset of a pipeline's counts in a worker's file, and the counts; empty if it has none."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    wanted = _key(pipeline)
    for place in range(0, len(content) - _NUMBERS.size + 1, _NUMBERS.size):
        key, *numbers = _NUMBERS.unpack_from(content, place)
        if key == wanted:
            yield place, numbers
            return
