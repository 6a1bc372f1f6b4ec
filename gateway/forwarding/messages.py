"""V2 messages as named arrays and back, for pipelines, whose tensors the gateway itself must read.

Uses the protobuf classes; pure otherwise. Forwarded requests never come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput, BadRequest, MalformedMessage
from gateway.forwarding.beside import beside
from gateway.steps import Array, Tensors, WrongAnswer, datatype_of, dtype_of, raw_view, to_array
from gateway.types import Buffer
from gateway.v2.peek import RAW_INPUT, RAW_OUTPUT, with_raw
from gateway.v2.shapes import ImpossibleShape, elements_of, shown
from gateway.v2.weight import (
    BRIEF,
    MOST,
    TEXT,
    V2_REQUEST,
    V2_RESPONSE,
    Parts,
    maybe_brief,
    too_heavy,
    weigh,
    weight_of_texts,
)

_T = TypeVar("_T")

_TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


_FRONT: Final = 1 << 16
"""Bytes of an answer that are searched for its datatypes; a server writes them before the raw contents."""

_AT_ONCE: Final = 1 << 14
"""Elements that are converted at once: numpy holds the interpreter's lock meanwhile."""


async def read_request(body: bytes) -> tuple[int, Any]:
    """The weight of a ModelInferRequest without its raw contents, and the message.

    :raises MalformedMessage: if it is none.
    :raises TooHeavy: before anything is made of it.
    """
    return await weigh_and_parse(body, V2_REQUEST, parse_request)


async def weigh_and_parse(body: bytes, parts: Parts, parse: Callable[[bytes], _T]) -> tuple[int, _T]:
    """A message's weight (`v2.weight`) and what `parse` makes of it, beside the event loop if it is heavy.

    :raises MalformedMessage: if it is no protobuf message.
    :raises TooHeavy: before it is parsed.
    """
    weight = maybe_brief(body, parts)
    if weight is not None:
        return weight, parse(body)
    return await beside(False, lambda: (weigh(body, parts), parse(body)))


def parse_request(body: bytes) -> Any:
    """A pb.ModelInferRequest (Any: protobuf classes carry no types). It must not be too heavy: see `read_request`.

    :raises MalformedMessage: if the body is no such message.
    """
    try:
        return pb.ModelInferRequest.FromString(body)
    except DecodeError as error:
        raise MalformedMessage("The request is no valid ModelInferRequest.") from error


def tensors_of(named: Sequence[Any], raw: Sequence[bytes]) -> dict[str, Array]:
    """The inputs of a request, or outputs of a response, as arrays by name.

    named:   the `inputs` or `outputs` messages.
    raw:     `raw_input_contents` or `raw_output_contents`: one for each, or none if all have typed contents.
    raises:  BadInput, with the name of the tensor, if one is wrong.

    Raw texts become many objects: who calls this has weighed them (`v2.weight.weight_of_texts`).
    """
    if raw and len(raw) != len(named):
        raise BadInput(f"raw contents are given for {len(raw)} tensors, but {len(named)} are declared; each needs one")
    arrays: dict[str, Array] = {}
    for number, tensor in enumerate(named):
        if tensor.name in arrays:
            raise BadInput(f"input '{tensor.name}' is given twice")
        if "shared_memory_region" in tensor.parameters:
            raise BadInput(f"input '{tensor.name}': pipelines take no shared memory; send the contents")
        if raw:
            if tensor.HasField("contents"):
                raise BadInput(f"input '{tensor.name}' has both raw and typed contents; send one of them")
            arrays[tensor.name] = to_array(tensor.name, tensor.datatype, tensor.shape, raw[number])
        else:
            arrays[tensor.name] = _typed(tensor)
    return arrays


def _typed(tensor: Any) -> Array:
    field = _TYPED_FIELDS.get(tensor.datatype)
    if field is None:
        shown = tensor.datatype[:40] or "no datatype"
        raise BadInput(f"input '{tensor.name}': {shown} has no typed contents; send raw contents")
    return array_of(tensor.name, tensor.datatype, tensor.shape, getattr(tensor.contents, field))


