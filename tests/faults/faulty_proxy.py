"""A TCP proxy with faults that are set while it runs: it delays, dribbles, corrupts, cuts and swallows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class FaultyProxy:
    """Carries connections to one address. Faults are on what comes back from there, which is where answers are."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.delay = 0.0  # seconds before each piece
        self.piece = 65_536  # bytes at a time; with a delay that is a dribble
        self.corrupt = False  # a bit of each piece is another
        self.cut_after: int | None = None  # bytes, counted from when this is set, over all connections
        self.swallow = False  # connections stay open and carry nothing; new ones are accepted and carry nothing either
        self.hold_after: int | None = None  # bytes of what goes there, over all connections; the rest waits
        self.connections = 0

    def heal(self) -> None:
        self.delay, self.piece, self.corrupt, self.cut_after, self.swallow = 0.0, 65_536, False, None, False
        self.hold_after = None

    def cut(self) -> None:
        """Reset every connection there is."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faulty: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(self.piece if faulty else 65_536):
                if faulty and self.delay:
                    await asyncio.sleep(self.delay)
                while self.swallow:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                while not faulty and self.hold_after is not None and self.hold_after <= 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                if not faulty and self.hold_after is not None:
                    self.hold_after -= len(data)
                if faulty and self.corrupt:
                    data = data[:-1] + bytes([data[-1] ^ 0x20])
                if faulty and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after <= 0:
                        writer.write(data[: max(0, len(data) + self.cut_after)])
                        self.cut_after = None
                        break
                writer.write(data)
                await writer.drain()
        writer.transport.abort() if faulty else writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for run in (self._carry(reader, back, False), self._carry(there, writer, True)):
            task = asyncio.ensure_future(run)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


@contextlib.asynccontextmanager
async def faulty_proxy(port: int, host: str = "127.0.0.1") -> AsyncIterator[FaultyProxy]:
    proxy = FaultyProxy(host, port)
    server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        for task in list(proxy._tasks):
            task.cancel()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)
