"""I/O: folders in the temporary directory that are removed with their owner, or later by the next owner.

Depends on nothing. An owner that is killed removes nothing; but the kernel releases its lock, by which the next owner
sees that the folder has none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "inference-gateway-"


class Scratch:
    """A folder, `path`, that exists until `close`. Making one removes folders of its kind whose owners are dead.

    lock: a file descriptor; a process that inherits it is an owner too.
    """

    def __init__(self, kind: str) -> None:
        """raises: OSError if the temporary directory can't be written to."""
        clear(kind)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=f"-{kind}"))
            self.lock = _maybe_lock(self.path, waits=True)  # for who looked at it meanwhile, and may remove it
            if self.path.exists():
                return
            self.close()  # another process removed it before it was locked

    def close(self) -> None:
        """Remove the folder. It may be called more than once."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def clear(kind: str) -> None:
    """Remove the folders of a kind whose owners are dead."""
    for path in left_over(kind):
        shutil.rmtree(path, ignore_errors=True)


def left_over(kind: str) -> Iterator[Path]:
    """The folders of a kind whose owners are dead. Each is locked until the next one is asked for."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-{kind}"):
        lock = _maybe_lock(path)
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                yield path
        finally:
            os.close(lock)


def _maybe_lock(path: Path, waits: bool = False) -> int | None:
    """A descriptor with the lock of a folder; None if the folder is gone, of another user, or locked.

    waits: until it is not locked any more.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
