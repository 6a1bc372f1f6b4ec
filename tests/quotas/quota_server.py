"""A real Valkey or Redis on a port of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import free_port

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")

needs_store = pytest.mark.skipif(
    SERVER is None, reason="neither valkey-server nor redis-server (Debian: redis-server) is here"
)


class Store:
    """Keeps its port when it is stopped and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()  # which nobody takes while it is stopped
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SERVER is not None
        plain = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder))
        self._process = subprocess.Popen([SERVER, *plain, *self._options], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.monotonic() < end, "the store does not listen"
            time.sleep(0.02)

    def pause(self) -> None:
        """It takes connections, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_store(*options: str) -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), *options)
        store.start()
        try:
            yield store
        finally:
            store.stop()
