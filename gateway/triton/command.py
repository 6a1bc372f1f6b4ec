"""I/O: the local Triton in the foreground, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable, Iterator

from gateway.errors import INTERRUPTED, CommandFailed
from gateway.process.stopping import Stop, StopSignals
from gateway.triton.server import LocalTriton, StartFailed


class Stopped(CommandFailed):
    """SIGINT or SIGTERM arrived before the command was up, or a third one while it was ending. It has no text."""

    exit_code = INTERRUPTED


class Signals:
    """Handles SIGINT and SIGTERM of a command: before it is `up` they end it at once, later they ask it to end."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._signals = StopSignals(math.inf)
        self._task: asyncio.Task[object] | None = None
        self.up = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for the signals on behalf of this task. raises: Stopped."""
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._arrived)
        try:
            yield
        except asyncio.CancelledError:
            if self._asked.is_set():
                raise Stopped from None
            raise
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _arrived(self) -> None:
        asked = self._signals.arrived(0.0)
        if self._task is not None and (asked is Stop.NOW or not self.up):
            self._task.cancel()
        self._asked.set()

    async def wait(self, triton: LocalTriton) -> None:
        """Stay up until a signal to stop.

        :raises StartFailed: if the server ends by itself.
        """
        self.up = True
        asked, died = asyncio.ensure_future(self._asked.wait()), asyncio.ensure_future(triton.wait_closed())
        try:
            await asyncio.wait({asked, died}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                log = "\n  ".join(triton.log_tail())
                raise StartFailed(f"the local Triton ended by itself; the end of its log:\n  {log}")
        finally:
            asked.cancel()
            died.cancel()
            await asyncio.gather(asked, died, return_exceptions=True)


async def stay_up(triton: LocalTriton, say: Callable[[str], None]) -> int:
    """Run until SIGINT or SIGTERM; the exit code.

    :raises LocalTritonError: if it does not start, or ends by itself.
    :raises Stopped: if it is ended before it is up.
    """
    signals = Signals()
    with signals.heard():
        async with triton:
            say(
                f"gRPC {triton.grpc_address}, HTTP {triton.http_address}, metrics {triton.metrics_address}; "
                "Ctrl-C stops it"
            )
            await signals.wait(triton)
    return 0
