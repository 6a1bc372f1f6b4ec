"""Reads how much memory this process may use: the limit of the container or of the machine. Depends on nothing.

Sources: cgroups(7); Documentation/admin-guide/cgroup-v2.rst (`memory.max`) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")


def memory_limit(cgroups: Path = _CGROUPS, of_process: Path = _OF_PROCESS) -> int:
    """Bytes: the smallest limit of the process's control groups and those above them, and of the machine's memory.

    cgroups:     the folder where control groups are mounted.
    of_process:  the file that lists the groups of the process.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits(cgroups, of_process)])


def _limits(cgroups: Path, of_process: Path) -> Iterator[int]:
    """Every limit that is set. In a container its own group is mounted as the root; outside, groups have paths."""
    for group, name in _groups(of_process):
        root, file = (cgroups, "memory.max") if not name else (cgroups / "memory", "memory.limit_in_bytes")
        folder = root / group.lstrip("/")
        for each in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # the file does not exist, or has "max"
                yield int((each / file).read_text("ascii"))
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
