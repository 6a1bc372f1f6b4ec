"""Telemetry: hands finished spans to the process that exports them, and never waits for it.

May depend on asyncio. `span_exporter` is the other end of the pipe.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from typing import Final

from gateway.telemetry.spans import FinishedSpan, to_line

_log = logging.getLogger(__name__)

_GATHER_SECONDS: Final = 0.05  # spans travel together: a write costs more than to encode one
_WAITING_BYTES: Final = 4 << 20  # some 8,000 spans; with more, the process hangs, and spans are dropped
_LAST_SECONDS: Final = 2.5  # for the process to end; itself it takes 2 s at most
_RESTART_SECONDS: Final = (1.0, 60.0)  # the first pause, doubled up to the last
_LIVED_LONG: Final = 60.0  # seconds after which the next pause is the first one again


class SpanPipe:
    """Between enter and exit there is a process that exports; one that ends too early is started again."""

    def __init__(self, environ: Mapping[str, str], version: str, dropped: Callable[[], None]) -> None:
        """
        environ: of the process that exports; its OTEL_* variables say where spans go.
        dropped: is called for each span that could not be handed on.
        """
        self._environ = dict(environ)
        self._command = (sys.executable, "-m", "gateway.telemetry.span_exporter", version)
        self._dropped = dropped
        self._waiting: list[str] = []
        self._waiting_bytes = 0
        self._process: Process | None = None
        self._running: asyncio.Future[None] | None = None

    async def __aenter__(self) -> SpanPipe:
        self._process = await self._start()
        self._running = asyncio.ensure_future(self._keep_running())
        return self

    async def aclose(self) -> None:
        """Hand on the last spans, and wait for the end of the process, for 2.5 s at most."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        self._write(process)
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _LAST_SECONDS)
            return
        except asyncio.TimeoutError:
            _log.warning("the process that exports spans does not end and is killed: the last spans are lost")
        process.kill()
        await process.wait()

    def send(self, span: FinishedSpan) -> None:
        """Hand on a span, or drop it if too many wait."""
        if self._waiting_bytes > _WAITING_BYTES:
            self._dropped()
            return
        line = to_line(span)
        if not self._waiting:
            asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._flush)
        self._waiting.append(line)
        self._waiting_bytes += len(line) + 1

    def _flush(self) -> None:
        if self._process is not None:
            self._write(self._process)

    def _write(self, process: Process) -> None:
        """Write what waits, unless the process has not read what was written before."""
        pipe = process.stdin
        if not self._waiting or pipe is None:
            return
        if pipe.transport.get_write_buffer_size() or pipe.is_closing():
            asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._flush)
            return
        lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
        pipe.write(("\n".join(lines) + "\n").encode())

    async def _start(self) -> Process:
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        # It has its own session: Ctrl-C reaches only the gateway, which has calls to end, and spans of them to send.
        return await asyncio.create_subprocess_exec(
            *self._command, level, env=self._environ, stdin=PIPE, start_new_session=True
        )

    async def _keep_running(self) -> None:
        pause = _RESTART_SECONDS[0]
        while self._process is not None:
            started = time.monotonic()
            code = await self._process.wait()
            if time.monotonic() - started > _LIVED_LONG:
                pause = _RESTART_SECONDS[0]
            _log.warning("the process that exports spans has ended with %d and is started again in %g s", code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RESTART_SECONDS[1])
            try:
                self._process = await self._start()
            except OSError as error:  # too many processes, or no memory: what has ended is waited for once more
                _log.warning("the process that exports spans can't be started: %s", error)
