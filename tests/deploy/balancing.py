"""What stands for a Service: one address, whose connections go to the pods that are listed, as kube-proxy's do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Service:
    """What callers have been told about the pods, and the address that stands for all of them."""

    listed: list[str] = field(default_factory=list)
    address: str = ""
    _turn: Any = field(default_factory=itertools.count)
    _pumps: set[asyncio.Task[None]] = field(default_factory=set)

    def pick(self) -> str:
        return self.listed[next(self._turn) % len(self.listed)]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Service]:
        """Balance connections, as kube-proxy does for a ClusterIP."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.pick().rpartition(":")
        try:
            to_reader, to_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.ensure_future(_pump(source, sink))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
    finally:
        sink.close()
