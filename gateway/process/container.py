"""Reads how much memory this process may use, and how much is used: of the container or machine. Depends on nothing.

Sources: cgroups(7); Documentation/admin-guide/cgroup-v2.rst (`memory.max`, `memory.current`) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
_OF_MEMORY = Path("/proc/self/statm")
_USED = {True: ("memory.current", "inactive_file"), False: ("memory.usage_in_bytes", "total_inactive_file")}
"""By version: the file with the bytes in use, and what of them memory.stat says is given up on demand."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    used: int  # what can't be had back: without file cache that nobody needs
    limit: int


def memory_limit(cgroups: Path = _CGROUPS, of_process: Path = _OF_PROCESS) -> int:
    """Bytes: the smallest limit of the process's control groups and those above them, and of the machine's memory.

    cgroups:     the folder where control groups are mounted.
    of_process:  the file that lists the groups of the process.
    """
    return min([_physical(), *(limit for limit, _, _ in _limited(cgroups, of_process))])


class MemoryGauge:
    """Tells how much memory is used, of how much: of the control group with the smallest limit, or of this process.

    A machine has other work too, so where no group has a limit this process is held to its share of the machine.
    """

    def __init__(self, processes: int = 1, cgroups: Path = _CGROUPS, of_process: Path = _OF_PROCESS) -> None:
        """processes: that serve beside each other, and share a machine without a limit. Others as of `memory_limit`."""
        physical = _physical()
        limited = [each for each in _limited(cgroups, of_process) if each[0] < physical]
        self._folder: Path | None = None
        self._is_v2 = False
        self.limit = physical // processes
        if limited:
            self.limit, self._folder, self._is_v2 = min(limited)

    def read(self) -> Memory:
        """Now. It takes some 50 µs. raises: OSError, ValueError if the system does not tell."""
        folder = self._folder
        if folder is None:
            return Memory(int(_OF_MEMORY.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"), self.limit)
        current, cache = _USED[self._is_v2]
        used = int((folder / current).read_text("ascii"))
        stat = (folder / "memory.stat").read_text("ascii")
        _, found, rest = f"\n{stat}".partition(f"\n{cache} ")
        return Memory(used - int(rest.partition("\n")[0]) if found else used, self.limit)


def give_memory_back() -> None:
    """Have the C library return freed memory to the system. It keeps what lies between pieces that are in use.

    It takes milliseconds and holds no lock of Python's: call it in a thread. Where the library is not glibc nothing is
    done.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limited(cgroups: Path, of_process: Path) -> Iterator[tuple[int, Path, bool]]:
    """Every limit that is set, its group's folder, and whether that is of version 2.

    In a container its own group is mounted as the root; outside, groups have paths.
    """
    for group, name in _groups(of_process):
        root, file = (cgroups, "memory.max") if not name else (cgroups / "memory", "memory.limit_in_bytes")
        folder = root / group.lstrip("/")
        for each in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # the file does not exist, or has "max"
                yield int((each / file).read_text("ascii")), each, not name
            if each == root:
                break


def _groups(of_process: Path) -> Iterator[tuple[str, str]]:
    """Paths of the process's groups, each with "memory" (version 1) or "" (version 2); lines are `id:names:path`."""
    try:
        lines = of_process.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = ["0::/", "1:memory:/"]
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names or "memory" in names.split(","):
            yield path, "memory" if names else ""
