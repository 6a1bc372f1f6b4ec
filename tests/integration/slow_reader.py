"""A caller who takes the beginning of an answer, and the rest of it when he is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded

_PATH = "/inference.GRPCInferenceService/ModelInfer"


class SlowReader:
    """A caller who takes 64 KiB of an answer, and the rest of it when he is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._wire = H2Connection()
        self._wire.initiate_connection()

    async def ask(self, request: Any) -> None:
        wire, message = self._wire, request.SerializeToString()
        wire.send_headers(
            1,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", _PATH),
                (":authority", "x"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            ],
        )
        body = b"\0" + len(message).to_bytes(4, "big") + message
        while body:
            most = min(wire.local_flow_control_window(1), wire.max_outbound_frame_size)
            wire.send_data(1, body[:most], end_stream=most >= len(body))
            body = body[most:]
            self._writer.write(wire.data_to_send())
            if not wire.local_flow_control_window(1):
                wire.receive_data(await self._reader.read(65_536))

    async def take(self) -> bytes:
        """The answer."""
        body = b""
        while True:
            for event in self._wire.receive_data(await self._reader.read(65_536)):
                if isinstance(event, DataReceived):
                    body += event.data
                    self._wire.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, StreamEnded):
                    return body[5:]
            self._writer.write(self._wire.data_to_send())

    def reset(self) -> None:
        self._wire.reset_stream(1)
        self._writer.write(self._wire.data_to_send())

    def break_off(self) -> None:
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def slow_reader(address: str) -> AsyncIterator[SlowReader]:
    caller = SlowReader(*await asyncio.open_connection(*address.split(":")))
    yield caller
    caller.break_off()
