"""Memory cgroups for programs under test: what they use is limited as in a container; the kernel kills beyond it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup/memory")

needs_cgroup = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(_ROOT / "cgroup.procs", os.W_OK),
    reason="making a memory cgroup needs root and cgroups of version 1",
)


@dataclass(frozen=True)
class MemoryGroup:
    """One cgroup of version 1."""

    folder: Path

    @property
    def start(self) -> Sequence[str]:
        """What Python is given, before the arguments of the command, to run the gateway in this group."""
        runs = "os.execv(sys.executable, [sys.executable, '-m', 'gateway', *sys.argv[1:]])"
        return "-c", f"import os, sys; open({str(self.folder / 'cgroup.procs')!r}, 'w').write('0'); {runs}"

    def number(self, file: str) -> int:
        return int((self.folder / file).read_text())

    @property
    def kills(self) -> int:
        """Processes that the kernel has ended for want of memory."""
        found = re.search(r"^oom_kill (\d+)$", (self.folder / "memory.oom_control").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


@contextlib.contextmanager
def memory_group(limit: int, within: MemoryGroup | None = None) -> Iterator[MemoryGroup]:
    """limit: bytes, without swap. within: another group, whose limit holds for both."""
    parent = within.folder if within else _ROOT
    folder = parent / f"gateway-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "memory.swappiness").write_text("0")
        yield MemoryGroup(folder)
    finally:
        for _ in range(100):  # until the kernel has seen the last process go
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)
