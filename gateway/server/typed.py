"""The typed API, `gateway.v1`: messages for people in, the same models behind it.

Each call is turned into one V2 request and answered by `Models`, so routing, fallback and pipelines are the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from tritonclient.grpc import service_pb2 as v2

from gateway.errors import BadInput, BadRequest, GatewayError, UnknownModel
from gateway.infer.exchange import Reply, Request
from gateway.infer.inference import Inference
from gateway.infer.messages import build_request, parse_response
from gateway.infer.models import Models
from gateway.server.calls import CallLimits, Context, request_from, with_errors
from gateway.stages import DATATYPES, Array, dtype_of, to_array, to_raw
from gateway.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    common_pb2,
    prediction_pb2,
    prediction_pb2_grpc,
)

_AT_ONCE = 16
"""Items of one stream that are worked on at a time: enough to fill a batch, few enough to be fair."""


class ClassificationService(classification_pb2_grpc.ClassificationServiceServicer):  # type: ignore[misc]
    """Items in, labels out, by pipelines with one BYTES input and the outputs `label` and `score`."""

    def __init__(self, models: Models, limits: CallLimits) -> None:
        self._models = models
        self._limits = limits
        self.Classify = with_errors(self._classify)
        self.StreamClassify = _stream(self._classify_item, classification_pb2.StreamClassifyResponse, limits)

    async def _classify(self, request: Any, context: Context) -> Any:
        reply, answer = await self._answer(request, request_from(context, b"", "Classify", self._limits))
        context.set_trailing_metadata(tuple(reply.trailing))
        return answer

    async def _classify_item(self, request: Any, opening: Request) -> Any:
        _, answer = await self._answer(request, replace(opening, method="StreamClassify"))
        return answer

    async def _answer(self, request: Any, opening: Request) -> tuple[Reply, Any]:
        began = time.monotonic()
        pipeline = self._models.inference.topology.pipelines.get(request.model)
        if pipeline is None:
            raise _no_classifier(request.model, self._models.inference)
        inputs, outputs = pipeline.pipeline.inputs, {spec.name for spec in pipeline.pipeline.outputs}
        if len(inputs) != 1 or inputs[0].datatype != "BYTES" or not {"label", "score"} <= outputs:
            raise BadRequest(
                f"pipeline '{request.model}' is no classification: that has one BYTES input and the outputs "
                "'label' and 'score'; call it by PredictionService.Predict"
            )
        item = np.empty((1, *(1 for _ in inputs[0].shape)), np.object_)
        item[...] = _item(request)
        body = build_request(request.model, {inputs[0].name: item}, outputs=("label", "score"))
        reply = await self._models.infer(replace(opening, body=body))
        arrays = parse_response(reply.body)
        answer = classification_pb2.ClassifyResponse(served=_served(reply, began))
        most = request.max_labels or None
        for name, score in list(zip(arrays["label"].ravel(), arrays["score"].ravel(), strict=True))[:most]:
            answer.labels.add(name=name.decode("utf-8", "replace"), score=score)
        return reply, answer


class PredictionService(prediction_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Any public model on named tensors."""

    def __init__(self, models: Models, limits: CallLimits) -> None:
        self._models = models
        self._limits = limits
        self.Predict = with_errors(self._predict)
        self.StreamPredict = _stream(self._predict_item, prediction_pb2.StreamPredictResponse, limits)

    async def _predict(self, request: Any, context: Context) -> Any:
        reply, answer = await self._answer(request, request_from(context, b"", "Predict", self._limits))
        context.set_trailing_metadata(tuple(reply.trailing))
        return answer

    async def _predict_item(self, request: Any, opening: Request) -> Any:
        _, answer = await self._answer(request, replace(opening, method="StreamPredict"))
        return answer

    async def _answer(self, request: Any, opening: Request) -> tuple[Reply, Any]:
        began = time.monotonic()
        if not request.model:
            raise BadRequest("model is empty; name a public model")
        message = v2.ModelInferRequest(model_name=request.model, model_version=request.model_version)
        for key, value in request.parameters.items():
            message.parameters[key].string_param = value
        for name, tensor in request.inputs.items():
            datatype, shape, raw = _raw_of(name, tensor)
            message.inputs.add(name=name, datatype=datatype, shape=shape)
            message.raw_input_contents.append(raw)
        for name in request.outputs:
            message.outputs.add(name=name)
        reply = await self._models.infer(replace(opening, body=message.SerializeToString()))
        response = v2.ModelInferResponse.FromString(reply.body)
        answer = prediction_pb2.PredictResponse(served=_served(reply, began))
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            tensor = answer.outputs[output.name]
            tensor.datatype = output.datatype
            tensor.shape.extend(output.shape)
            _fill(tensor, output, raw)
        return reply, answer


