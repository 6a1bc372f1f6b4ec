"""What a worker keeps in memory for many idle connections, and for large requests that its upstream takes slowly."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from perf import gateways, models
from perf.bench import Miss, Say
from perf.children import Child
from perf.gateways import Config
from perf.load import perf_analyzer
from perf.report import Memory
from perf.scenarios import MIB_16
from perf.stack import Stack, System
from perf.summary import GATEWAY

IDLE = 1000
SLOW_CALLS = 64
SLOW_RATE = 8 << 20  # bytes per second that the slow upstream takes
SLOW_SECONDS = 10.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # RFC 9113 section 3.4
_SETTINGS_ACK = b"\x00\x00\x00\x04\x01\x00\x00\x00\x00"


def measure(stack: Stack, say: Say, miss: Miss) -> list[Memory]:
    """Each system by itself, freshly started, so that none shows what an earlier load has left."""
    found = []
    for kind in (_idle, _slow):
        for name in (GATEWAY, *(peer.name for peer in stack.peers)):
            try:
                each = kind(stack, name)
            except OSError as error:
                miss(f"memory of {name}: {error}")
                continue
            found.append(each)
            say(f"memory  {each.situation}: {each.system} {each.at_rest >> 20} → {each.peak >> 20} MiB")
    return found


def _start(stack: Stack, name: str, ended: ExitStack, triton: int | None = None) -> System:
    for peer in stack.peers:
        if peer.name == name:
            return stack.peer(peer, triton=triton, into=ended)
    config: Config = gateways.config(triton or stack.triton.port)
    # A probe waits behind the calls on the slow way.
    config["upstreams"]["triton"] |= {"probe_timeout": "60s", "probe_interval": "60s"}
    return stack.gateway(name, config=config, into=ended)


def _idle(stack: Stack, name: str) -> Memory:
    with ExitStack() as ended:
        system = _start(stack, name, ended)
        child = _child(system)
        at_rest = child.resident_bytes()
        connections = [ended.enter_context(_connection(child.port)) for _ in range(IDLE)]
        for connection in connections:
            _greet(connection)
        time.sleep(1.5)
        return Memory(f"{IDLE} idle connections", system.name, at_rest, child.resident_bytes())


@contextmanager
def _connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(_PREFACE)
        yield connection


def _greet(connection: socket.socket) -> None:
    """Take the server's SETTINGS and acknowledge them."""
    if not connection.recv(4096):
        raise OSError("the connection was closed")
    connection.sendall(_SETTINGS_ACK)


def _slow(stack: Stack, name: str) -> Memory:
    """The most that it had while calls were in flight; they are cut off before they end."""
    with ExitStack() as ended:
        slow = ended.enter_context(SlowWay(stack.triton.port))
        system = _start(stack, name, ended, slow.port)
        child = _child(system)
        at_rest = child.resident_bytes()
        slow.rate = SLOW_RATE
        peak = at_rest
        with _calls(system, stack.work / "slow.log"):
            until = time.monotonic() + SLOW_SECONDS
            while time.monotonic() < until:
                peak = max(peak, child.resident_bytes())
                time.sleep(0.1)
        return Memory(f"{SLOW_CALLS} × 16 MiB in flight, slow upstream", system.name, at_rest, peak)


@contextmanager
def _calls(system: System, log: Path) -> Iterator[None]:
    command = [perf_analyzer(), "-i", "grpc", "-u", system.address, "-m", system.name_of(models.ECHO)]
    command += ["--concurrency-range", f"{SLOW_CALLS}:{SLOW_CALLS}", "--request-count", str(SLOW_CALLS)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--shape", f"x:{MIB_16}"], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _child(system: System) -> Child:
    assert system.child is not None
    return system.child


class SlowWay:
    """A way to Triton that takes no more than `rate` bytes per second in all; back they come at any speed."""

    def __init__(self, target: int) -> None:
        self.rate = 1 << 40
        self.port = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._over: asyncio.Event
        self._free_at = 0.0

    def __enter__(self) -> SlowWay:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0, limit=65_536)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        ways = [self._pass(reader, back_writer, slow=True), self._pass(back_reader, writer, slow=False)]
        await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        try:
            while data := await reader.read(65_536):
                if slow:
                    await self._wait_for(len(data))
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def _wait_for(self, size: int) -> None:
        now = self._loop.time()
        self._free_at = max(now, self._free_at) + size / self.rate
        await asyncio.sleep(self._free_at - now)
