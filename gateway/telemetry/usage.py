"""Telemetry: who used how much of which model: numbers for metrics, and a log that billing can read.

The log has a line for each caller and model that had calls in an interval, in files as `ring` keeps them: whole lines
are appended, and nothing is changed. Each line has an id, so that whoever reads one twice can tell. A worker that is
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

from gateway.forwarding.metadata import REPLAYED
from gateway.hooks import CallHistory, NoListener, UsageNow
from gateway.quotas import OTHERS, Quotas
from gateway.status import OK, Code
from gateway.telemetry.ending import finish
from gateway.telemetry.ring import Ring, RingSettings

_log = logging.getLogger(__name__)

_MOST_PAIRS: Final = 20_000  # callers times models in one interval; further callers are counted together, by model
_MOST_SERIES: Final = 5_000  # of metrics; further ones are counted together
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


class _Used:
    """Of one caller and model."""

    __slots__ = ("failed", "refused", "request_bytes", "requests", "response_bytes", "rows", "seconds")

    def __init__(self) -> None:
        self.requests = 0  # answered
        self.failed = 0
        self.refused = 0  # by a quota
        self.rows = 0
        self.request_bytes = 0
        self.response_bytes = 0
        self.seconds = 0.0  # of attempts at upstreams

    def add(self, call: CallHistory) -> None:
        for attempt, outcome in zip(call.attempts, call.outcomes):  # noqa: B905  # the last may have no outcome
            self.seconds += outcome.at - attempt.at
        end = call.end
        if end.code is OK:
            self.requests += 1
            self.rows += call.start.rows
            self.request_bytes += end.request_bytes
            self.response_bytes += end.response_bytes
        elif end.code is Code.RESOURCE_EXHAUSTED and end.callers_fault:
            self.refused += 1
        else:
            self.failed += 1


class Usage(NoListener):
    """Counts, and between enter and exit writes the log, if there is to be one."""

    def __init__(
        self, log: UsageLog | None, quotas: Quotas, worker: str, clock: Callable[[], float] = time.time
    ) -> None:
        """
        quotas:  that know a caller by its metadata.
        worker:  unique among the processes of this host.
        clock:   Unix time.
        """
        self._quotas = quotas
        self._clock = clock
        self._total: dict[tuple[str, str], _Used] = {}  # since the start, by labels
        self._interval: dict[tuple[str, str], _Used] = {}
        self._began = clock()
        self._host, self._worker = socket.gethostname(), worker
        self._writer = f"{self._host}-{os.getpid()}-{worker}"
        self._lines = 0
        self._unwritten = b""
        self._log = log
        self._ring: Ring | None = None
        if log is not None:
            settings = RingSettings("usage", "usage", log.directory, log.file_bytes, log.file_age, log.files)
            self._ring = Ring(settings, self._writer)
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Usage:
        if self._log is not None:
            self._writing = asyncio.ensure_future(self._write_often(self._log.interval))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self._writing is None or self._ring is None:
            return
        ring, writing = self._ring, self._writing
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        lines = self._taken()

        def last() -> None:
            self._write(ring, lines)
            ring.close()

        await finish(last, _LAST_SECONDS, "the last lines of the usage log")

    def call_ended(self, call: CallHistory) -> None:
        start = call.start
        if REPLAYED in start.facts.metadata:
            return
        caller, model = self._quotas.name_of(start.facts.metadata), start.model if start.known else ""
        used = self._total.get((caller, model))
        if used is None:
            used = self._series(caller, model)
        used.add(call)
        if self._log is not None:
            of_interval = self._interval.get((caller, model))
            if of_interval is None:
                key = (caller, model) if len(self._interval) < _MOST_PAIRS else (OTHERS, model)
                of_interval = self._interval.setdefault(key, _Used())
            of_interval.add(call)

    def _series(self, caller: str, model: str) -> _Used:
        """The numbers of a caller with a label of its own, at the first call; or of the others."""
        if caller and not self._quotas.is_named(caller):
            caller = OTHERS
        key = (caller, model)
        if key not in self._total and len(self._total) >= _MOST_SERIES:
            key = (OTHERS, OTHERS)
        return self._total.setdefault(key, _Used())

    def now(self) -> list[UsageNow]:
        """What was used since the start. May be asked from any thread."""
        return [
            UsageNow(*key, used.requests, used.rows, used.request_bytes, used.response_bytes, used.seconds)
            for key, used in list(self._total.items())
        ]

    async def _write_often(self, interval: float) -> None:
        """Write at whole multiples of the interval, so that the lines of all workers are of the same time."""
        assert self._ring is not None  # noqa: S101  (there is a log)
        while True:
            await asyncio.sleep(interval - self._clock() % interval)
            lines = self._taken()
            if lines or self._unwritten:
                await asyncio.shield(asyncio.to_thread(self._write, self._ring, lines))

    def _taken(self) -> bytes:
        """The lines of the interval that ends now. Only the event loop counts, so only it may do this."""
        interval, self._interval = self._interval, {}
        began, self._began = self._began, self._clock()
        period = {"from": _text(began), "until": _text(self._began), "gateway": self._host, "worker": self._worker}
        return b"".join(self._line(period, *key, used) for key, used in interval.items())

    def _line(self, period: Mapping[str, str], caller: str, model: str, used: _Used) -> bytes:
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
        if not ring.is_quiet:
            ring.write(lines, datetime.now(timezone.utc))
        if ring.is_quiet:  # it could not be written, as the ring's log says
            if len(lines) > _MOST_UNWRITTEN:
                _log.error("usage: %d bytes of lines are lost, since they could not be written for long", len(lines))
                return
            self._unwritten = lines


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds")
