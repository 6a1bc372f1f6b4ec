"""The process' own log: a stream that nobody reads costs lines and stops nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

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
