"""Texts in, texts out: `gateway.v1.TextService`, by a pipeline at once or by a decoupled model piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as v2

from gateway.api.calls import CallLimits, Context, request_from, with_errors
from gateway.api.typed import served_message
from gateway.errors import BadRequest, DeadlineExceeded, UnknownModel, UpstreamFailed
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Request
from gateway.forwarding.messages import build_request, parse_response, tensors_of
from gateway.forwarding.models import Models
from gateway.forwarding.streams import StreamLimits, StreamSession
from gateway.forwarding.topology import CurrentTopology
from gateway.rpc.budget import Budget
from gateway.status import Code
from gateway.steps import Array, WrongAnswer
from gateway.v1 import text_pb2, text_pb2_grpc

_QUEUED: Final = 16
"""Pieces that wait for a caller who reads slowly, before the model's stream is held."""

_ERRORS_WITH_CODES: Final = ("triton_grpc_error", "true")
"""Asks Triton to end the stream with an error's own status: one within the stream has a text and no code."""

_OUTPUTS: Final = ("text", "unknown", "complete")


class TextService(text_pb2_grpc.TextServiceServicer):  # type: ignore[misc]
    """See `text.proto`. Models have the BYTES input and output `text`; they may have the outputs `unknown` (BYTES) and
    `complete` (BOOL)."""

    def __init__(self, models: Models, topology: CurrentTopology, limits: CallLimits, budget: Budget) -> None:
        """budget: pays for the bytes that streams keep."""
        self._models = models
        self._topology = topology
        self._limits = limits
        self._budget = budget
        self.Translate = with_errors(self._translate)
        self.TranslateStream = with_errors(self._translate_stream)

    async def _translate(self, request: Any, context: Context) -> Any:
        began = time.monotonic()
        opening = request_from(context, b"", "Translate", self._limits)
        with self._models.refusals(opening, request.model):
            body = self._body_of(request, is_whole=True)
        reply = await self._models.infer(replace(opening, body=body))
        answer = _Answer(parse_response(reply.body))
        context.set_trailing_metadata(tuple(reply.trailing))
        return text_pb2.TranslateResponse(
            text=answer.text,
            complete=answer.is_complete,
            unknown=answer.unknown,
            served=served_message(reply.served, began, reply.timings),
        )

    async def _translate_stream(self, request: Any, context: Context) -> None:
        began = time.monotonic()
        opening = request_from(context, b"", "TranslateStream", self._limits)
        with self._models.refusals(opening, request.model):
            body = self._body_of(request, is_whole=False)
        asked = metadata_from_pairs((*(context.invocation_metadata() or ()), _ERRORS_WITH_CODES))
        pieces = _Pieces(self._models, replace(opening, metadata=asked), self._budget)
        unknown: dict[str, None] = {}
        is_complete = True
        try:
            pieces.ask(body)
            while (answer := await pieces.next()) is not None:
                unknown.update(dict.fromkeys(answer.unknown))
                is_complete = answer.is_complete
                if answer.text:
                    await context.write(text_pb2.TranslateStreamResponse(piece=answer.text))
        finally:
            pieces.close()
        served = served_message(replace(pieces.served, model=request.model), began, None)
        end = text_pb2.TranslationEnd(complete=is_complete, unknown=unknown, served=served)
        context.set_trailing_metadata(tuple(pieces.trailing))
        await context.write(text_pb2.TranslateStreamResponse(end=end))

    def _body_of(self, request: Any, *, is_whole: bool) -> bytes:
        """:raises GatewayError: if the model can't be asked so."""
        topology = self._topology.now
        found = topology.pipelines.get(request.model)
        if not request.model:
            raise BadRequest("model is empty; name a public model")
        name = "text"
        if found is not None:
            pipeline = found.pipeline
            if len(pipeline.inputs) != 1 or pipeline.inputs[0].datatype != "BYTES" or not _has_text(pipeline.outputs):
                raise BadRequest(
                    f"pipeline '{request.model}' is no translation: that has one BYTES input and the BYTES output "
                    "'text'; call it by PredictionService.Predict"
                )
            name = pipeline.inputs[0].name
        elif topology.routes.lookup(request.model) is None:
            raise UnknownModel(request.model)
        elif is_whole:
            raise BadRequest(f"'{request.model}' is no pipeline; a decoupled model is called by TranslateStream")
        text = np.empty((1, 1), np.object_)
        text[0, 0] = request.text.encode()
        return build_request(request.model, {name: text})


def _has_text(outputs: Any) -> bool:
    return any(spec.name == "text" and spec.datatype == "BYTES" for spec in outputs)


class _Answer:
    """A model's outputs, read."""

    def __init__(self, arrays: dict[str, tuple[str, Array]]) -> None:
        """:raises WrongAnswer: if there is no text among them."""
        datatype, texts = arrays.get("text", ("", None))
        if texts is None or datatype != "BYTES":
            raise WrongAnswer("the model's answer has no BYTES output 'text'")
        self.text = b"".join(texts.flat).decode("utf-8", "replace")
        self.unknown = [word.decode("utf-8", "replace") for word in _values(arrays, "unknown", "BYTES") if word]
        self.is_complete = all(_values(arrays, "complete", "BOOL"))


def _values(arrays: dict[str, tuple[str, Array]], name: str, datatype: str) -> list[Any]:
    found, array = arrays.get(name, ("", np.empty(0)))
    return list(array.flat) if found == datatype else []


class _Pieces:
    """The answers to one request on a stream of its own, awaited one by one. The session's caller."""

    def __init__(self, models: Models, opening: Request, budget: Budget) -> None:
        self._arrived: deque[bytes] = deque()
        self._waiting: asyncio.Future[None] | None = None  # the coroutine in `next`
        self._is_over = False
        self._error: Exception | None = None
        self._is_held = False
        self._loop = asyncio.get_running_loop()
        deadline = opening.deadline
        self._timer = self._loop.call_at(deadline.at, self._expire) if deadline is not None else None
        self._session: StreamSession = models.stream(opening, self, StreamLimits(requests=1), budget)

    def ask(self, body: bytes) -> None:
        self._session.take(body)
        self._session.end_of_requests()

    async def next(self) -> _Answer | None:
        """The next answer; None after the last.

        :raises GatewayError: if an error ended them.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._is_over:
                return None
            self._waiting = self._loop.create_future()
            await self._waiting
        body = self._arrived.popleft()
        if self._is_held and not self._arrived:
            self._is_held = False
            self._session.caller_has_room()
        response = _parse(body)
        if response.error_message:
            code, _ = self._session.last_end
            raise UpstreamFailed(Code.INTERNAL if code is Code.OK else code, response.error_message)
        return _Answer(_outputs_of(response.infer_response))

    def close(self) -> None:
        """Let the model stop, if it has not ended."""
        if self._timer is not None:
            self._timer.cancel()
        self._session.cancel()

    def _expire(self) -> None:
        self.finish(DeadlineExceeded("The deadline passed before the text was whole."))

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    @property
    def served(self) -> Any:
        return self._session.served

    @property
    def trailing(self) -> Any:
        return self._session.trailing_metadata()

    # What the session tells its caller

    def send(self, body: bytes) -> bool:
        self._arrived.append(body)
        self._wake()
        self._is_held = len(self._arrived) >= _QUEUED
        return not self._is_held

    def feed(self) -> None:
        """There are no more requests."""

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
