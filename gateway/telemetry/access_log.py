"""Telemetry: one JSON line per call that is worth one. docs/metrics.md lists the fields.

May depend on values. It never sees payloads, and of the caller's metadata it reads the `traceparent` alone, and the
name that the door has given him. Lines are written by a thread of their own, because a terminal or a pipe that is not
read must not stop the event loop.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import Final, Protocol

from gateway.access.door import CALLER
from gateway.hooks import CallHistory, NoListener
from gateway.status import OK, Code
from gateway.telemetry.w3c import trace_id_of

_log = logging.getLogger(__name__)

_TEXT_LIMIT: Final = 1000  # most characters of a text; callers choose the length of names, ids and error texts
_QUEUED_LINES: Final = 10_000  # about 4 MB; with more, nobody reads, and lines are dropped
_LINES_A_WRITE: Final = 500
_QUIET_SECONDS: Final = 60.0  # between two messages about a stream that can't be written
_REFUSALS_PER_SECOND: Final = 20  # lines; who is over his quota may try again as fast as he likes, and fill no log


@dataclass(frozen=True, slots=True)
class AccessLogSettings:
    """All errors, fallbacks and slow calls are logged, and a share of the other calls."""

    share: float = 1.0  # part of the other calls, in [0, 1]
    slow_seconds: float = 1.0  # a call that took longer is slow
    worker: str = "0"  # whose calls they are


class _PerSecond:
    """Counts what happens in the second that runs."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._second = 0
        self._taken = 0

    def take(self) -> bool:
        """May it happen once more?"""
        second = int(self._clock())
        if second != self._second:
            self._second, self._taken = second, 0
        self._taken += 1
        return self._taken <= self._most


class Lines(Protocol):
    """Takes lines. No method waits."""

    def may_write(self) -> bool:
        """Is a line taken now? If not, one has been left out, and is counted."""
        ...

    def write(self, line: str) -> None:
        """Take a line with its newline, after `may_write` has said that it may be."""
        ...

    def leave_out(self) -> None:
        """Count a line that is not written."""
        ...


class AccessLog(NoListener):
    """The listener that writes the access log."""

    def __init__(
        self,
        settings: AccessLogSettings,
        lines: Lines,
        draw: Callable[[], float] = random.random,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """draw: a number in [0, 1) for each call that only the share can choose."""
        self._settings = settings
        self._lines = lines
        self._draw = draw
        self._now = now
        self._refusals = _PerSecond(_REFUSALS_PER_SECOND, clock)

    def call_ended(self, call: CallHistory) -> None:
        because = self._reason(call)
        if not because:
            return
        end = call.end
        if end.callers_fault and end.code is Code.RESOURCE_EXHAUSTED and not self._refusals.take():
            self._lines.leave_out()
        elif self._lines.may_write():  # before the line is made, which takes as long as refusing a call
            self._lines.write(json.dumps(_fields(call, because, self._now(), self._settings.worker)) + "\n")

    def _reason(self, call: CallHistory) -> str:
        """Why the call is logged; "" if it is not."""
        if call.end.code is not OK:
            return "error"
        for attempt in call.attempts:
            if attempt.why == "fallback":
                return "fallback"
        if call.end.at - call.start.at > self._settings.slow_seconds:
            return "slow"
        share = self._settings.share
        return "share" if share >= 1.0 or (share > 0.0 and self._draw() < share) else ""


def _fields(call: CallHistory, because: str, now: datetime, worker: str) -> dict[str, str | int | float]:
    """The fields of the line, in order. JSON escapes line breaks and control characters, so the line stays one line."""
    start, end, served = call.start, call.end, call.end.served
    attempt = call.attempts[-1] if call.attempts else None
    return {
        "time": now.isoformat(timespec="milliseconds"),
        "logged": because,
        "method": start.method,
        "model": start.model[:_TEXT_LIMIT],
        "variant": served.variant if served else attempt.variant if attempt else "",
        "model_version": served.model_version if served else "",
        "endpoint": served.endpoint if served else attempt.endpoint if attempt else "",
        "attempts": len(call.attempts),
        "fallback": _why_fallback(call),
        "cache": served.reused if served else "",
        "code": end.code.name,
        "error": end.text[:_TEXT_LIMIT],
        "ms": round((end.at - start.at) * 1000, 3),
        "bytes_in": end.request_bytes,
        "bytes_out": end.response_bytes,
        "request_id": start.request_id[:_TEXT_LIMIT],
        "trace_id": trace_id_of(start.facts.metadata.get("traceparent", "")),
        "peer": start.peer,
        "caller": start.facts.metadata.get(CALLER, ""),
        "worker": worker,
    }


def _why_fallback(call: CallHistory) -> str:
    """Of a call that went to a fallback: the variant that should have answered, and why it did not."""
    for attempt in call.attempts:
        if attempt.instead_of:
            return f"{attempt.instead_of}: {attempt.reason}"
    return ""


class Stream(Protocol):
    """The stream that lines are written to."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


def gap_of(worker: str) -> Callable[[int], str]:
    """Makes the line that says how many lines of a worker were dropped."""
    return lambda dropped: json.dumps({"logged": "gap", "dropped": dropped, "worker": worker}) + "\n"


_GAP: Final = gap_of("0")


class LineWriter:
    """Writes lines to a stream in a thread. When the stream is too slow, lines are dropped, and calls never wait."""

    def __init__(
        self,
        stream: Stream,
        limit: int = _QUEUED_LINES,
        per_second: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        what: str = "access log",
        gap: Callable[[int], str] = _GAP,
        rest: float = 0.0,
    ) -> None:
        """what:       names the lines in messages about them.
        gap:        makes the line that says how many were dropped.
        per_second: most lines accepted in one second, however fast the stream is; None is no limit.
        rest:       seconds after a write in which lines wait for each other: to wake the thread for one costs more than
                    the line.
        """
        self._stream = stream
        self._limit = limit
        self._rate = None if per_second is None else _PerSecond(per_second, clock)
        self._clock = clock
        self._what = what
        self._gap = gap
        self._rest = rest
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writing: threading.Thread | None = None
        self._dropped = 0  # lines dropped since the last gap line
        self._quiet_until = 0.0

    def __enter__(self) -> LineWriter:
        self._writing = threading.Thread(target=self._run, name=self._what, daemon=True)
        self._writing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        """Write what is queued; a stream that hangs is given up after two seconds."""
        self._lines.put(None)
        if self._writing:
            self._writing.join(timeout=2.0)

    def write_nowait(self, line: str) -> None:
        if self.may_write():
            self.write(line)

    def may_write(self) -> bool:
        """As of `Lines`."""
        if self._lines.qsize() < self._limit and (self._rate is None or self._rate.take()):
            return True
        self._dropped += 1
        return False

    def write(self, line: str) -> None:
        self._lines.put(line)

    def leave_out(self) -> None:
        self._dropped += 1

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._lines.get()]
            while len(batch) < _LINES_A_WRITE and not self._lines.empty():
                batch.append(self._lines.get())
            is_open = None not in batch
            self._write_all([line for line in batch if line is not None])
            if self._rest and is_open and self._lines.empty():
                time.sleep(self._rest)

    def _write_all(self, lines: list[str]) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            lines.append(self._gap(dropped))
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            now = self._clock()
            if now >= self._quiet_until:  # a full disk takes a line now and then, so one success does not end the fault
                _log.error("%s: lines are lost while the stream can't be written: %s", self._what, error)
                self._quiet_until = now + _QUIET_SECONDS
