"""Processes under test: started, waited for, watched through /proc, and ended with all that they started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
HUNG = -1000  # no exit status


class NotStarted(Exception):
    """A process ended early or did not listen in time; the text has the end of its log."""


class Child:
    """A process that listens on a port of this host. `with` starts it, waits for the port, and ends it."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
        patience: float = 90.0,
    ) -> None:
        """stdout: a file descriptor, if it is not to go to the log. patience: seconds until it must listen."""
        self.port = port
        self.process: subprocess.Popen[bytes]
        self._command = [str(part) for part in command]
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._stdout = stdout
        self._patience = patience

    def __enter__(self) -> Child:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                _dying_with_us(self._command),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log if self._stdout is None else self._stdout,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C reaches the harness alone, which ends the others in order
            )
        try:
            self._until_listening()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(self.process.pid)
            self.process.wait()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _until_listening(self) -> None:
        give_up = time.monotonic() + self._patience
        while not _listens(self.port):
            ended = self.process.poll() is not None
            if ended or time.monotonic() > give_up:
                end = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
                what = "ended early" if ended else "does not listen"
                raise NotStarted(f"{self._command[0]} {what}:\n{end}")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """CPU time of the process and everything below it, so far."""
        return sum(_cpu_seconds(pid) for pid in _family(self.process.pid))

    def busy_seconds(self) -> float:
        """As `cpu_seconds`, in nanoseconds and not in hundredths of a second, and without what has ended since."""
        return sum(_busy_seconds(pid) for pid in _family(self.process.pid))

    def resident_bytes(self) -> int:
        """Memory of the process and everything below it."""
        return sum(_resident_bytes(pid) for pid in _family(self.process.pid))


def run_bounded(
    command: Sequence[str], log: IO[bytes], *, environment: Mapping[str, str], seconds: float
) -> tuple[int, float]:
    """Run a program to its end, at most `seconds` long. Answers its exit status, or HUNG, and its CPU seconds."""
    before = os.times()
    process = subprocess.Popen(
        _dying_with_us(command),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = HUNG
    finally:
        _kill_group(process.pid)
        process.wait()
    after = os.times()
    return status, after.children_user + after.children_system - before.children_user - before.children_system


class Ports:
    """Ports of this host that nobody listens on, none given twice."""

    def __init__(self) -> None:
        # Below the range that outgoing connections take theirs from.
        self._candidates = iter(range(21_000 + os.getpid() % 5_000, 32_000))

    def take(self) -> int:
        for port in self._candidates:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
        raise NotStarted("no free port between 21000 and 32000")


def _dying_with_us(command: Sequence[str]) -> list[str]:
    """So that nothing outlives a harness that is killed. source: setpriv(1), of util-linux."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--", *command] if setpriv else list(command)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _family(pid: int) -> list[int]:
    """A process and its descendants. source: proc_pid_task(5), `children`."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found.extend(int(child) for child in task.read_text().split())
            except OSError:
                continue  # the thread has just ended
    return found


def _cpu_seconds(pid: int) -> float:
    """Of the process and of its children that have ended. source: proc_pid_stat(5), fields 14 to 17."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(field) for field in fields[11:15]) / _TICKS


def _busy_seconds(pid: int) -> float:
    """Of its threads. source: the kernel's sched-stats.rst, the first field of /proc/<pid>/schedstat."""
    total = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[0])
        except OSError:
            continue  # the thread has just ended
    return total / 1e9


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0
