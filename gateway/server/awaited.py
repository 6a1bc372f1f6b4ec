"""ModelStreamInfer's callers on grpc.aio's contexts: a `StreamSession` each, by two tasks. On `wire`: `streaming`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from gateway.infer.models import Models
from gateway.infer.streams import StreamLimits, StreamSession
from gateway.server.calls import CallLimits, Context, request_from
from gateway.server.streaming import METHOD
from gateway.types import Metadata

_UNWRITTEN_BYTES = 65_536  # of answers that a context has not taken; beyond it servers are told to wait


class AwaitedCaller:
    """Between one grpc.aio context and its session."""

    def __init__(self, models: Models, context: Context, limits: StreamLimits) -> None:
        self._context = context
        self._answers: deque[bytes] = deque()
        self._unwritten = 0
        self._is_full = False
        self._is_over = False
        self._error: Exception | None = None
        self._has_work = asyncio.Event()
        self._is_fed = asyncio.Event()
        opening = request_from(context, b"", METHOD, CallLimits())  # a stream may last
        self._session: StreamSession = models.stream(opening, self, limits)

    async def run(self, requests: AsyncIterator[bytes]) -> Metadata:
        """Serve the stream to its end. Answers its trailing metadata.

        :raises GatewayError: if the stream as a whole ends with a status.
        """
        session = self._session
        reading = asyncio.ensure_future(self._read(requests))
        try:
            await self._write()
        finally:
            tasks = [reading, *session.tasks]
            session.cancel()
            reading.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._error is not None:
            raise self._error
        return session.trailing_metadata()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        try:
            async for body in requests:
                self._is_fed.clear()
                if not self._session.take(body):
                    await self._is_fed.wait()
        except Exception as error:
            self._session.fail(error)
        else:
            self._session.end_of_requests()

    async def _write(self) -> None:
        while True:
            while self._answers:
                body = self._answers.popleft()
                await self._context.write(body)
                self._unwritten -= len(body)
                if self._is_full and self._unwritten <= _UNWRITTEN_BYTES:
                    self._is_full = False
                    self._session.caller_has_room()
            if self._is_over:
                return
            self._has_work.clear()
            await self._has_work.wait()

    # The session's side

    def send(self, body: bytes) -> bool:
        self._answers.append(body)
        self._unwritten += len(body)
        self._is_full = self._unwritten > _UNWRITTEN_BYTES
        self._has_work.set()
        return not self._is_full

    def feed(self) -> None:
        self._is_fed.set()

    def finish(self, error: Exception | None) -> None:
        self._is_over = True
        self._error = error
        self._has_work.set()
