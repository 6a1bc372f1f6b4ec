"""The memory that a process may use is the smallest limit above it, in either version of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.container import memory_limit

MIB = 1 << 20

CASES = {
    "version 2, in a container": ("0::/\n", {"memory.max": f"{512 * MIB}\n"}, 512),
    "version 2, a group above": (
        "0::/a/b\n",
        {"a/memory.max": str(256 * MIB), "a/b/memory.max": "max\n", "memory.max": str(900 * MIB)},
        256,
    ),
    "version 1": ("7:cpu:/x\n5:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(300 * MIB)}, 300),
    "version 1, mounted as the root": ("5:cpu,memory:/docker/1\n", {"memory/memory.limit_in_bytes": str(64 * MIB)}, 64),
    "version 1, no limit": ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    "none": ("0::/\n", {}, None),
    "damaged": ("no such line\n", {"memory.max": "many"}, None),
}


@pytest.mark.parametrize(("groups", "files", "mib"), CASES.values(), ids=CASES)
def test_the_smallest_limit_counts(groups: str, files: dict[str, str], mib: int | None, tmp_path: Path) -> None:
    (tmp_path / "self").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = physical if mib is None else min(physical, mib * MIB)
    assert memory_limit(tmp_path / "cgroup", tmp_path / "self") == expected