def array_of(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """An array from a list of its elements.

    name:    the tensor's, for the error.
    values:  row-major; bytes for BYTES, floats for floating-point datatypes, else integers or bools.
    raises:  BadInput if their number is not that of the shape, or one does not fit the datatype.
    """
    try:
        count = elements_of(shape)
    except ImpossibleShape as error:
        raise BadInput(f"input '{name}': {error}") from None
    if count != len(values):
        raise BadInput(f"input '{name}': shape {shown(shape)} does not fit {len(values)} elements")
    try:
        return _narrowed(dtype_of(datatype), values).reshape(tuple(shape))
    except OverflowError:
        raise BadInput(f"input '{name}': a value does not fit {datatype}") from None
    except ValueError:  # a size of zero beside sizes that numpy can't address
        raise BadInput(f"input '{name}': shape {shown(shape)} is not possible") from None


def _narrowed(dtype: np.dtype[Any], values: Sequence[Any]) -> Array:
    """The values as an array. raises: OverflowError if one would become an infinity or wrap around."""
    if len(values) > _AT_ONCE:
        pieces = range(0, len(values), _AT_ONCE)
        return np.concatenate([_narrowed(dtype, values[at : at + _AT_ONCE]) for at in pieces])
    if dtype.kind == "O":
        array = np.empty(len(values), dtype)
        array[:] = list(values)
        return array
    if dtype.kind == "f":
        wide = np.array(values, np.float64)
        with np.errstate(over="ignore"):
            array = wide.astype(dtype)
        lost = np.isinf(array) & np.isfinite(wide)
    else:
        if dtype.kind == "u" and min(values, default=0) < 0:
            raise OverflowError
        wide = np.array(values, np.uint64 if dtype == np.uint64 else np.int64)
        array = wide.astype(dtype)
        lost = array != wide
    if lost.any():
        raise OverflowError
    return array


def build_request(
    model: str,
    tensors: Tensors,
    *,
    outputs: Sequence[str] = (),
    version: str = "",
    id: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> bytes:
    """A serialized ModelInferRequest with raw contents. Arguments as of `request_parts`."""
    front, raw = request_parts(model, tensors, outputs=outputs, version=version, id=id, parameters=parameters)
    return with_raw(front, RAW_INPUT, raw)


def request_parts(
    model: str,
    tensors: Tensors,
    *,
    outputs: Sequence[str] = (),
    version: str = "",
    id: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> tuple[bytes, list[Buffer]]:
    """A serialized ModelInferRequest without raw contents, and these. parameters: InferParameter messages by key."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for key, parameter in (parameters or {}).items():
        request.parameters[key].CopyFrom(parameter)
    raw: list[Buffer] = []
    for name, array in tensors.items():
        datatype = datatype_of(array)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        raw.append(raw_view(datatype, array))
    for name in outputs:
        request.outputs.add(name=name)
    return request.SerializeToString(), raw


def parse_response(body: bytes) -> dict[str, tuple[str, Array]]:
    """Datatype and array of each output of a serialized ModelInferResponse, by name.

    :raises WrongAnswer: if the body is no such message: an error of an upstream is not the caller's fault.
    """
    with _blaming_the_model():
        weigh(body, V2_RESPONSE)
        return _outputs_of(body)


async def read_response(body: bytes) -> dict[str, tuple[str, Array]]:
    """As `parse_response`, beside the event loop if the body is heavy."""
    if _has_few_texts(body):
        with _blaming_the_model():
            return (await weigh_and_parse(body, V2_RESPONSE, _outputs_of))[1]
    return await beside(False, partial(parse_response, body))


def _has_few_texts(body: bytes) -> bool:
    """Are there surely no more than the event loop may read? Each has four raw bytes, and its tensor says BYTES."""
    return len(body) // 4 * TEXT <= BRIEF or b"BYTES" not in body[:_FRONT]


def _outputs_of(body: bytes) -> dict[str, tuple[str, Array]]:
    response = pb.ModelInferResponse.FromString(body)
    if weight_of_texts(response.outputs, response.raw_output_contents) > MOST:
        raise too_heavy()
    arrays = tensors_of(response.outputs, response.raw_output_contents)
    return {output.name: (output.datatype, arrays[output.name]) for output in response.outputs}


@contextmanager
def _blaming_the_model() -> Iterator[None]:
    try:
        yield
    except (BadRequest, MalformedMessage, DecodeError) as error:
        raise WrongAnswer(f"a model's answer cannot be read ({error})") from error


def build_response(model: str, version: str, id: str, tensors: Mapping[str, tuple[str, Array]]) -> bytes:
    """A serialized ModelInferResponse with raw contents. tensors: datatype and array by name."""
    response = pb.ModelInferResponse(model_name=model, model_version=version, id=id)
    raw: list[Buffer] = []
    for name, (datatype, array) in tensors.items():
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw.append(raw_view(datatype, array))
    return with_raw(response.SerializeToString(), RAW_OUTPUT, raw)
