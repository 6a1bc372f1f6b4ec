"""The typed API for pages: one in, its lines of text out, by any pipeline that has the outputs of reading."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from gateway.api.calls import CallLimits, Context, request_from, with_errors
from gateway.api.typed import no_pipeline, served_of, timed_infer
from gateway.errors import BadInput, BadRequest
from gateway.forwarding.messages import build_request, read_response
from gateway.forwarding.models import Models
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.steps import Array, TensorSpec, WrongAnswer
from gateway.v1 import reading_pb2, reading_pb2_grpc

_OUTPUTS: Final = (
    TensorSpec("text", "BYTES", (-1,)),
    TensorSpec("score", "FP32", (-1,)),
    TensorSpec("box", "FP32", (-1, 4, 2)),
    TensorSpec("lines", "INT32", (1,)),
)
"""What a reading pipeline makes; `lines` says how many of the others count."""


class ReadingService(reading_pb2_grpc.ReadingServiceServicer):  # type: ignore[misc]
    """Pages in, lines out, by pipelines with one BYTES input and the outputs of `_OUTPUTS`."""

    def __init__(self, models: Models, topology: CurrentTopology, limits: CallLimits) -> None:
        self._models = models
        self._topology = topology
        self._limits = limits
        self.Read = with_errors(self._read)

    async def _read(self, request: Any, context: Context) -> Any:
        began = time.monotonic()
        opening = request_from(context, b"", "Read", self._limits)
        with self._models.refusals(opening, request.model):
            body = self._body_of(request, self._topology.seen_by(opening.metadata.access))
        reply, took = await timed_infer(self._models, replace(opening, body=body))
        arrays = {name: array for name, (_, array) in (await read_response(reply.body)).items()}
        answer = reading_pb2.ReadResponse(served=served_of(reply, began, took))
        answer.lines.extend(_lines(request.model, arrays))
        context.set_trailing_metadata(tuple(reply.trailing))
        return answer

    def _body_of(self, request: Any, topology: Topology) -> bytes:
        """:raises GatewayError: if it can't be a request of a reading pipeline."""
        spec = self._input_of(request.model, topology)
        if not request.page:
            raise BadInput("page is empty; send an encoded picture: JPEG, PNG or WebP")
        page = np.empty((1, *(1 for _ in spec.shape)), np.object_)
        page[...] = request.page
        return build_request(request.model, {spec.name: page}, outputs=[each.name for each in _OUTPUTS])

    @staticmethod
    def _input_of(model: str, topology: Topology) -> TensorSpec:
        """:raises GatewayError: if `model` is no reading pipeline."""
        found = topology.pipelines.get(model)
        if found is None:
            raise no_pipeline(model, topology)
        pipeline = found.pipeline
        made = {spec.name: spec for spec in pipeline.outputs}
        reads = all(spec.name in made and spec.agrees(made[spec.name]) for spec in _OUTPUTS)
        if len(pipeline.inputs) != 1 or pipeline.inputs[0].datatype != "BYTES" or not reads:
            outputs = ", ".join(f"'{spec.name}' ({spec})" for spec in _OUTPUTS)
            raise BadRequest(
                f"pipeline '{model}' does not read: that has one BYTES input and the outputs {outputs}; "
                "call it by PredictionService.Predict"
            )
        return pipeline.inputs[0]


def _lines(model: str, arrays: dict[str, Array]) -> Iterator[Any]:
    """The Line messages of the first page. raises: WrongAnswer if the outputs do not fit together."""
    text, score, box = (arrays[spec.name][0] for spec in _OUTPUTS[:3])
    count = int(arrays["lines"][0, 0])
    if not count <= min(len(text), len(score), len(box)):
        raise WrongAnswer(f"'{model}' says it read {count} lines and made {len(text)}, {len(score)} and {len(box)}")
    for number in range(count):
        corners = [reading_pb2.Point(x=x, y=y) for x, y in box[number].tolist()]
        yield reading_pb2.Line(text=text[number].decode("utf-8", "replace"), score=score[number], corners=corners)
