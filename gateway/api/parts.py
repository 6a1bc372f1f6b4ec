"""One request to a decoupled model from within this process, and its answers as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from tritonclient.grpc import service_pb2 as v2

from gateway.errors import GatewayError, UpstreamFailed
from gateway.forwarding.exchange import Request
from gateway.forwarding.models import Models
from gateway.forwarding.streams import StreamLimits
from gateway.rpc.budget import Budget
from gateway.status import judge_in_band

_AHEAD = 2
"""Answers that may wait to be read; then the session reads no more of the upstream."""


class AnswerError(UpstreamFailed):
    """An error that came in place of an answer, with the code that it would have in a unary call."""


class _Reader:
    """The caller's side of the session: see `streams.Caller`."""

    def __init__(self) -> None:
        self.bodies: deque[bytes] = deque()
        self.error: Exception | None = None
        self.is_over = False
        self.was_full = False
        self._changed = asyncio.Event()

    def send(self, body: bytes) -> bool:
        self.bodies.append(body)
        self._changed.set()
        self.was_full = len(self.bodies) >= _AHEAD
        return not self.was_full

    def feed(self) -> None:
        """There is one request, and it has been given."""

    def finish(self, error: Exception | None) -> None:
        self.error, self.is_over = error, True
        self._changed.set()

    async def until_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()


async def parts_of(models: Models, request: Request, budget: Budget) -> AsyncGenerator[bytes, None]:
    """The answers to one request, each a serialized ModelInferResponse. Whoever stops reading must close the iterator,
    which cancels the request upstream.

    budget:  pays for answers that wait.
    :raises AnswerError: if the model answers with an error.
    :raises GatewayError: if no server can answer.
    """
    reader = _Reader()
    session = models.stream(request, reader, StreamLimits(requests=1), budget)
    try:
        session.take(request.body)
        session.end_of_requests()
        while True:
            while reader.bodies:
                answer = v2.ModelStreamInferResponse.FromString(reader.bodies.popleft())
                if answer.error_message:
                    raise _error_of(answer)
                if answer.infer_response.outputs:  # the last one may be empty
                    yield answer.infer_response.SerializeToString()
                if reader.was_full and len(reader.bodies) < _AHEAD:
                    reader.was_full = False
                    session.caller_has_room()
            if reader.is_over and not reader.bodies:
                if reader.error is not None:
                    raise reader.error
                return
            await reader.until_changed()
    finally:
        session.cancel()


def _error_of(answer: v2.ModelStreamInferResponse) -> GatewayError:
    response = answer.infer_response
    code, _ = judge_in_band(
        answer.error_message, by_model=bool(response.model_name), model=response.model_name, id=response.id
    )
    return AnswerError(code, answer.error_message)
