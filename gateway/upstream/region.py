"""I/O: memory that another process on this host can open by its name, and what dead gateways left of theirs.

A region is a file in a folder in memory (`/dev/shm`). Its name can't be guessed, and its owner holds a lock on it while
it lives, so whoever gets the lock may remove it. All of its pages are allocated at once: writing to a page for which
there is no memory left would end the process (SIGBUS), where allocating it is an error that can be told.

Sources: shm_overview(7), flock(2), posix_fallocate(3).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.upstream.slots import Slots
from gateway.v2.shared_memory import RESERVED

_TRIES: Final = 100  # to make a file that no gateway, which starts at the same moment, removes as a dead one's
_STEP: Final = 64 << 20  # bytes that are allocated before it is asked again whether they are wanted
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class Region:
    """Memory with slots in it."""

    __slots__ = ("_fd", "_lock", "_map", "_path", "losses", "memory", "name", "slots")

    def __init__(self, folder: Path, size: int, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """size: bytes. is_wanted: asked now and then while it is being made.

        raises: OSError if there is no such folder, or not so much memory, or it is not wanted any more.
        """
        self.losses = 0  # of the connection, when the server was last known to know it
        self._lock = threading.Lock()  # while it is being closed
        self.name, self._fd = _locked_file(folder)
        self._path = folder / self.name
        try:
            for begin in range(0, size, _STEP):
                if not is_wanted():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                os.posix_fallocate(self._fd, begin, min(_STEP, size - begin))
            self._map = mmap.mmap(self._fd, size)
        except OSError:
            self._remove()
            raise
        self.memory = memoryview(self._map)
        self.slots = Slots(size)

    def __repr__(self) -> str:
        return f"<Region {self.slots}>"  # without its name, which nobody should learn

    def close(self) -> bool:
        """Remove it. Also from several threads, and again.

        False: its memory is still there, since a call that has not ended has a part of it.
        """
        with self._lock:
            self.memory.release()
            try:
                self._map.close()
            except BufferError:
                return False
            finally:
                self._remove()
            return True

    def _remove(self) -> None:
        """Without the file, which others find by its name, and then without its memory, unless it is mapped."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _locked_file(folder: Path) -> tuple[str, int]:
    """A new file's name, and the file. raises: OSError."""
    for _ in range(_TRIES):
        name = RESERVED + secrets.token_hex(16)
        fd = os.open(folder / name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)  # others hold it for a moment only
        if os.fstat(fd).st_nlink:
            return name, fd
        os.close(fd)  # another gateway, which starts too, took it for a dead one's before it was locked
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def sweep(folder: Path) -> int:
    """Remove regions whose gateways have died. Answers how many. raises: OSError if the folder can't be read."""
    return sum(is_abandoned(folder, path.name, _is_gone) for path in folder.glob(RESERVED + "*"))


def is_abandoned(folder: Path, name: str, and_then: Callable[[Path], bool] = lambda path: True) -> bool:
    """Has the gateway died that owned a region, or has it removed it? False for one that others may not open.

    and_then: what is done with its file while nobody else can lock it; it answers for whether that went well.
    """
    try:
        fd = os.open(folder / name, _FLAGS)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return and_then(folder / name)
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_gone(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
