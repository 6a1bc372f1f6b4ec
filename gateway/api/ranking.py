"""Candidates in, an order out: `gateway.v1.RankingService`, by pipelines with the inputs `history` and `candidates`."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from gateway.api.calls import CallLimits, Context, add_handlers, request_from, with_errors
from gateway.api.typed import served_message
from gateway.errors import BadInput, BadRequest, MalformedMessage, UnknownModel
from gateway.forwarding.beside import beside
from gateway.forwarding.messages import build_request, parse_response
from gateway.forwarding.models import Models
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.steps import Array, WrongAnswer
from gateway.v1 import ranking_pb2

_MOST_BYTES: Final = 4 << 20
"""Of a request: some million candidates. A larger one is refused before it is parsed, which keeps the interpreter."""

_BRIEF: Final = 1 << 13  # bytes of a request that is read on the event loop: up to 100 µs

_INPUTS: Final = ("history", "candidates")
_OUTPUTS: Final = {"items": "INT32", "best": "FP32"}
_INT32_MOST: Final = 2**31 - 1


class RankingService:
    """See `ranking.proto`."""

    def __init__(self, models: Models, topology: CurrentTopology, limits: CallLimits) -> None:
        self._models = models
        self._topology = topology
        self._limits = limits
        self.Rank = with_errors(self._rank)

    async def _rank(self, body: bytes, context: Context) -> Any:
        began = time.monotonic()
        opening = request_from(context, b"", "Rank", self._limits)
        with self._models.refusals(opening, ""):
            request = await beside(len(body) <= _BRIEF, partial(_parse, body))
        with self._models.refusals(opening, request.model):
            self._check(request.model, self._topology.seen_by(opening.metadata.access))
            asked = await beside(len(body) <= _BRIEF, partial(_body_of, request))
        reply = await self._models.infer(replace(opening, body=asked))
        context.set_trailing_metadata(tuple(reply.trailing))
        arrays = parse_response(reply.body)
        items, scores = (arrays[name][1].ravel() for name in _OUTPUTS)
        if len(items) != len(scores):
            raise WrongAnswer(f"'{request.model}' made {len(items)} items and {len(scores)} scores")
        if np.isnan(scores).any():  # what is beside no number has no place in an order
            raise WrongAnswer(f"'{request.model}' made scores that are no numbers")
        served = served_message(reply.served, began, reply.timings)
        return await beside(len(items) <= _BRIEF, partial(_answer, items, scores, request.top, served))

    @staticmethod
    def _check(model: str, topology: Topology) -> None:
        """:raises GatewayError: if it is no pipeline that ranks."""
        found = topology.pipelines.get(model)
        if found is None:
            if not model:
                raise BadRequest("model is empty; name a public model")
            if topology.routes.lookup(model) is None:
                raise UnknownModel(model)
            raise BadRequest(f"'{model}' is no pipeline; call it by PredictionService.Predict or ModelInfer")
        inputs = {spec.name: spec.datatype for spec in found.pipeline.inputs}
        outputs = {spec.name: spec.datatype for spec in found.pipeline.outputs}
        if inputs != dict.fromkeys(_INPUTS, "INT32") or not _OUTPUTS.items() <= outputs.items():
            raise BadRequest(
                f"pipeline '{model}' is no ranking: that has the INT32 inputs 'history' and 'candidates' and the "
                "outputs 'items' (INT32) and 'best' (FP32); call it by PredictionService.Predict"
            )


def add_ranking_service(service: RankingService, server: Any) -> None:
    """As grpcio's generated function, but that requests stay bytes, to be looked at before they are parsed.

    server: a gateway.transport server.
    """
    serializer = ranking_pb2.RankResponse.SerializeToString
    handlers = {"Rank": grpc.unary_unary_rpc_method_handler(service.Rank, response_serializer=serializer)}
    add_handlers(server, "gateway.v1.RankingService", handlers)


def _parse(body: bytes) -> Any:
    if len(body) > _MOST_BYTES:
        raise BadInput(
            f"the request has {len(body)} bytes, more candidates than can be ranked at once: at most {_MOST_BYTES} "
            "bytes are read; send fewer candidates, such as those that a search has found"
        )
    try:
        return ranking_pb2.RankRequest.FromString(body)
    except DecodeError as error:
        raise MalformedMessage("The request message can't be parsed") from error


def _body_of(request: Any) -> bytes:
    arrays = {}
    for name in _INPUTS:
        numbers = np.fromiter(getattr(request, name), np.uint32)
        if numbers.size and numbers.max() > _INT32_MOST:
            raise BadInput(f"input '{name}': item {numbers.max()} does not exist; items are below {_INT32_MOST}")
        arrays[name] = numbers.astype(np.int32)[None]
    return build_request(request.model, arrays, outputs=tuple(_OUTPUTS))


def _answer(items: Array, scores: Array, top: int, served: Any) -> Any:
    count = min(len(items), top or len(items))
    answer = ranking_pb2.RankResponse(served=served)
    for item, score in zip(items[:count].tolist(), scores[:count].tolist(), strict=True):
        answer.items.add(item=item, score=score)
    return answer
