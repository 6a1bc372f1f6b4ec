"""How much may be collected follows the memory that the process has."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.forward.memory import LEAST_COLLECTED, MOST_COLLECTED, default_collected_bytes, memory_limit

MiB = 1 << 20


def laid_out(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The two places that are read."""
    for name, text in files.items():
        file = folder / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (folder / "own").write_text(own)
    return folder / "cgroup", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "268435456"}, 256 * MiB),
        ("0::/a/b\n", {"a/memory.max": "134217728", "a/b/memory.max": "max"}, 128 * MiB),
        ("0::/not/seen/from/inside\n", {"memory.max": "67108864"}, 64 * MiB),
        ("5:cpu:/\n4:memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": "67108864"}, 64 * MiB),
    ],
    ids=["container", "a group above", "container with host's path", "version 1"],
)
def test_the_containers_limit_is_found(own: str, files: dict[str, str], limit: int, tmp_path: Path) -> None:
    assert memory_limit(*laid_out(tmp_path, own, files)) == limit


@pytest.mark.parametrize("files", [{}, {"memory.max": "max"}], ids=["nothing", "no limit"])
def test_without_a_limit_it_is_the_hosts_memory(files: dict[str, str], tmp_path: Path) -> None:
    cgroups, own = laid_out(tmp_path, "0::/\n", files)
    assert memory_limit(cgroups, own) == memory_limit(tmp_path / "none", tmp_path / "none") > 64 * MiB


@pytest.mark.parametrize(
    ("memory", "collected"),
    [(32 * MiB, LEAST_COLLECTED), (1024 * MiB, 256 * MiB), (2048 * MiB, MOST_COLLECTED), (4096 * MiB, MOST_COLLECTED)],
)
def test_a_quarter_is_for_what_is_collected(memory: int, collected: int, tmp_path: Path) -> None:
    found = default_collected_bytes(*laid_out(tmp_path, "0::/\n", {"memory.max": str(memory)}))
    assert found == min(collected, default_collected_bytes(tmp_path / "none", tmp_path / "none"))
