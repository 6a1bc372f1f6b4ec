"""Telemetry: the log of who used how much of which model, which billing can read.

It has a line for each caller and model that had calls in an interval, in files as `ring` keeps them: whole lines are
appended, and nothing is changed. Each line has an id, so that whoever reads one twice can tell. A worker that is
killed loses the interval that has not ended, and no more. What can't be written is kept and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import Final

from gateway.quotas.usage import Pair, UsageCounts, Used
from gateway.telemetry.ending import finish
from gateway.telemetry.ring import Ring, RingSettings

_log = logging.getLogger(__name__)

_TAKEN_SECONDS: Final = 1.0  # age of the metrics at most, without a log
_MOST_UNWRITTEN: Final = 64 << 20  # bytes of lines that wait for a folder that can be written to
_LAST_SECONDS: Final = 2.5  # for the last lines at the end


@dataclass(frozen=True, slots=True)
class UsageLog:
    """Where the log is, and how much of it."""

    directory: str
    interval: float  # seconds
    file_bytes: int
    file_age: float  # seconds
    files: int


class Usage:
    """Between enter and exit it takes what was counted, for metrics and for the log, if there is to be one."""

    def __init__(
        self, log: UsageLog | None, counts: UsageCounts, worker: str, clock: Callable[[], float] = time.time
    ) -> None:
        """
        worker:  unique among the processes of this host.
        clock:   Unix time.
        """
        self.counts = counts
        self._clock = clock
        self._pending: dict[Pair, Used] = {}  # of the interval, as far as it was taken
        self._began = clock()
        self._host, self._worker = socket.gethostname(), worker
        self._writer = f"{self._host}-{os.getpid()}-{worker}"
        self._lines = 0
        self._unwritten = b""
        self._interval = log.interval if log is not None else 0.0
        self._ring: Ring | None = None
        if log is not None:
            settings = RingSettings("usage", "usage", log.directory, log.file_bytes, log.file_age, log.files)
            self._ring = Ring(settings, self._writer)
        self._running: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None  # the lines of the last interval; one thread writes at a time

    async def __aenter__(self) -> Usage:
        self._running = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_SECONDS)
        self._take()
        ring = self._ring
        if ring is not None and (self._writing is None or self._writing.done()):
            lines = self._ended()

            def last() -> None:
                self._write(ring, lines)
                ring.close()

            await finish(last, _LAST_SECONDS, "the last lines of the usage log")

    async def _run(self) -> None:
        """Take often, for the metrics, and write at whole multiples of the interval, so that all workers' lines are of
        the same time."""
        due = self._due()
        while True:
            now = self._clock()
            await asyncio.sleep(min(_TAKEN_SECONDS, due - now) if self._ring is not None else _TAKEN_SECONDS)
            self._take()
            if self._ring is None or self._clock() < due:
                continue
            due = self._due()
            lines = self._ended()
            if lines or self._unwritten:
                self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, self._ring, lines))
                await asyncio.wait({self._writing})

    def _due(self) -> float:
        """When the interval ends."""
        now = self._clock()
        return now + self._interval - now % self._interval if self._interval else 0.0

    def _take(self) -> None:
        taken = self.counts.take()
        if self._ring is not None:
            for pair, used in taken.items():
                self._pending.setdefault(pair, Used()).add(used)

    def _ended(self) -> bytes:
        """The lines of the interval that ends now."""
        pending, self._pending = self._pending, {}
        began, self._began = self._began, self._clock()
        period = {"from": _text(began), "until": _text(self._began), "gateway": self._host, "worker": self._worker}
        return b"".join(self._line(period, *pair, used) for pair, used in pending.items())

    def _line(self, period: Mapping[str, str], caller: str, model: str, used: Used) -> bytes:
        self._lines += 1
        fields = {
            "id": f"{self._writer}-{self._lines}",
            **period,
            "caller": caller,
            "model": model,
            "requests": used.requests,
            "failed": used.failed,
            "refused": used.refused,
            "rows": used.rows,
            "request_bytes": used.request_bytes,
            "response_bytes": used.response_bytes,
            "upstream_seconds": round(used.seconds, 6),
        }
        return json.dumps(fields).encode() + b"\n"

    def _write(self, ring: Ring, lines: bytes) -> None:
        lines = self._unwritten + lines
        self._unwritten = b""
        if lines and not ring.is_quiet:
            ring.write(lines, datetime.now(timezone.utc))
        if ring.is_quiet:  # it could not be written, as the ring's log says
            if len(lines) > _MOST_UNWRITTEN:
                _log.error("usage: %d bytes of lines are lost, since they could not be written for long", len(lines))
                return
            self._unwritten = lines


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds")
