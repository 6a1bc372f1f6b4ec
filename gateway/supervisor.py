"""I/O: several workers on one port. Starts them, replaces those that die, and answers the admin plane for all.

Workers share the metrics directory and the config file; nothing else. This process serves no gRPC: it accepts
connections and hands each to the worker that has the fewest. It asks each worker's own admin plane, over a socket in
the runtime directory, how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import aiohttp

from gateway.admin import ASKED_BY, GUARD, Admin, AdminAccess, merged_config, merged_state
from gateway.api.listener import CannotServe
from gateway.app import VERSION, Place
from gateway.assemble import admin_of
from gateway.config import Config, split_address
from gateway.process.scratch import Scratch
from gateway.process.stopping import Stop, StopSignals
from gateway.telemetry.metrics import Scrape
from gateway.telemetry.process import numbers_of_pod
from gateway.telemetry.shared_values import SharedDirectory, prepare_directory, worker_ended
from gateway.telemetry.traffic import Traffic
from gateway.transport.handover import Handover
from gateway.transport.listener import BACKLOG, LAST_SECONDS
from gateway.transport.sockets import bind

_log = logging.getLogger(__name__)

SCRATCH = "workers"
"""The kind of the folder that a supervisor shares with its workers."""

WORKER_VARIABLE = "GATEWAY_WORKER"
"""Environment variable that gives a worker its slot, directory, address, channel and parent, as JSON. Internal."""

_POLL_SECONDS = 0.5
_YOUNG_SECONDS = 5.0  # a worker that dies younger than this has failed to start
_FAILED_STARTS = 3  # failed starts in a row of one slot, while no worker is up, after which the supervisor gives up
_LONGEST_PAUSE_SECONDS = 5.0  # between two starts in one slot
_ASK_SECONDS = 2.0  # for one answer of a worker
_ORDER_SECONDS = 30.0  # likewise, which has to ask the store
_DOUBT_SECONDS = 5.0  # seconds of silence after which a worker does not count as live
_SILENT_SECONDS = 10.0  # seconds of silence after which a worker is killed: its callers have given up by then
_MARGIN_SECONDS = 5.0  # seconds after drain_delay and drain at which a worker is killed


_STARTING = ("starting",)  # as the worker's own admin plane reports it


class CrashLoop(Exception):
    """Workers end as soon as they are started; the text says how many."""


def maybe_place(environ: Mapping[str, str]) -> tuple[Place, int] | None:
    """The place of a worker that a supervisor started, and that one's process id; None for a process that is alone."""
    given = environ.get(WORKER_VARIABLE)
    if given is None:
        return None
    told = json.loads(given)
    runtime = Path(told["runtime"])
    place = Place(
        admin_listen=f"unix:{_socket(runtime, told['slot'])}",
        shared=SharedDirectory(runtime / "metrics", told["slot"]),
        shared_listen=told["listen"],
        channel=socket.socket(fileno=told["channel"]),
        worker=int(told["slot"]),
    )
    os.set_inheritable(told["channel"], False)
    return place, told["parent"]


def _socket(runtime: Path, slot: str) -> Path:
    return runtime / f"worker-{slot}.sock"


@dataclass(slots=True)
class _Worker:
    """One slot: its process, and the last answers of that."""

    slot: str
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    failed_starts: int = 0  # in a row
    silent_since: float | None = None  # when it first gave no answer in time, after the last that it gave
    ready: bool = False
    reasons: Sequence[str] = _STARTING
    state: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def is_young(self) -> bool:
        return time.monotonic() - self.started < _YOUNG_SECONDS

    @property
    def silence(self) -> float:
        """Seconds since the first question without an answer; so it stays 0 if this process itself was stopped."""
        return 0.0 if self.silent_since is None else time.monotonic() - self.silent_since

    @property
    def gets_calls(self) -> bool:
        """Does the worker listen? The kernel gives connections to every worker that does, and to no other."""
        return self.is_running and bool(self.state)


