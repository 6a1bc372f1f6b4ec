"""I/O: `inference-gateway triton start`: the local Triton in the foreground."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from gateway.triton.server import LocalTriton, StartFailed


async def stay_up(triton: LocalTriton, say: Callable[[str], None]) -> int:
    """Run until SIGINT or SIGTERM.

    :raises LocalTritonError: if it does not start, or ends by itself.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with triton:
        say(
            f"gRPC {triton.grpc_address}, HTTP {triton.http_address}, metrics {triton.metrics_address}; Ctrl-C stops it"
        )
        stopped, died = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(triton.wait_closed())
        await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
        by_itself = not stop.is_set()
        stopped.cancel()
        died.cancel()
        await asyncio.gather(stopped, died, return_exceptions=True)
    if by_itself:
        raise StartFailed("the local Triton ended by itself; the end of its log:\n  " + "\n  ".join(triton.log_tail()))
    return 0
