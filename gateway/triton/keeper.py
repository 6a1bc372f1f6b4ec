"""Runs a server for as long as its parent lives and wants it, and removes everything that the server leaves.

    python keeper.py SHM_PREFIX FOLDER COMMAND…

A process of its own between the gateway and its local Triton, because whoever is killed cannot clean up any more. It
is run by its path and knows only the standard library, so it starts in milliseconds.

stdin:   the lifeline. Its end means that the parent is gone or wants the server dead at once.
stdout:  one line, the server's process id.
stderr:  goes to the server as its stdout and stderr.
SIGTERM, SIGINT: passed on to the server as SIGTERM.
exit:    the server's status, 128 + n if signal n ended it; by then its whole process group is gone, and so is every
         shared memory region whose name begins with SHM_PREFIX, the FOLDER, and what Triton's Python backend left.

FOLDER is the server's current directory, from which its stubs import, and the one for its temporary files.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_LOOK = 1.0  # seconds between looks at who our parent is, should some process have inherited the lifeline
_REAP = 5.0  # seconds that killed processes get to vanish


def main(arguments: list[str]) -> int:
    prefix, folder, *command = arguments
    began = time.time()
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server come to us instead of to init
    with _Signals() as signals:
        server = _start(command, folder, prctl)
        os.write(sys.stdout.fileno(), f"{server.pid}\n".encode())
        try:
            _watch(server, signals)
        finally:
            status = _end(server)
            remove_leftovers(prefix, folder, began)
    return status if status >= 0 else 128 - status


def remove_leftovers(prefix: str, folder: str, began: float) -> None:
    """What a dead server leaves: the shared memory whose names begin with `prefix`, its folder, its backend's folders.

    began:  Unix time before which it made nothing.
    """
    for region in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108  # where Linux keeps them; shm_overview(7)
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    _remove_environments(began)


def _remove_environments(began: float) -> None:
    """Unlink the empty folders that no server can own which still runs.

    Triton's Python backend makes one where no variable leads it elsewhere, and forgets it when it is killed.
    source: python_backend, pb_env.cc, PythonEnvironmentManager.
    """
    others = list(_starts_of_others())
    for folder in Path("/tmp").glob("python_env_??????"):  # noqa: S108
        with suppress(OSError):  # the folder is not empty, of another user, or gone
            made = folder.stat()
            late = [start for start in others if start <= made.st_mtime]
            if made.st_uid == os.geteuid() and made.st_mtime >= began and not late:
                folder.rmdir()


def _starts_of_others() -> Iterator[float]:
    """When the processes began that have Triton's Python backend loaded; Unix time, some 10 ms too early."""
    ticks = os.sysconf("SC_CLK_TCK")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process is of another user, or has ended
            if "/libtriton_python.so" in (process / "maps").read_text():
                since_boot = int((process / "stat").read_text().rpartition(")")[2].split()[19]) / ticks
                yield time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot - 1 / ticks


class _Signals:
    """Turns signals into bytes on a pipe, to be waited for together with the lifeline."""

    def __enter__(self) -> _Signals:
        self.reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)

    def arrived(self) -> bytes:
        return os.read(self.reader, 1024)


def _start(command: list[str], folder: str, prctl: Callable[[int, int], int]) -> subprocess.Popen[bytes]:
    keeper = os.getpid()

    def die_with_the_keeper() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # the parent died before the line above
            os._exit(1)

    return subprocess.Popen(  # noqa: S603  # the command is the gateway's
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        stderr=sys.stderr.fileno(),
        cwd=folder,
        env={**os.environ, "TMPDIR": folder},
        start_new_session=True,
        preexec_fn=die_with_the_keeper,  # noqa: PLW1509  # this process has one thread
    )


def _watch(server: subprocess.Popen[bytes], signals: _Signals) -> None:
    """Return when the server has ended or is to be ended."""
    parent = os.getppid()
    lifeline = sys.stdin.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(lifeline, selectors.EVENT_READ)
        selector.register(signals.reader, selectors.EVENT_READ)
        while server.poll() is None:
            ready = [key.fd for key, _ in selector.select(_LOOK)]
            if (lifeline in ready and not os.read(lifeline, 1024)) or os.getppid() != parent:
                return
            if signals.reader in ready and set(signals.arrived()) & {signal.SIGTERM, signal.SIGINT}:
                server.terminate()


def _end(server: subprocess.Popen[bytes]) -> int:
    """Kill what is left of the server's group and of its orphans, and wait until nothing is left."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    status = server.wait()
    give_up = time.monotonic() + _REAP
    while time.monotonic() < give_up:
        for orphan in _children():
            os.kill(orphan, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
        except ChildProcessError:
            break
    return status


def _children() -> Iterator[int]:
    with suppress(OSError):  # a kernel without CONFIG_PROC_CHILDREN
        yield from map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
