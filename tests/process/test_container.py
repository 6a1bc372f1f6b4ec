"""The memory that a process may use is the smallest limit above it, in either version of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.process.container import Memory, MemoryGauge, memory_limit

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


def given(folder: Path, groups: str, files: dict[str, str]) -> None:
    (folder / "self").write_text(groups)
    for name, content in files.items():
        file = folder / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.mark.parametrize(("groups", "files", "mib"), CASES.values(), ids=CASES)
def test_the_smallest_limit_counts(groups: str, files: dict[str, str], mib: int | None, tmp_path: Path) -> None:
    given(tmp_path, groups, files)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = physical if mib is None else min(physical, mib * MIB)
    assert memory_limit(tmp_path / "cgroup", tmp_path / "self") == expected


USED = {
    "version 2": (
        "0::/\n",
        {
            "memory.max": "1000",
            "memory.current": "700\n",
            "memory.stat": "anon 500\nactive_file 3\ninactive_file 150\n",
        },
        Memory(550, 1000),
    ),
    "version 2, the group above is the tighter one": (
        "0::/a/b\n",
        {"a/memory.max": "1000", "a/memory.current": "10", "a/memory.stat": "", "a/b/memory.max": "2000"},
        Memory(10, 1000),
    ),
    "version 1": (
        "5:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": "1000",
            "memory/a/memory.usage_in_bytes": "900",
            "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
        },
        Memory(800, 1000),
    ),
}


@pytest.mark.parametrize(("groups", "files", "expected"), USED.values(), ids=USED)
def test_cache_that_can_be_given_up_is_not_used(
    groups: str, files: dict[str, str], expected: Memory, tmp_path: Path
) -> None:
    given(tmp_path, groups, files)
    assert MemoryGauge(1, tmp_path / "cgroup", tmp_path / "self").read() == expected


def test_without_a_limit_a_process_is_held_to_its_share_of_the_machine(tmp_path: Path) -> None:
    given(tmp_path, "0::/\n", {"memory.max": "max"})
    memory = MemoryGauge(4, tmp_path / "cgroup", tmp_path / "self").read()
    assert memory.limit == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    assert 1 * MIB < memory.used < memory.limit
