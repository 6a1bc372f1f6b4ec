"""Telemetry: the log of the process on stderr. A thread writes it: a pipe that nobody reads would stop the event
loop. Whoever logs a URL, libraries too, its credentials are not in the log."""

from __future__ import annotations

import logging
import os
from typing import Final

from gateway.errors import without_credentials
from gateway.telemetry.access_log import LineWriter

_STDERR: Final = 2
_QUEUED_LINES: Final = 2000  # fewer than in the access log, as stacks make them longer
_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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

    def __init__(self, descriptor: int = _STDERR, limit: int = _QUEUED_LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT))
        self._writer = LineWriter(Descriptor(descriptor), limit, what="this log", gap=_gap).__enter__()
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


def log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), handlers=[QueuedHandler()])