class Supervisor:
    """Runs the workers until a signal to stop."""

    def __init__(self, config: Config, command: Sequence[str], environ: Mapping[str, str], source: str = "") -> None:
        """command: starts one worker, given WORKER_VARIABLE in its environment. source: the config file."""
        self._config = config
        self._source = source
        self._command = command
        self._environ = environ
        self._workers = [_Worker(str(number)) for number in range(config.workers)]
        self._stopping = asyncio.Event()
        self._signals = StopSignals(config.server.drain_delay + config.server.drain)
        self._runtime = Path()
        self._scratch: Scratch
        self._traffic: Traffic
        self._handover: Handover
        self._admin: Admin

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; then every worker drains. A third signal, or one after the grace, kills them. The
        exit code.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_all)
        self._scratch = Scratch(SCRATCH)
        self._runtime = self._scratch.path
        try:
            prepare_directory(self._runtime / "metrics")
            with reserve(self._config.listen) as (address, bound):
                self._handover = Handover(bound)
                scrape = Scrape.of_directory(self._runtime / "metrics")
                async with (
                    numbers_of_pod(scrape, self._environ, VERSION) as self._traffic,
                    Admin(
                        self,
                        self._config.admin.listen,
                        scrape.render,
                        access=admin_of(self._config),
                        verdicts=self._verdicts,
                        order=self._order,
                        history=self._traffic.history,
                    ) as admin,
                ):
                    self._admin = admin
                    _log.info("%d workers on %s, admin on %s", len(self._workers), address, admin.address)
                    return await self._run_workers(address)
        finally:
            self._scratch.close()

    def _told_to_stop(self) -> None:
        asked = self._signals.arrived(time.monotonic())
        if asked is Stop.NOW:
            _log.warning("another signal to stop: ending now, and calls in flight are cut")
            self._signal_all(signal.SIGKILL)
        elif asked is Stop.AGAIN:
            _log.info("a second signal to stop: calls in flight may still end; a third signal cuts them")
        self._stopping.set()

    async def _run_workers(self, address: str) -> int:
        keeping = [asyncio.ensure_future(self._keep(worker, address)) for worker in self._workers]
        polling = asyncio.ensure_future(self._poll())
        stopping = asyncio.ensure_future(self._stopping.wait())
        accepting = asyncio.ensure_future(self._accept())
        code = 0
        try:
            await asyncio.wait([stopping, accepting, *keeping], return_when=asyncio.FIRST_COMPLETED)
            for task in (accepting, *keeping):
                if task.done():
                    await task
        except CrashLoop as error:
            _log.error("%s", error)
            code = 1
        finally:
            polling.cancel()
            stopping.cancel()
            accepting.cancel()
            self._stopping.set()
            await self._stop_workers()
            await asyncio.gather(*keeping, accepting, polling, stopping, return_exceptions=True)
        return code

    async def _accept(self) -> None:
        """:raises CannotServe: if somebody else has taken the port meanwhile."""
        try:
            await self._handover.open(BACKLOG)
        except OSError as error:
            raise CannotServe(f"cannot listen on {self._config.listen}: {error.strerror}") from error
        await self._stopping.wait()

    async def _keep(self, worker: _Worker, address: str) -> None:
        """Keep a process in a slot until the end.

        :raises CrashLoop: if workers can't be started.
        """
        while not self._stopping.is_set():
            code = await self._run_once(worker, address)
            if self._stopping.is_set():
                return
            has_failed = (
                worker.is_young or not worker.state
            )  # no state: it never answered, however long a busy machine took to end it
            worker.failed_starts = worker.failed_starts + 1 if has_failed else 0
            if worker.failed_starts >= _FAILED_STARTS and not any(other.gets_calls for other in self._workers):
                raise CrashLoop(f"{_FAILED_STARTS} workers in a row ended as soon as they were started; giving up")
            pause = min(0.05 * 2**worker.failed_starts, _LONGEST_PAUSE_SECONDS)
            _log.error("worker %s ended %s; starting another in %g s", worker.slot, _how(code), pause)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_once(self, worker: _Worker, address: str) -> int:
        """Start a process in a slot, wait for its end, and return its exit code."""
        taker, channel = self._handover.join()
        told = {
            "slot": worker.slot,
            "runtime": str(self._runtime),
            "listen": address,
            "channel": channel.fileno(),
            "parent": os.getpid(),
        }
        worker.reasons, worker.state, worker.started, worker.silent_since = _STARTING, {}, time.monotonic(), None
        descriptors = [channel.fileno()]
        if self._scratch.lock is not None:  # the worker owns the folder too, and may live longer
            descriptors.append(self._scratch.lock)
        with channel:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**self._environ, WORKER_VARIABLE: json.dumps(told)},
                stdin=asyncio.subprocess.DEVNULL,
                # The worker has its own session: Ctrl-C reaches only this process, which then drains the workers.
                start_new_session=True,
                pass_fds=descriptors,
            )
        worker.process = process
        if self._stopping.is_set():  # the signal to stop came while the worker was being started
            process.terminate()
        code = await process.wait()
        self._handover.leave(taker)
        worker.ready, worker.reasons = False, ("ended",)
        worker_ended(SharedDirectory(self._runtime / "metrics", worker.slot))
        return code

    def _reload_all(self) -> None:
        """Pass SIGHUP on to the workers that serve; a worker that is starting reads the config anyway."""
        for worker in self._workers:
            if worker.gets_calls and worker.process is not None:
                worker.process.send_signal(signal.SIGHUP)

    def _signal_all(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.is_running:
                worker.process.send_signal(number)

    async def _stop_workers(self) -> None:
        accepting = asyncio.ensure_future(self._accept_a_while())
        self._signal_all(signal.SIGTERM)
        server = self._config.server
        waits = [asyncio.ensure_future(w.process.wait()) for w in self._workers if w.process is not None]
        if waits:
            _, late = await asyncio.wait(waits, timeout=server.drain_delay + server.drain + _MARGIN_SECONDS)
            if late:
                _log.error("%d workers did not end in time and are killed", len(late))
                self._signal_all(signal.SIGKILL)
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)

    async def _accept_a_while(self) -> None:
        """As long as the workers do, which then wait to hear from here that none comes any more."""
        await asyncio.sleep(self._config.server.drain_delay)
        await self._handover.close(LAST_SECONDS)

    # What the admin plane shows

    async def _poll(self) -> None:
        while True:
            await asyncio.gather(*map(self._ask, self._workers))
            await asyncio.sleep(_POLL_SECONDS)

    async def _ask(self, worker: _Worker) -> None:
        connector = aiohttp.UnixConnector(str(_socket(self._runtime, worker.slot)))
        timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
        try:
            async with aiohttp.ClientSession("http://worker", connector=connector, timeout=timeout) as session:
                async with session.get("/readyz") as answer:
                    told = await answer.json()
                    worker.silent_since = None
                    worker.ready, worker.reasons = told["ready"], tuple(told["reasons"])
                if worker.reasons == _STARTING:
                    return
                async with session.get("/state") as answer:
                    worker.state = await answer.json()
                async with session.get("/config") as answer:
                    worker.config = told = await answer.json()
                    self._admin.guard(AdminAccess.from_told(told.pop(GUARD)))
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            if worker.gets_calls:
                worker.ready, worker.reasons = False, (f"does not answer: {type(error).__name__}",)
                if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
                    self._heard_nothing(worker)

    async def _verdicts(self) -> Sequence[Mapping[str, object]]:
        """As a worker knows them: all follow one store."""
        timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
        for worker in (each for each in self._workers if each.gets_calls):
            connector = aiohttp.UnixConnector(str(_socket(self._runtime, worker.slot)))
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, TimeoutError, asyncio.TimeoutError):
                async with (
                    aiohttp.ClientSession("http://worker", connector=connector, timeout=timeout) as session,
                    session.get("/verdicts") as answer,
                ):
                    told: Sequence[Mapping[str, object]] = (await answer.json())["verdicts"]
                    return told
        return ()

    async def _order(self, name: str, action: str, by: str) -> tuple[int, Mapping[str, object]]:
        """Have a worker do something to a rollout: workers follow the config, and this process does not."""
        path = f"/rollouts/{quote(name, safe='')}/{quote(action, safe='')}"
        timeout = aiohttp.ClientTimeout(total=_ORDER_SECONDS)
        for worker in (each for each in self._workers if each.gets_calls):
            connector = aiohttp.UnixConnector(str(_socket(self._runtime, worker.slot)))
            try:
                async with (
                    aiohttp.ClientSession("http://worker", connector=connector, timeout=timeout) as session,
                    session.post(path, headers={ASKED_BY: by}) as answer,
                ):
                    return answer.status, await answer.json()
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
                return 503, {"error": f"worker {worker.slot} does not answer: {type(error).__name__}"}
        return 503, {"error": "no worker serves yet"}

    def _heard_nothing(self, worker: _Worker) -> None:
        """Kill a worker that hangs: the kernel goes on giving it connections, whose calls would wait for ever."""
        if worker.silent_since is None:
            worker.silent_since = time.monotonic()
        elif worker.silence >= _SILENT_SECONDS and worker.process is not None:
            _log.error("worker %s has not answered for %.0f s and is killed", worker.slot, worker.silence)
            worker.process.send_signal(signal.SIGKILL)

    def is_live(self) -> bool:
        """Does some worker answer, or is one being started?"""
        return any(worker.silence < _DOUBT_SECONDS for worker in self._workers)

    def readiness(self) -> tuple[bool, Sequence[str]]:
        """Ready if some worker gets calls, and all that get calls are ready."""
        if self._stopping.is_set():
            return False, ["draining"]
        reasons = [f"worker {w.slot}: {reason}" for w in self._workers if not w.ready for reason in w.reasons]
        serving = [worker for worker in self._workers if worker.gets_calls]
        return bool(serving) and all(worker.ready for worker in serving), reasons

    def state(self) -> Mapping[str, object]:
        workers = {worker.slot: worker.state for worker in self._workers}
        merged = merged_state(list(workers.values()))
        return {
            **merged,
            "ready": self.readiness()[0],
            "draining": self._stopping.is_set() or merged["draining"],
            "traffic": self._traffic.report(),
            "workers": workers,
        }

    def config(self) -> Mapping[str, object]:
        workers = {worker.slot: worker.config for worker in self._workers}
        return {**merged_config(list(workers.values())), "workers": workers}


def _how(code: int) -> str:
    """The end of a process in words."""
    return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"


@contextlib.contextmanager
def reserve(listen: str, flag: str = "--listen") -> Iterator[tuple[str, socket.socket]]:
    """Hold a port without listening on it: its address, and the socket.

    flag:  what chooses it, for the message.
    :raises CannotServe: if somebody else has it.
    """
    host, port = split_address(listen)
    with contextlib.ExitStack() as exits:
        try:
            with bind(host, port) as probe:
                probe.listen(1)  # a port that is held and not listened on is refused only now
                taken = probe.getsockname()[1]
            held = exits.enter_context(bind(host, taken))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # else it would stop no other's probe
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {listen}: {error.strerror}; stop what uses it or choose another with {flag}"
            ) from error
        yield f"{listen.rpartition(':')[0]}:{taken}", held


def worker_command() -> list[str]:
    """The command line of this process, for its workers: the same way in, so that they import what it imports.

    `python -m` would put the current directory first, whose `yaml.py` is a user's; the console command does not.
    """
    return [sys.executable, *sys.orig_argv[1:]]
