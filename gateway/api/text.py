"""Texts in, texts out: `gateway.v1.TextService`, by a pipeline at once or by a decoupled model piece by piece."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Final

import numpy as np

from gateway.api.calls import CallLimits, Context, request_from, with_errors
from gateway.api.parts import Parts
from gateway.api.typed import served_message
from gateway.errors import BadRequest, UnknownModel, shown
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Request
from gateway.forwarding.messages import build_request, parse_response
from gateway.forwarding.models import Models
from gateway.forwarding.topology import CurrentTopology
from gateway.rpc.budget import Budget
from gateway.steps import Array, WrongAnswer
from gateway.v1 import text_pb2, text_pb2_grpc

_AHEAD: Final = 16
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
            body = self._body_of(request, opening, is_whole=True)
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
            body = self._body_of(request, opening, is_whole=False)
        pairs = (*(context.invocation_metadata() or ()), _ERRORS_WITH_CODES)
        asked = metadata_from_pairs(pairs, opening.metadata.access)
        asking = replace(opening, metadata=asked, body=body)
        unknown: dict[str, None] = {}
        is_complete, is_answered = True, False
        with Parts(self._models, asking, self._budget, ahead=_AHEAD) as pieces:
            while (outputs := await pieces.next()) is not None:
                answer = _Answer(outputs)
                is_answered = True
                unknown.update(dict.fromkeys(answer.unknown))
                is_complete = answer.is_complete
                if answer.text:
                    await context.write(text_pb2.TranslateStreamResponse(piece=answer.text))
        if not is_answered:
            raise WrongAnswer(f"'{shown(request.model)}' ended without any text, so it is no model for this")
        served = served_message(replace(pieces.served, model=request.model), began, None)
        end = text_pb2.TranslationEnd(complete=is_complete, unknown=unknown, served=served)
        context.set_trailing_metadata(tuple(pieces.trailing))
        await context.write(text_pb2.TranslateStreamResponse(end=end))

    def _body_of(self, request: Any, opening: Request, *, is_whole: bool) -> bytes:
        """:raises GatewayError: if the model can't be asked so."""
        topology = self._topology.seen_by(opening.metadata.access)
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
