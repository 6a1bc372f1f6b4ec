"""Telemetry: the log of the process on stderr. A thread writes it: a pipe that nobody reads would stop the event
loop. Whoever logs a URL, libraries too, its credentials are not in the log."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from typing import Final

from gateway.errors import without_credentials
from gateway.telemetry.access_log import LineWriter

_STDERR: Final = 2
_QUEUED_LINES: Final = 2000  # fewer than in the access log, as stacks make them longer
_MOST_OF_ID: Final = 200  # characters of a caller's request id

_worker = "0"


def name_process(worker: str) -> None:
    """Say which process of the gateway this is: the number of a worker, or `supervisor`."""
    global _worker  # noqa: PLW0603  # one per process, as its log is
    _worker = worker


class TextFormatter(logging.Formatter):
    """One line: the time in UTC, the worker, level, logger and message; then the request's id, if it is about one."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_time_of(record)} [{_worker}] {record.levelname} {record.name}: {record.getMessage()}"
        request_id = _request_id(record)
        if request_id:
            text += f" (request {request_id!r})"
        stack = _stack_of(self, record)
        return f"{text}\n{stack}" if stack else text


class JsonFormatter(logging.Formatter):
    """One JSON object, whatever is in the message: a line for each record."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "worker": _worker,
            "message": without_credentials(record.getMessage()),
            "request_id": _request_id(record),
            "stack": without_credentials(_stack_of(self, record)),
        }
        return json.dumps({key: value for key, value in said.items() if value})


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _request_id(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", ""))[:_MOST_OF_ID]


def _stack_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    return "\n".join([*parts, *([formatter.formatStack(record.stack_info)] if record.stack_info else [])])


class Descriptor:
    """A file descriptor as a stream without a buffer: no lock of Python's is held while a write blocks."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, text: str) -> None:
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._number, data) :]

    def flush(self) -> None:
        """Do nothing: the stream has no buffer."""


class QueuedHandler(logging.Handler):
    """Hands formatted records to a thread, and never waits, but at most 2 s for queued records at the end."""

    def __init__(self, descriptor: int = _STDERR, limit: int = _QUEUED_LINES, *, as_json: bool = False) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter() if as_json else TextFormatter())
        gap = _gap_as_json if as_json else _gap
        self._writer = LineWriter(Descriptor(descriptor), limit, what="this log", gap=gap).__enter__()
        self._is_open = True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write_nowait(without_credentials(self.format(record)) + "\n")
        except Exception:  # a handler of `logging` reports on stderr what can't be formatted
            self.handleError(record)

    def close(self) -> None:
        """Write what is queued. `logging.shutdown` calls this at Python's end."""
        if self._is_open:
            self._is_open = False
            self._writer.__exit__(None, None, None)
        super().close()


def _gap(dropped: int) -> str:
    return f"{dropped} log lines were dropped, since this stream was not read in time\n"


def _gap_as_json(dropped: int) -> str:
    return json.dumps({"level": "warning", "worker": _worker, "message": _gap(dropped).rstrip()}) + "\n"


def log_to_stderr(level: str, form: str = "text") -> None:
    """form: "text" or "json"."""
    logging.basicConfig(level=level.upper(), handlers=[QueuedHandler(as_json=form == "json")])
