"""One request to a decoupled model from within this process, and its answers as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as v2

from gateway.errors import BadRequest, DeadlineExceeded, UpstreamFailed
from gateway.forwarding.exchange import Request
from gateway.forwarding.messages import tensors_of
from gateway.forwarding.models import Models
from gateway.forwarding.streams import StreamLimits, StreamSession
from gateway.rpc.budget import Budget
from gateway.status import Code
from gateway.steps import Array, WrongAnswer
from gateway.types import Metadata, Served


class AnswerError(UpstreamFailed):
    """An error that came in place of an answer, with the code that it would have in a unary call."""


class Parts:
    """The answers to one request, awaited one by one between enter and exit. Also the caller of its session.

    Whoever leaves before the last one cancels the request upstream.
    """

    def __init__(self, models: Models, request: Request, budget: Budget, *, ahead: int) -> None:
        """budget: pays for answers that wait. ahead: so many may; then the session reads no more of the upstream."""
        self._arrived: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None  # the coroutine in `next`
        self._is_over = False
        self._error: Exception | None = None
        self._ahead = ahead
        self._is_held = False
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._session: StreamSession = models.stream(request, self, StreamLimits(requests=1), budget)

    def __enter__(self) -> Parts:
        if self._request.deadline is not None:
            self._timer = self._loop.call_at(self._request.deadline.at, self._expire)
        self._session.take(self._request.body)
        self._session.end_of_requests()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._session.cancel()

    async def next(self) -> dict[str, tuple[str, Array]] | None:
        """Datatype and array of each output of the next answer, by name; None after the last.

        :raises AnswerError: if the model answers with an error.
        :raises GatewayError: if no server can answer, or the deadline has passed.
        """
        while True:
            while not self._arrived:
                if self._error is not None:
                    raise self._error
                if self._is_over:
                    return None
                self._waiting = self._loop.create_future()
                await self._waiting
            body = self._arrived.popleft()
            if self._is_held and len(self._arrived) < self._ahead:
                self._is_held = False
                self._session.caller_has_room()
            response = _parse(body)
            if response.error_message:
                code, _ = self._session.last_end
                raise AnswerError(Code.INTERNAL if code is Code.OK else code, response.error_message)
            if response.infer_response.outputs:  # the last one may have none
                return _outputs_of(response.infer_response)

    @property
    def served(self) -> Served:
        """Who answered, once somebody has."""
        served: Served = self._session.served
        return served

    @property
    def trailing(self) -> Metadata:
        return self._session.trailing_metadata()

    def _expire(self) -> None:
        self.finish(DeadlineExceeded("The deadline passed before the answer was whole."))

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # What the session tells its caller

    def send(self, body: bytes) -> bool:
        self._arrived.append(body)
        self._wake()
        self._is_held = len(self._arrived) >= self._ahead
        return not self._is_held

    def feed(self) -> None:
        """There is one request, and it has been given."""

    def finish(self, error: Exception | None) -> None:
        self._error, self._is_over = error, True
        self._wake()


def _parse(body: bytes) -> Any:
    try:
        return v2.ModelStreamInferResponse.FromString(body)
    except DecodeError as error:
        raise WrongAnswer("the model's answer can't be parsed") from error


def _outputs_of(response: Any) -> dict[str, tuple[str, Array]]:
    """As `parse_response`, of a message that is parsed already."""
    try:
        arrays = tensors_of(response.outputs, response.raw_output_contents)
    except BadRequest as error:
        raise WrongAnswer(f"the model's answer can't be read ({error})") from error
    return {output.name: (output.datatype, arrays[output.name]) for output in response.outputs}
