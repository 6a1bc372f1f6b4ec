"""The real command in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from traffic import until

_SERVING = re.compile(r"(?:serving gRPC on|\d+ workers on) (\S+), admin on (\S+)")


class Command:
    """`inference-gateway ARGUMENTS` while it runs, and what it has written."""

    def __init__(self, process: asyncio.subprocess.Process, output: Path, errors: Path) -> None:
        self.process = process
        self._output = output
        self._errors = errors

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def wait(self, within: float = 120) -> int:
        """Its exit code."""
        return await asyncio.wait_for(self.process.wait(), within)

    async def until_said(self, what: str, within: float = 200) -> re.Match[str]:
        """Wait until a regular expression is found in what it has written, on either stream."""
        pattern = re.compile(what)

        def found() -> re.Match[str] | None:
            return pattern.search(self.output) or pattern.search(self.errors)

        def has_said() -> bool:
            assert found() or self.process.returncode is None, f"it ended with {self.process.returncode}: {self.errors}"
            return found() is not None

        await until(has_said, within, f"'{what}'", lambda: self.output + self.errors)
        match = found()
        assert match
        return match

    async def until_serving(self) -> tuple[str, str]:
        """Wait until it serves; answers its gRPC and its admin address."""
        match = await self.until_said(_SERVING.pattern)
        return match[1], match[2]


_numbers = itertools.count()


@contextlib.asynccontextmanager
async def command(
    *arguments: str,
    folder: Path,
    environ: Mapping[str, str] | None = None,
    group: bool = False,
    output: int | None = None,
    start: Sequence[str] = ("-m", "gateway"),
    cwd: Path | None = None,
    descriptors: int | tuple[int, int] | None = None,
) -> AsyncIterator[Command]:
    """Start the command; kill it at the end if it still runs.

    start:   what Python is given before the arguments.
    cwd:     the directory that it is started in.
    descriptors:  how many files it may open; or a soft and a hard limit.

    folder:  where its output goes.
    output:  a file descriptor for its output instead of a file.
    group:   in a session of its own, so that a test can signal it as a terminal does: all its processes at once.
    """
    number = next(_numbers)
    written, errors = folder / f"{number}.out", folder / f"{number}.err"
    with written.open("wb") as out, errors.open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*start, *arguments),
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out if output is None else output,
            stderr=err,
            env={**os.environ, **(environ or {})},
            start_new_session=group,
            preexec_fn=None if descriptors is None else functools.partial(_limit, descriptors),
        )
    try:
        yield Command(process, written, errors)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _limit(descriptors: int | tuple[int, int]) -> None:
    limits = (descriptors, descriptors) if isinstance(descriptors, int) else descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def run(*arguments: str, folder: Path, environ: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that ends by itself."""
    async with command(*arguments, folder=folder, environ=environ) as running:
        code = await running.wait()
        return code, running.output, running.errors


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_PORTS = itertools.cycle(random.sample(range(20_000 + _WORKER, 32_768, 8), 12_768 // 8))


def free_address() -> str:
    """A loopback address that nobody listens on, for a server that is started later.

    Outgoing connections get higher ports, the tests' other workers have ports of their own, and one that was given is
    not given again soon: so nobody takes it meanwhile.
    """
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"


def free_port() -> int:
    """That of a `free_address`."""
    return int(free_address().rpartition(":")[2])


def children(pid: int) -> Sequence[int]:
    """The processes that it has started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    found = list(children(pid))
    return found + [below for child in found for below in descendants(child)]


def is_running(pid: int) -> bool:
    """False for one that is gone or that only its parent still remembers."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