def _no_classifier(model: str, inference: Inference) -> GatewayError:
    known = ", ".join(inference.topology.pipelines) or "none is configured"
    if not model:
        return BadRequest(f"model is empty; pipelines: {known}")
    if inference.topology.routes.lookup(model) is not None:
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
    default = {"floats": "FP32", "integers": "INT64", "strings": "BYTES"}.get(kind, "")
    datatype = tensor.datatype or default
    if datatype not in DATATYPES:
        raise BadInput(f"input '{name}': datatype is '{datatype[:40]}'; known: {', '.join(DATATYPES)}")
    if kind == "raw":
        to_array(name, datatype, tensor.shape, tensor.raw)  # checks the size
        return datatype, list(tensor.shape), tensor.raw
    array = _from_list(name, kind, datatype, list(getattr(tensor, kind).values))
    shape = list(tensor.shape) or [len(array)]
    if any(size < 0 for size in shape) or int(np.prod(shape, dtype=object)) != len(array):
        raise BadInput(f"input '{name}': shape {shape} does not fit {len(array)} elements")
    return datatype, shape, to_raw(datatype, array)


def _from_list(name: str, kind: str, datatype: str, values: list[Any]) -> Array:
    """Any: floats, integers or bytes, by `kind`."""
    wants = {"FP16": "floats", "FP32": "floats", "FP64": "floats", "BF16": "floats", "BYTES": "strings"}
    if kind != wants.get(datatype, "integers"):
        raise BadInput(f"input '{name}': {datatype} contents come as {wants.get(datatype, 'integers')} or raw")
    array = np.empty(len(values), dtype_of(datatype))
    try:
        array[:] = values
    except OverflowError:
        raise BadInput(f"input '{name}': a value does not fit {datatype}") from None
    return array


def _fill(tensor: Any, output: Any, raw: bytes) -> None:
    """Give an answer's tensor the list that reads best, or raw bytes where no list can hold it."""
    if output.datatype == "UINT64":
        tensor.raw = raw
        return
    flat = to_array(output.name, output.datatype, output.shape, raw).ravel()
    if output.datatype == "BYTES":
        tensor.strings.values.extend(flat)
    elif flat.dtype.kind == "f":
        tensor.floats.values.extend(flat.astype(np.float64))
    else:
        tensor.integers.values.extend(flat.astype(np.int64))


def _served(reply: Reply, began: float) -> Any:
    served = reply.served
    message = common_pb2.Served(
        model=served.model,
        variant=served.variant,
        model_version=served.model_version,
        endpoint=served.endpoint,
        attempts=served.attempts,
    )
    total = time.monotonic() - began
    timings = reply.timings
    message.timings.total.CopyFrom(_duration(total))
    message.timings.model.CopyFrom(_duration(timings.model if timings else total))
    if timings:
        message.timings.preprocess.CopyFrom(_duration(timings.preprocess))
        message.timings.postprocess.CopyFrom(_duration(timings.postprocess))
    return message


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _stream(
    answer_item: Callable[[Any, Request], Awaitable[Any]], response: type[Any], limits: CallLimits
) -> Callable[[AsyncIterator[Any], Context], Awaitable[None]]:
    """A stream handler that works on several items at a time and answers in their order."""

    async def answer(item: Any, opening: Request) -> Any:
        try:
            return response(id=item.id, response=await answer_item(item.request, opening))
        except GatewayError as error:
            return response(id=item.id, error=common_pb2.StreamError(code=error.code, message=error.text))

    async def handle(items: AsyncIterator[Any], context: Context) -> None:
        opening = request_from(context, b"", "", limits)
        ahead: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(_AT_ONCE)
        reading = asyncio.ensure_future(_read(items, opening, ahead, answer))
        try:
            while (task := await ahead.get()) is not None:
                await context.write(await task)
            await reading
        finally:
            reading.cancel()
            while not ahead.empty():
                left = ahead.get_nowait()
                if left is not None:
                    left.cancel()

    return with_errors(handle)


async def _read(
    items: AsyncIterator[Any],
    opening: Request,
    ahead: asyncio.Queue[asyncio.Task[Any] | None],
    answer: Callable[[Any, Request], Awaitable[Any]],
) -> None:
    try:
        async for item in items:
            task = asyncio.ensure_future(answer(item, opening))
            try:
                await ahead.put(task)
            except BaseException:
                task.cancel()
                raise
    finally:
        await ahead.put(None)
