"""The process' own log: a stream that nobody reads costs lines and stops nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from gateway.telemetry.process_log import QueuedHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading and its writing end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def logger(handler: logging.Handler) -> logging.Logger:
    made = logging.Logger("room", logging.INFO)
    made.addHandler(handler)
    return made


def test_lines_are_written_in_order_by_the_end(pipe: tuple[int, int]) -> None:
    handler = QueuedHandler(pipe[1])
    for number in range(50):
        logger(handler).info("line %d", number)
    handler.close()
    handler.close()
    lines = os.read(pipe[0], 65536).decode().splitlines()
    assert [line.partition("INFO ")[2] for line in lines] == [f"room: line {number}" for number in range(50)]


def test_a_line_says_when_in_utc_who_and_about_which_request(pipe: tuple[int, int]) -> None:
    """Whatever an error or an id has in it, JSON is one line."""
    for as_json in (False, True):
        handler = QueuedHandler(pipe[1], as_json=as_json)
        log = logger(handler)
        try:
            raise ValueError("two\nlines of redis://u:secret@h/0")
        except ValueError:
            log.exception("a\nb", extra={"request_id": "r\n7"})
        log.warning("plain")
        handler.close()
        text = os.read(pipe[0], 65536).decode()
        assert "secret" not in text
        if not as_json:
            first, *_, last = text.splitlines()
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \[0\] ERROR room: a", first)
            assert "(request 'r\\n7')" in text
            assert last.endswith("Z [0] WARNING room: plain")
            continue
        error, plain = map(json.loads, text.splitlines())
        assert (error["level"], error["worker"], error["request_id"]) == ("error", "0", "r\n7")
        assert "ValueError: two" in error["stack"]
        assert plain.keys() == {"time", "level", "logger", "worker", "message"}
        assert abs(datetime.fromisoformat(plain["time"].replace("Z", "+00:00")).timestamp() - time.time()) < 60


def test_nobody_waits_for_a_pipe_that_is_full_and_what_was_dropped_is_told(pipe: tuple[int, int]) -> None:
    handler = QueuedHandler(pipe[1], limit=100)
    for _ in range(1000):
        logger(handler).error("x" * 1000)  # far more than a pipe holds; it must not wait for a reader
    read = ""
    while "log lines were dropped" not in read:
        read += os.read(pipe[0], 1 << 20).decode()
    handler.close()


def test_a_process_whose_stderr_nobody_reads_ends_with_its_own_code(pipe: tuple[int, int]) -> None:
    program = (
        "import logging, sys\n"
        "from gateway.telemetry.process_log import log_to_stderr\n"
        "log_to_stderr('info')\n"
        "for _ in range(500): logging.error('x' * 1000)\n"
        "sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=pipe[1], timeout=60, check=False).returncode == 3
