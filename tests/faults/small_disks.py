"""A disk of a few MiB, which a test can fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def why_not(folder: Path) -> str:
    """Why there can be none on this machine; "" if there can."""
    if os.geteuid() != 0:
        return "needs root, to mount a tmpfs"
    made = subprocess.run(_mount(folder, 1), capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no tmpfs can be mounted: {made.stderr.strip()}"
    subprocess.run(["umount", str(folder)], check=True)
    return ""


def _mount(folder: Path, mebibytes: int) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]


@dataclass
class SmallDisk:
    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        """Not a byte more can be written."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65_536, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def make_room(self) -> None:
        self._filler.unlink()


@contextlib.contextmanager
def small_disk(mebibytes: int) -> Iterator[SmallDisk]:
    """Its path is short, for sockets in it."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(_mount(folder, mebibytes), check=True)
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
