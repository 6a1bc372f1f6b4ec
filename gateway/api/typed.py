"""The typed API, `gateway.v1`: messages with named fields, answered by the same models.

Each call is turned into one V2 request and answered by `Models`, so routing, fallback and pipelines are the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as v2

from gateway.api.calls import CallLimits, Context, add_handlers, request_from, with_errors, within
from gateway.errors import BUG_TEXT, BadInput, BadRequest, GatewayError, MalformedMessage, UnknownModel
from gateway.forwarding.beside import beside
from gateway.forwarding.exchange import Reply, Request, Timings
from gateway.forwarding.messages import array_of, build_request, parse_response, read_response, weigh_and_parse
from gateway.forwarding.models import Models
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.status import Code
from gateway.steps import DATATYPES, Array, TensorSpec, WrongAnswer, to_array, to_raw
from gateway.types import Served
from gateway.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    common_pb2,
    prediction_pb2,
    prediction_pb2_grpc,
)
from gateway.v2 import weight
from gateway.v2.shapes import ImpossibleShape, elements_of

_log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Items of one stream that are processed at once: enough to fill a batch, few enough to be fair to other callers."""

_PIECE = 1 << 14
"""Elements of an answer that are converted at once."""

_DEFAULT_DATATYPES = {"floats": "FP32", "integers": "INT64", "strings": "BYTES"}


class ClassificationService(classification_pb2_grpc.ClassificationServiceServicer):  # type: ignore[misc]
    """Items in, labels out, by pipelines with one BYTES input and the outputs `label` and `score`."""

    def __init__(self, models: Models, topology: CurrentTopology, limits: CallLimits) -> None:
        self._models = models
        self._topology = topology
        self._limits = limits
        self.Classify = with_errors(self._classify)
        self.StreamClassify = stream_handler(self._classify_item, classification_pb2.StreamClassifyResponse, limits)

    async def _classify(self, request: Any, context: Context) -> Any:
        reply, answer = await self._answer(request, request_from(context, b"", "Classify", self._limits))
        context.set_trailing_metadata(tuple(reply.trailing))
        return answer

    async def _classify_item(self, request: Any, opening: Request) -> Any:
        _, answer = await self._answer(request, replace(opening, method="StreamClassify"))
        return answer

    async def _answer(self, request: Any, opening: Request) -> tuple[Reply, Any]:
        began = time.monotonic()
        with self._models.refusals(opening, request.model):
            body = self._body_of(request, opening)
        reply, took = await timed_infer(self._models, replace(opening, body=body))
        arrays = parse_response(reply.body)
        labels, scores = (arrays[name][1].ravel() for name in ("label", "score"))
        if len(labels) != len(scores):
            raise WrongAnswer(f"'{request.model}' made {len(labels)} labels and {len(scores)} scores")
        answer = classification_pb2.ClassifyResponse(served=served_of(reply, began, took))
        for name, score in list(zip(labels, scores, strict=True))[: request.max_labels or None]:
            answer.labels.add(name=name.decode("utf-8", "replace"), score=score)
        return reply, answer

    def _body_of(self, request: Any, opening: Request) -> bytes:
        """:raises GatewayError: if it can't be a request of a pipeline."""
        spec = self._input_of(request.model, self._topology.seen_by(opening.metadata.access))
        item = np.empty((1, *(1 for _ in spec.shape)), np.object_)
        item[...] = _item(request)
        return build_request(request.model, {spec.name: item}, outputs=("label", "score"))

    @staticmethod
    def _input_of(model: str, topology: Topology) -> TensorSpec:
        """:raises GatewayError: if `model` is no classification pipeline."""
        found = topology.pipelines.get(model)
        if found is None:
            raise no_pipeline(model, topology)
        pipeline = found.pipeline
        outputs = {spec.name: spec.datatype for spec in pipeline.outputs}
        makes_labels = outputs.get("label") == "BYTES" and outputs.get("score") in ("FP32", "FP64")
        if len(pipeline.inputs) != 1 or pipeline.inputs[0].datatype != "BYTES" or not makes_labels:
            raise BadRequest(
                f"pipeline '{model}' is no classification: that has one BYTES input and the outputs "
                "'label' (BYTES) and 'score' (FP32 or FP64); call it by PredictionService.Predict"
            )
        return pipeline.inputs[0]


