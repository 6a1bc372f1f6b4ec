"""Telemetry: lines kept in a ring of files, in a folder or an object store. May depend on fsspec.

Only one thread uses a ring.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import IO
from urllib.parse import quote

import fsspec

_log = logging.getLogger(__name__)

_QUIET_SECONDS = 10.0  # after a failed write, until the next one


@dataclass(frozen=True, slots=True)
class RingSettings:
    """Where the files of one model go, and how many there may be."""

    what: str  # for log lines
    model: str
    directory: str  # a folder, or a URL that fsspec knows
    file_bytes: int
    file_age: float  # seconds after which a file ends
    files: int


class Ring:
    """The files of one model: when the last one is full or old, a new one begins, and the oldest is deleted.

    All writers of a folder share one ring, since all of its files count. Only the thread uses it.
    """

    def __init__(self, settings: RingSettings, writer: str) -> None:
        """writer: unique among the processes that write to the folder."""
        self.settings = settings
        self._writer = writer
        self._name = quote(settings.model, safe="")
        self._ours = re.compile(rf"{re.escape(self._name)}-\d{{8}}T\d{{12}}Z-.*\.jsonl")
        self._file: IO[bytes] | None = None
        self._path = ""  # of the open file, on its file system
        self._written = 0
        self._opened_at = 0.0
        self._quiet_until = 0.0

    @property
    def is_quiet(self) -> bool:
        """Has a write failed some seconds ago? Then nothing is written."""
        return time.monotonic() < self._quiet_until

    def write(self, line: bytes, at: datetime) -> None:
        """Add one line. A folder that can't be written to is logged, and tried again after some seconds."""
        try:
            file = self._open_file(len(line), at)
            file.write(line)
            file.flush()
            if self._written == 0:
                self._drop_oldest()  # after the write: a file that can't grow must not cost a full one
            self._written += len(line)
        except Exception as error:  # each file system of fsspec raises errors of its own
            self._broken(error)

    def close_if_old(self) -> None:
        if time.monotonic() - self._opened_at > self.settings.file_age:
            self.close()

    def close(self) -> None:
        """Close the file; an object store shows it only then."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except Exception as error:
            self._broken(error)

    def _open_file(self, size: int, at: datetime) -> IO[bytes]:
        self.close_if_old()
        if self._file is not None and self._written + size > self.settings.file_bytes:
            self.close()
        if self._file is None:
            fs, folder = fsspec.core.url_to_fs(self.settings.directory)
            fs.makedirs(folder, exist_ok=True)
            name = f"{self._name}-{at:%Y%m%dT%H%M%S%f}Z-{self._writer}.jsonl"
            self._path = f"{folder}/{name}"
            self._file = fs.open(self._path, "wb")
            with contextlib.suppress(OSError):  # a file that is not on this host has no mode to set
                os.fchmod(self._file.fileno(), 0o600)
            self._written, self._opened_at = 0, time.monotonic()
        return self._file

    def _drop_oldest(self) -> None:
        """Delete the oldest files until there are no more than allowed."""
        fs, folder = fsspec.core.url_to_fs(self.settings.directory)
        fs.invalidate_cache(folder)
        names = sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False))
        here = {self._path.rpartition("/")[2]}  # an object store does not list an open file
        ours = sorted(here.union(name for name in names if self._ours.fullmatch(name)))
        for name in ours[: max(0, len(ours) - self.settings.files)]:
            fs.rm_file(f"{folder}/{name}")

    def _broken(self, error: Exception) -> None:
        """Close the file after a failed write, and delete it if it is empty; a later request tries again."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # closing repeats the write that failed
                file.close()
            if self._written == 0:
                with contextlib.suppress(Exception):
                    fsspec.core.url_to_fs(self.settings.directory)[0].rm_file(self._path)
        _log.error(
            "%s: nothing of %s is kept in %s for %g s: %s",
            *(self.settings.what, self.settings.model, self.settings.directory, _QUIET_SECONDS, error),
        )
        self._quiet_until = time.monotonic() + _QUIET_SECONDS
