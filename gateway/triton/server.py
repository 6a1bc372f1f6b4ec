"""A Triton server on this host, as a child that never outlives its parent.

Starts, watches and ends the process; what it is started from is `host`'s, what it may load is `repository`'s.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from gateway.process.scratch import Scratch, left_over
from gateway.triton.host import Installation, LocalTritonError, has_gpu, install
from gateway.triton.keeper import remove_leftovers

_KEEPER = Path(__file__).with_name("keeper.py")
_TRIES = 3  # of a start, if it ended of one of these
_PORT_LOST = "already in use"  # another process may take a free port before Triton binds it
_LOCK_LOST = "boost::interprocess::lock_exception"  # its Python backend's, seen on a busy machine
_FREE_PORTS = range(20000, 32768)  # below Linux' ephemeral range, so that no outgoing connection takes one meanwhile
_POLL = 0.05  # seconds between two checks of readiness
_LOG_LINES = 30
_LOG_BYTES = 64 * 1024
# Log lines of every start of Triton, and of every start without a GPU.
_NOISE = re.compile(
    r"^[+|]|^\s*$|pinned_memory_manager|cuda_memory_manager|CudaDriverHelper|NVML|DCGM|Collecting CPU metrics"
    r"|server\.cc:\d+\] $|tritonserver\.cc:\d+\] $|in-flight|All models are stopped"
)


class PortTaken(LocalTritonError):
    """Another process listens where this server should."""


class StartFailed(LocalTritonError):
    """The server ended or was not ready in time; the text has the end of its log."""


class LocalTriton:
    """One tritonserver over one model repository. `async with` starts and closes it.

    It can be started again after it has ended, on the same ports. Its processes and its shared memory vanish with
    this process, however this process ends.
    """

    def __init__(
        self,
        repository: Path,
        *,
        models: Sequence[str] | None = None,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        extra: Sequence[str] = (),
        log: Path | None = None,
        exit_seconds: int = 3,
    ) -> None:
        """Only remembers; `start` acts.

        models:        to load; None loads every one that can be served here. The others stay known and unloaded.
        *_port:        0 picks a free one at the first start.
        extra:         further arguments for tritonserver; the last one of a kind wins.
        log:           file that the server's output is added to; None keeps it only as long as this object.
        exit_seconds:  what requests in flight get when the server is asked to stop.
        """
        self.repository = repository
        self.host = host
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.metrics_port = metrics_port
        self.models = models
        self.pid: int | None = None  # of tritonserver while it runs
        self._extra = tuple(extra)
        self._log_path = log
        self._exit_seconds = exit_seconds
        self._log: BinaryIO | None = None
        self._log_start = 0
        self._shm_prefix = ""
        self._scratch: Scratch | None = None
        self._keeper: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.is_running else "not running"
        return f"<LocalTriton {self.grpc_address}, {state}>"

    @property
    def grpc_address(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def http_address(self) -> str:
        return f"{self.host}:{self.http_port}"

    @property
    def metrics_address(self) -> str:
        return f"{self.host}:{self.metrics_port}"

    @property
    def is_running(self) -> bool:
        return self._keeper is not None and self._keeper.returncode is None

    async def __aenter__(self) -> LocalTriton:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self, *, timeout: float = 120.0) -> None:
        """Fetch the server if need be, start it, and return when it and its models are ready.

        timeout: seconds from the process' start to readiness.
        :raises LocalTritonError: if this host is unsuitable, a port is taken, it ends early or is not ready in time.
        :raises FetchFailed: if the server cannot be fetched.
        """
        if self.is_running:
            raise RuntimeError(f"{self!r} runs already")
        installation = await asyncio.to_thread(install)
        models = self.models if self.models is not None else await asyncio.to_thread(self._servable)
        asked = (self.grpc_port, self.http_port, self.metrics_port)
        for tries_left in reversed(range(_TRIES)):
            self._settle_ports()
            try:
                await self._spawn(installation, models)
                await self._until_ready(timeout, models)
                return
            except BaseException as error:
                await asyncio.shield(self.kill())
                lost_port = 0 in asked and _PORT_LOST in str(error)
                may_pass = isinstance(error, StartFailed) and (lost_port or _LOCK_LOST in str(error))
                self._close_log()
                if not may_pass or not tries_left:
                    raise
            self.grpc_port, self.http_port, self.metrics_port = asked

    async def wait_closed(self) -> int:
        """Wait until the server has ended, for whatever reason, and nothing of it is left.

        returns: its exit status, 128 + n if signal n ended it.
        """
        if self._keeper is None:
            return 0
        status = await self._keeper.wait()
        self.pid = None
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            if status < 0:  # the keeper itself was killed; the server died with it, and the rest is left to us
                await asyncio.to_thread(_remove_leftovers, scratch.path)
            scratch.close()
        return status

    async def aclose(self) -> None:
        """Ask the server to finish what is in flight and to end; kill it if it does not."""
        if self._keeper is None:
            return
        if self.is_running:
            self._keeper.terminate()
        try:
            await asyncio.wait_for(self.wait_closed(), self._exit_seconds + 3)
        except asyncio.TimeoutError:
            await self.kill()
        self._close_log()

    async def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._keeper is None:
            return
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()  # the end of its lifeline
        await self.wait_closed()

    def log_tail(self, lines: int = _LOG_LINES) -> list[str]:
        """The last lines of this start's log, without the lines of every start."""
        if self._log is None:
            return []
        end = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, end - _LOG_BYTES)
        text = os.pread(self._log.fileno(), end - start, start).decode(errors="replace")
        return [line for line in text.splitlines() if not _NOISE.search(line)][-lines:]

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    # Starting

    def _servable(self) -> list[str]:
        from gateway.triton.repository import survey  # noqa: PLC0415  # its messages take 15 MiB

        return [model.name for model in survey(self.repository) if not model.problem]

    def _settle_ports(self) -> None:
        self.grpc_port = self._settle(self.grpc_port, "gRPC")
        self.http_port = self._settle(self.http_port, "HTTP")
        self.metrics_port = self._settle(self.metrics_port, "metrics")

    def _settle(self, port: int, what: str) -> int:
        taken = {self.grpc_port, self.http_port, self.metrics_port}
        if port:
            if not _is_free(self.host, port):
                raise PortTaken(
                    f"Triton's {what} port {port} on {self.host} is taken by another process. "
                    f"End that one, or choose another {what} port."
                )
            return port
        # Tried at random: several servers that start at the same time must not all look at the same port.
        for candidate in random.sample(_FREE_PORTS, 200):
            if candidate not in taken and _is_free(self.host, candidate):
                return candidate
        raise PortTaken(f"No free {what} port was found on {self.host} between 20000 and 32767.")

    def _command(self, installation: Installation, models: Sequence[str]) -> list[str]:
        command = [str(installation.tritonserver), f"--model-repository={self.repository.absolute()}"]
        command += [f"--backend-directory={installation.backends}", f"--cache-directory={installation.caches}"]
        command += [f"--grpc-address={self.host}", f"--grpc-port={self.grpc_port}"]
        command += [f"--http-address={self.host}", f"--http-port={self.http_port}"]
        command += [f"--metrics-address={self.host}", f"--metrics-port={self.metrics_port}"]
        command += [f"--exit-timeout-secs={self._exit_seconds}"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        if not has_gpu():
            command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
        command += ["--model-control-mode=explicit", *(f"--load-model={model}" for model in models)]
        return [*command, *self._extra]

    async def _spawn(self, installation: Installation, models: Sequence[str]) -> None:
        self._scratch = await asyncio.to_thread(_new_scratch)
        self._shm_prefix = _shm_prefix(self._scratch.path)
        if self._log is None:
            self._log = open(self._log_path, "ab+") if self._log_path else tempfile.TemporaryFile("ab+")  # noqa: SIM115, ASYNC230
        self._log_start = os.fstat(self._log.fileno()).st_size
        # In a session of its own, so that Ctrl-C reaches the gateway alone, which then ends it in its own order.
        self._keeper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(_KEEPER), self._shm_prefix, str(self._scratch.path)),
            *self._command(installation, models),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log.fileno(),
            env={**os.environ, **installation.environment},
            start_new_session=True,
        )
        assert self._keeper.stdout is not None  # noqa: S101  # for the type checker
        told = await self._keeper.stdout.readline()
        self.pid = int(told) if told else None

    async def _until_ready(self, timeout: float, models: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + timeout
        while not await _is_ready(self.host, self.http_port):
            if not self.is_running:
                status = await self.wait_closed()
                text = f"Triton ended while starting, with status {status}."
                raise StartFailed(self._with_log("\n".join([text, *not_loaded(self.log_tail(_LOG_BYTES), models)])))
            if loop.time() > give_up:
                raise StartFailed(self._with_log(f"Triton was not ready within {timeout:g} s."))
            await asyncio.sleep(_POLL)

    def _with_log(self, text: str) -> str:
        where = f"Its log, {self._log_path}, ends with:" if self._log_path else "Its log ends with:"
        return "\n".join([text, where, *(f"  {line}" for line in self.log_tail())])


_NOT_LOADED = re.compile(r"\"failed to load '([^']+)' version \d+: (?:\w+: )?(.*?)(?:\\n|\"$)", re.MULTILINE)
_BROUGHT_BY = {"onnxruntime": "local", "pocketsphinx": "tasks"}  # modules that models import, by extra


def not_loaded(log: Sequence[str], models: Sequence[str]) -> list[str]:
    """Which of its models kept a Triton from starting, why, and what to do: a line each."""
    lines = []
    for name, reason in dict.fromkeys(_NOT_LOADED.findall("\n".join(log))):
        module = reason.partition("No module named '")[2].partition("'")[0]
        extra = _BROUGHT_BY.get(module.partition(".")[0])
        remedy = f"pip install 'inference-gateway[{extra}]'" if extra else f"install {module} in this environment"
        lines.append(f"The model {name} was not loaded: {reason}" + (f"; {remedy}" if module else ""))
    if lines and len(models) > 1:
        lines.append("To go on without it, name those to load: --model NAME")
    return lines


_KIND = "triton"
_BEGAN = "began"  # an empty file, as old as the start


def _new_scratch() -> Scratch:
    """A folder for one start, after the end of what starts left whose gateways were killed with their keepers."""
    for path in left_over(_KIND):
        _remove_leftovers(path)
    scratch = Scratch(_KIND)
    (scratch.path / _BEGAN).touch()
    return scratch


def _shm_prefix(folder: Path) -> str:
    """Unique to one start, because every region that has it goes with the folder."""
    return folder.name.removesuffix(_KIND)


def _remove_leftovers(folder: Path) -> None:
    began = folder / _BEGAN
    since = began.stat().st_mtime if began.exists() else time.time()
    remove_leftovers(_shm_prefix(folder), str(folder), since)


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # connections that linger from a past server do not count
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


async def _is_ready(host: str, port: int) -> bool:
    """Ask Triton's HTTP front end, which comes up after the gRPC one. source: KServe V2, `/v2/health/ready`."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    try:
        writer.write(f"GET /v2/health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status = await asyncio.wait_for(reader.readline(), 5)
        return b" 200 " in status
    except (OSError, asyncio.TimeoutError):
        return False
    finally:
        writer.close()