class PredictionService(prediction_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Any public model on named tensors."""

    def __init__(self, models: Models, limits: CallLimits) -> None:
        self._models = models
        self._limits = limits
        self.Predict = with_errors(self._predict)
        self.StreamPredict = stream_handler(
            self._predict_item, prediction_pb2.StreamPredictResponse, limits, _read_streamed
        )

    async def _predict(self, body: bytes, context: Context) -> Any:
        request = await _read(body, prediction_pb2.PredictRequest, weight.PREDICT_REQUEST)
        reply, answer = await self._answer(request, request_from(context, b"", "Predict", self._limits))
        context.set_trailing_metadata(tuple(reply.trailing))
        return answer

    async def _predict_item(self, request: Any, opening: Request) -> Any:
        _, answer = await self._answer(request, replace(opening, method="StreamPredict"))
        return answer

    async def _answer(self, request: Any, opening: Request) -> tuple[Reply, Any]:
        began = time.monotonic()
        with self._models.refusals(opening, request.model):
            body = await beside(_is_brief_request(request), partial(_body_of, request))
        reply, took = await timed_infer(self._models, replace(opening, body=body))
        arrays = await read_response(reply.body)
        is_brief = sum(array.size for _, array in arrays.values()) * weight.TEXT <= weight.BRIEF
        outputs = await beside(is_brief, partial(_outputs_of, arrays))
        outputs.served.CopyFrom(served_of(reply, began, took))
        return reply, outputs


def add_prediction_service(service: PredictionService, server: Any) -> None:
    """As grpcio's generated function, but that requests stay bytes: a heavy one is parsed beside the event loop.

    server: a gateway.transport server.
    """
    handlers = {
        "Predict": grpc.unary_unary_rpc_method_handler(
            service.Predict, response_serializer=prediction_pb2.PredictResponse.SerializeToString
        ),
        "StreamPredict": grpc.stream_stream_rpc_method_handler(
            service.StreamPredict, response_serializer=prediction_pb2.StreamPredictResponse.SerializeToString
        ),
    }
    add_handlers(server, "gateway.v1.PredictionService", handlers)


async def _read(body: bytes, message: type[Any], parts: weight.Parts) -> Any:
    """A message of this class.

    :raises MalformedMessage: if it is none.
    :raises TooHeavy: before anything is made of it.
    """

    try:
        return (await weigh_and_parse(body, parts, message.FromString))[1]
    except DecodeError as error:
        raise MalformedMessage("The request message can't be parsed") from error


async def _read_streamed(body: bytes) -> Any:
    return await _read(body, prediction_pb2.StreamPredictRequest, weight.STREAM_PREDICT_REQUEST)


def _is_brief_request(request: Any) -> bool:
    """Does the request have so few elements that they may be converted on the event loop?"""
    units = len(request.outputs) * weight.TEXT
    for tensor in request.inputs.values():
        kind = tensor.WhichOneof("content")
        if kind == "raw":
            units += len(tensor.raw) // 4 * weight.TEXT if tensor.datatype == "BYTES" else 0
        elif kind is not None:
            units += len(getattr(tensor, kind).values) * (weight.TEXT if kind == "strings" else weight.NUMBER)
    return units <= weight.BRIEF


def _outputs_of(arrays: Mapping[str, tuple[str, Array]]) -> Any:
    answer = prediction_pb2.PredictResponse()
    for name, (datatype, array) in arrays.items():
        _fill(answer.outputs[name], datatype, array)
    return answer


def _body_of(request: Any) -> bytes:
    """A PredictRequest as a ModelInferRequest.

    :raises GatewayError: if it can't be one.
    """
    if not request.model:
        raise BadRequest("model is empty; name a public model")
    message = v2.ModelInferRequest(model_name=request.model, model_version=request.model_version)
    for key, value in request.parameters.items():
        message.parameters[key].string_param = value
    if sum(map(_texts_of, request.inputs.values())) * weight.TEXT > weight.MOST:
        raise weight.too_heavy()
    for name, tensor in request.inputs.items():
        datatype, shape, raw = _raw_of(name, tensor)
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw)
    for name in request.outputs:
        message.outputs.add(name=name)
    return bytes(message.SerializeToString())


def no_pipeline(model: str, topology: Topology) -> GatewayError:
    known = ", ".join(topology.pipelines) or "none is configured"
    if not model:
        return BadRequest(f"model is empty; pipelines: {known}")
    if topology.routes.lookup(model) is not None:
        return BadRequest(
            f"'{model}' is no pipeline; pipelines: {known}. Call it by PredictionService.Predict or ModelInfer"
        )
    return UnknownModel(model)


def _item(request: Any) -> bytes:
    kind = request.WhichOneof("item")
    if kind is None:
        raise BadInput("item is missing; set image, text or file")
    return request.text.encode() if kind == "text" else bytes(getattr(request, kind))


def _raw_of(name: str, tensor: Any) -> tuple[str, list[int], bytes]:
    """Datatype, shape and raw contents of a typed tensor.

    :raises BadInput: if they don't fit together.
    """
    kind = tensor.WhichOneof("content")
    if kind is None:
        raise BadInput(f"input '{name}' has no content; set raw, floats, integers or strings")
    datatype = tensor.datatype or _DEFAULT_DATATYPES.get(kind, "")
    if datatype not in DATATYPES:
        raise BadInput(f"input '{name}': datatype is '{datatype[:40]}'; known: {', '.join(DATATYPES)}")
    if kind == "raw":
        to_array(name, datatype, tensor.shape, tensor.raw)  # checks the size
        return datatype, list(tensor.shape), tensor.raw
    if kind != _list_for(datatype):
        raise BadInput(f"input '{name}': {datatype} contents come as {_list_for(datatype)} or raw")
    values = getattr(tensor, kind).values
    array = array_of(name, datatype, tensor.shape or [len(values)], values)
    return datatype, list(array.shape), to_raw(datatype, array)


def _texts_of(tensor: Any) -> int:
    """How many texts a tensor of raw contents can have; lists are counted before they are parsed."""
    if tensor.datatype != "BYTES" or tensor.WhichOneof("content") != "raw":
        return 0
    try:
        return min(elements_of(tensor.shape), len(tensor.raw) // 4)
    except ImpossibleShape:
        return 0  # it is refused by its shape


def _list_for(datatype: str) -> str:
    if datatype == "BYTES":
        return "strings"
    return "floats" if datatype in ("FP16", "FP32", "FP64", "BF16") else "integers"


def _fill(tensor: Any, datatype: str, array: Array) -> None:
    """Fill an answer's tensor: a typed list for its datatype, or raw bytes if no list can hold it."""
    tensor.datatype = datatype
    tensor.shape.extend(array.shape)
    if datatype == "UINT64" or array.size * weight.NUMBER > weight.MOST:
        tensor.raw = to_raw(datatype, array)
        return
    content = getattr(tensor, _list_for(datatype))
    content.SetInParent()  # a list without elements is still the content that is set
    flat = array.ravel()
    for at in range(0, len(flat), _PIECE):  # the interpreter's lock is kept for a piece
        piece = flat[at : at + _PIECE]
        content.values.extend((piece.astype(np.int64) if piece.dtype == np.bool_ else piece).tolist())


async def timed_infer(models: Models, request: Request) -> tuple[Reply, float]:
    """The answer, and the seconds that it took."""
    began = time.monotonic()
    reply = await models.infer(request)
    return reply, time.monotonic() - began


def served_of(reply: Reply, began: float, took: float) -> Any:
    """began: when the request arrived. took: seconds of its inference, which is the model's time if no pipeline ran."""
    return served_message(reply.served, began, reply.timings or Timings(model=took))


def served_message(served: Served, began: float, timings: Timings | None) -> Any:
    """A common_pb2.Served. timings: None if all the time since `began` was the model's."""
    timings = timings or Timings(model=time.monotonic() - began)
    message = common_pb2.Served(
        model=served.model,
        variant=served.variant,
        model_version=served.model_version,
        endpoint=served.endpoint,
        attempts=served.attempts,
    )
    message.timings.total.CopyFrom(_duration(time.monotonic() - began))
    message.timings.preprocess.CopyFrom(_duration(timings.preprocess))
    message.timings.model.CopyFrom(_duration(timings.model))
    message.timings.postprocess.CopyFrom(_duration(timings.postprocess))
    return message


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def stream_handler(
    answer_item: Callable[[Any, Request], Awaitable[Any]],
    response: type[Any],
    limits: CallLimits,
    parse: Callable[[Any], Awaitable[Any]] | None = None,
) -> Callable[[AsyncIterator[Any], Context], Awaitable[None]]:
    """A stream handler that works on several items at a time and answers in their order.

    parse:  makes an item of the bytes that came; without it they come parsed. What it raises ends the stream, since
            who an item is from is in it.
    """

    async def answer(item: Any, opening: Request) -> Any:
        try:
            return response(id=item.id, response=await answer_item(item.request, within(opening, limits)))
        except GatewayError as error:
            return response(id=item.id, error=common_pb2.StreamError(code=error.code, message=error.text))
        except Exception:  # ends this item, and none of the others
            _log.exception("unforeseen failure in an item of a stream")
            return response(id=item.id, error=common_pb2.StreamError(code=Code.INTERNAL, message=BUG_TEXT))

    async def handle(items: AsyncIterator[Any], context: Context) -> None:
        opening = request_from(context, b"", "", CallLimits())  # a stream may last
        room = asyncio.Semaphore(_AT_ONCE)
        in_order: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        under_way: set[asyncio.Task[Any]] = set()

        def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
            task = asyncio.ensure_future(work)
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            return task

        async def read() -> None:
            try:
                async for item in items:
                    await room.acquire()
                    parsed = await parse(item) if parse is not None else item
                    in_order.put_nowait(begin(answer(parsed, opening)))
            finally:
                in_order.put_nowait(None)

        reading = begin(read())
        try:
            while (task := await in_order.get()) is not None:
                await context.write(await task)
                room.release()
            await reading
        finally:
            left = list(under_way)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    return with_errors(handle)
