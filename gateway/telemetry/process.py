"""Telemetry: all telemetry of one process, built from its settings out of the other modules here."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TypeVar

from gateway.config.serving import Telemetry
from gateway.hooks import Hooks, Listener, Watched
from gateway.telemetry import call_log
from gateway.telemetry.access_log import AccessLog, AccessLogSettings, LineWriter, gap_of
from gateway.telemetry.capture import Captures
from gateway.telemetry.compose import compose
from gateway.telemetry.disagreements import Disagreements
from gateway.telemetry.ending import finish
from gateway.telemetry.metrics import Metrics, MetricsSettings, Scrape
from gateway.telemetry.metrics_export import MetricsExport
from gateway.telemetry.otel import is_configured
from gateway.telemetry.shared_values import SharedDirectory
from gateway.telemetry.traces import Traces
from gateway.telemetry.traffic import Traffic
from gateway.telemetry.usage import Usage

Entered = TypeVar("Entered")

_LAST_SECONDS = 2.5  # for all last numbers and spans at the end
_LOG_SECONDS = 0.05  # age of lines of the access log at most
_FLUSH_SECONDS = 0.1  # age of a worker's shared numbers at most; a worker that is killed loses this much


class ProcessTelemetry:
    """The telemetry of one serving process, between enter and exit."""

    def __init__(
        self, settings: Telemetry, environ: Mapping[str, str], version: str, shared: SharedDirectory | None
    ) -> None:
        """shared: where the workers of one pod keep their numbers; None if this process has no fellow workers."""
        self._settings = settings
        self._environ = environ
        self._version = version
        self._is_alone = shared is None
        self._metrics = Metrics(MetricsSettings(version, shared))
        self._parts = _Parts()
        self._worker = shared.worker if shared else "0"
        self.captures = Captures(self._worker)
        self.disagreements = Disagreements(self._worker)
        self.traffic: Traffic | None = None  # None: the supervisor has it, for all workers
        self.hooks: Hooks

    def watch(self, watched: Watched) -> None:
        """Report these numbers, too."""
        self._metrics.watch(watched)

    @property
    def scrape(self) -> Scrape:
        return self._metrics.scrape

    def connection_refused(self, why: str) -> None:
        self._metrics.connection_refused(why)

    def connection_turned_away(self, why: str) -> None:
        self._metrics.connection_turned_away(why)

    def call_refused(self, why: str) -> None:
        self._metrics.call_refused(why)

    async def enter(self, more: Sequence[Listener], usage: Usage | None = None) -> ProcessTelemetry:
        """Start telemetry. more: listeners beside those of the settings. usage: one that is to be started, and ended.

        :raises BadTelemetrySettings: if an OTEL_* variable names an exporter that is not installed.
        """
        parts = self._parts
        async with contextlib.AsyncExitStack() as exits:
            exits.push_async_callback(parts.leave)
            used = [] if usage is None else [(await parts.enter_async(usage)).counts]
            self.hooks = compose([*await self._listeners(parts), *used, *more])
            parts.enter(self.captures, "captured requests")
            parts.enter(self.disagreements, "disagreements of shadows")
            if not self._is_alone:
                await parts.enter_async(_flushed_often(self._metrics))
            else:
                numbers = numbers_of_pod(self.scrape, self._environ, self._version)
                self.traffic = await parts.enter_async(numbers)
            exits.pop_all()
        return self

    async def aclose(self) -> None:
        """Send and write what is left, within 2.5 s in all; the log says what was given up."""
        await self._parts.leave()

    async def _listeners(self, parts: _Parts) -> Sequence[Listener]:
        listeners: list[Listener] = []
        if is_configured("traces", self._environ):
            listeners.append(await parts.enter_async(Traces(self._environ, self._version, self._metrics.span_dropped)))
        listeners.append(self._metrics)
        if call_log.is_wanted():
            listeners.append(call_log.CallLog())
        log = self._settings.access_log
        if log.destination != "none":
            stream = sys.stdout if log.destination == "stdout" else sys.stderr
            lines = LineWriter(stream, per_second=log.most_per_second, gap=gap_of(self._worker), rest=_LOG_SECONDS)
            writer = parts.enter(lines, "lines of the access log")
            listeners.append(AccessLog(AccessLogSettings(log.sample, log.slow, self._worker), writer))
        return listeners


class _Parts:
    """Parts that end at the same time: each has a receiver of its own, which may be gone."""

    def __init__(self) -> None:
        self._ends: list[Callable[[], Awaitable[object]]] = []

    async def enter_async(self, part: AbstractAsyncContextManager[Entered]) -> Entered:
        entered = await part.__aenter__()
        self._ends.append(lambda: part.__aexit__(None, None, None))
        return entered

    def enter(self, part: AbstractContextManager[Entered], what: str) -> Entered:
        """what: names the part in the log."""
        entered = part.__enter__()
        self._ends.append(lambda: finish(lambda: part.__exit__(None, None, None), _LAST_SECONDS, what))
        return entered

    async def leave(self) -> None:
        ends, self._ends = self._ends, []
        await asyncio.gather(*(end() for end in ends))


@contextlib.asynccontextmanager
async def _flushed_often(metrics: Metrics) -> AsyncIterator[None]:
    """Flush often, for other processes that read these numbers and can't ask for a flush."""

    async def run() -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            metrics.flush()

    flushing = asyncio.ensure_future(run())
    try:
        yield
    finally:
        flushing.cancel()
        metrics.flush()


@contextlib.asynccontextmanager
async def numbers_of_pod(scrape: Scrape, environ: Mapping[str, str], version: str) -> AsyncIterator[Traffic]:
    """What one process of a pod does with the numbers of all workers: show them on the page, and send them if
    configured."""
    async with contextlib.AsyncExitStack() as exits:
        if is_configured("metrics", environ):
            await exits.enter_async_context(MetricsExport(scrape.collect, environ, version))
        yield await exits.enter_async_context(Traffic(scrape.collect))
