"""How much memory this process may use: the container's limit if there is one, else what the host has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

MiB: Final = 1 << 20
MOST_COLLECTED: Final = 512 * MiB  # two of the largest messages that callers may send, by default
LEAST_COLLECTED: Final = 16 * MiB
_SHARE: Final = 4  # of the memory: what is collected may be there twice for a moment, and models' arrays come on top

_CGROUPS: Final = Path("/sys/fs/cgroup")


def default_collected_bytes(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """For messages that are collected whole. Read once, at the start: a limit that changes later is not noticed."""
    return max(LEAST_COLLECTED, min(memory_limit(cgroups, own) // _SHARE, MOST_COLLECTED))


def memory_limit(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes. cgroups: where they are mounted; own: the file that names this process's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host, *_limits(cgroups, own)])


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    """Those of all groups that this process is in, of version 2 and 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        group = PurePosixPath(path)
        for each in (group, *group.parents):
            try:
                limit = (root / str(each).lstrip("/") / file).read_text().strip()
            except OSError:
                continue  # a container sees its own group as the root
            if limit.isdigit():
                yield int(limit)
