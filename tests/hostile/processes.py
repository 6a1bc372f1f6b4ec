"""Servers under attack as processes of their own, what they cost, and an honest client beside the attacker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frames import END_HEADERS, END_STREAM, Answer, Pair, Peer, block, connect, data, headers, message, window

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FAST, SLEEP, STREAM, LARGE = (b"/test.Service/" + name for name in (b"Fast", b"Sleep", b"Stream", b"Large"))


def head(path: bytes, *extra: Pair, end: bool = False, stream: int = 1) -> bytes:
    """A good request's HEADERS."""
    pseudo = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"test"))
    grpc = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))
    return headers(stream, block((*pseudo, *grpc, *extra)), END_HEADERS | (END_STREAM if end else 0))


def request(path: bytes, body: bytes, *extra: Pair, stream: int = 1) -> bytes:
    """A good unary request, whole."""
    return head(path, *extra, stream=stream) + data(stream, message(body), END_STREAM)


class Served:
    """A process that serves on a port."""

    def __init__(self, process: subprocess.Popen[Any], port: int, log: Path | None = None) -> None:
        self.process = process
        self.port = port
        self._log = log

    def connect(self, buffer: int = 0) -> Peer:
        """A client that has greeted."""
        return connect(self.port, buffer=buffer).greet()

    def ask(self, path: bytes, body: bytes, *extra: Pair) -> Answer:
        """One call on a connection of its own."""
        with self.connect() as peer:
            peer.send(request(path, body, *extra))
            return peer.answer(1)

    def stats(self) -> dict[str, Any]:
        """Of a target: what it has counted; its lag since the last time."""
        told: dict[str, Any] = json.loads(self.ask(b"/test.Service/Stats", b"").body[5:])
        return told

    @property
    def last_said(self) -> str:
        """The last lines of its log, if it has one."""
        return "\n".join(self._log.read_text().splitlines()[-10:]) if self._log else ""

    @property
    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@contextmanager
def running(*command: str) -> Iterator[Served]:
    """Run a program that prints its port first."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield Served(process, int(process.stdout.readline()))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def target(**given: Any) -> Iterator[Served]:
    with running(str(HERE / "target.py"), json.dumps(given)) as served:
        yield served


CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["127.0.0.1:{port}"]}}}}
models:
  m: {{variants: {{a: {{upstream: main, model: a}}, b: {{upstream: main, model: b}}}}, split: {{a: 9, b: 1}}}}
"""


@contextmanager
def gateway(upstream: int, more: str = "", given: str = CONFIG) -> Iterator[Served]:
    """The whole product in front of one server; as `given` says, by default with the public model `m`.

    more: lines of config beside those.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder, "gateway.yaml"), Path(folder, "log")
        config.write_text(given.format(port=upstream) + more)
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
        with log.open("w") as told:
            process = subprocess.Popen(command, stdout=told, stderr=told, cwd=ROOT)
        try:
            yield Served(process, _serving_port(process, log), log)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _serving_port(process: subprocess.Popen[Any], log: Path) -> int:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"serving gRPC on \S+:(\d+)", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the gateway does not serve:\n{log.read_text()}")


class Honest:
    """Fifty calls a second on a connection of its own, for as long as the block lasts."""

    RATE = 50
    LEAST = 5  # calls, however short the block

    def __init__(self, port: int, path: bytes = FAST, body: bytes = b"honest", *extra: Pair) -> None:
        self._port = port
        self._extra = extra
        self._path = path
        self._body = body
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []  # each call took
        self.failures: list[Answer] = []

    def __enter__(self) -> Honest:
        self._peer = connect(self._port).greet()
        self._peer.send(window(0, 1 << 30))  # for the answers to all calls
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stream = 1
        with self._peer as peer:
            while not self._stop.wait(1 / self.RATE) or len(self.seconds) < self.LEAST:
                started = time.monotonic()
                peer.send(request(self._path, self._body, *self._extra, stream=stream))
                answer = peer.answer(stream)
                self.seconds.append(time.monotonic() - started)
                if answer.status != "0":
                    self.failures.append(answer)
                del peer.answers[stream]
                stream += 2

    @property
    def worst(self) -> float:
        return max(self.seconds, default=0.0)

    def held(self, worst: float = 8.0) -> bool:
        """Was every call answered well, and none starved? How soon is no test's business on a machine that may be busy:
        the bound is what no turn of the loop takes, and shorter than the attacks' own time-outs."""
        return bool(self.seconds) and not self.failures and self.worst < worst
