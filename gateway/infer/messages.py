"""V2 messages as named arrays and back, for models whose tensors the gateway itself must see: pipelines.

Uses the protobuf classes; pure otherwise. Forwarded requests never come here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput, MalformedMessage
from gateway.stages import Array, Tensors, datatype_of, dtype_of, to_array, to_raw

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


def parse_request(body: bytes) -> Any:
    """A pb.ModelInferRequest (Any: protobuf classes carry no types). raises: MalformedMessage."""
    try:
        return pb.ModelInferRequest.FromString(body)
    except Exception as error:  # protobuf's DecodeError is not the same class in all its implementations
        raise MalformedMessage("The request is no valid ModelInferRequest.") from error


def tensors_of(named: Sequence[Any], raw: Sequence[bytes]) -> dict[str, Array]:
    """The inputs of a request, or outputs of a response, as arrays by name.

    named:   the `inputs` or `outputs` messages.
    raw:     `raw_input_contents` or `raw_output_contents`: one for each, or none if all have typed contents.
    raises:  BadInput naming the tensor.
    """
    if raw and len(raw) != len(named):
        raise BadInput(f"raw contents for {len(raw)} tensors, but {len(named)} are declared; each needs one")
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
    """An array from `contents`, whose list must hold as many elements as the shape says."""
    field = _TYPED_FIELDS.get(tensor.datatype)
    if field is None:
        raise BadInput(f"input '{tensor.name}': {tensor.datatype or 'no datatype'} has no typed contents; send raw")
    values = getattr(tensor.contents, field)
    count = 1
    for size in tensor.shape:
        count *= size
    if count != len(values):
        raise BadInput(
            f"input '{tensor.name}': shape {list(tensor.shape)} takes {count} elements, {field} has {len(values)}"
        )
    dtype = dtype_of(tensor.datatype)
    array = np.empty(len(values), dtype)
    try:
        array[:] = values
    except OverflowError:
        raise BadInput(f"input '{tensor.name}': a value does not fit {tensor.datatype}") from None
    return array.reshape(tuple(tensor.shape))


def build_request(
    model: str,
    tensors: Tensors,
    *,
    outputs: Sequence[str] = (),
    version: str = "",
    id: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> bytes:
    """A serialized ModelInferRequest with raw contents. parameters: InferParameter messages by key."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for key, parameter in (parameters or {}).items():
        request.parameters[key].CopyFrom(parameter)
    for name, array in tensors.items():
        datatype = datatype_of(array)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(to_raw(datatype, array))
    for name in outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def parse_response(body: bytes) -> dict[str, Array]:
    """The outputs of a serialized ModelInferResponse."""
    response = pb.ModelInferResponse.FromString(body)
    return tensors_of(response.outputs, response.raw_output_contents)


def build_response(model: str, id: str, tensors: Mapping[str, tuple[str, Array]]) -> bytes:
    """A serialized ModelInferResponse with raw contents. tensors: datatype and array by name."""
    response = pb.ModelInferResponse(model_name=model, model_version="1", id=id)
    for name, (datatype, array) in tensors.items():
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(to_raw(datatype, array))
    return bytes(response.SerializeToString())
