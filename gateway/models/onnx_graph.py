"""What a Triton must be told of an ONNX model: read from its graph, and written as the model's config.

Reads a file; starts nothing. onnx (the extra `local`) is imported only here, when a graph is read.

source: github.com/triton-inference-server/server, docs/user_guide/model_configuration.md, "Maximum Batch Size".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2

from gateway.errors import Misused

_DATATYPES: Final = {  # of the V2 protocol, by ONNX' name
    "BOOL": "BOOL",
    "DOUBLE": "FP64",
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "INT16": "INT16",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "STRING": "BYTES",
    "UINT16": "UINT16",
    "UINT32": "UINT32",
    "UINT64": "UINT64",
    "UINT8": "UINT8",
}
USUAL_BATCH: Final = 8
"""Rows that Triton may put together, where nobody says how many."""

_REMEDIES: Final = {
    "sequence_type": "a sequence; export it as a tensor (skl2onnx: options={'zipmap': False})",
    "map_type": "a map; export it as a tensor (skl2onnx: options={'zipmap': False})",
    "optional_type": "optional; export it as a tensor that is always there",
    "sparse_tensor_type": "a sparse tensor; export it as a dense one",
}


class NotServable(Misused):
    """The file is no ONNX model, or not one that a Triton can serve; the text says why and what would do."""


@dataclass(frozen=True)
class GraphTensor:
    """An input or output.

    shape: an axis of any size is a text: its name in the graph, "" if it has none.
    """

    name: str
    datatype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = ", ".join(str(size) if size != "" else "any" for size in self.shape)
        return f"{self.name} {self.datatype} [{sizes}]"


@dataclass(frozen=True)
class Graph:
    """files: with weights that lie beside the model's own, by their names relative to its folder."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    files: tuple[str, ...] = ()

    @property
    def batch_axis(self) -> str:
        """The name of the axis that comes first in every tensor and has others behind it: the batch. "" if there is
        none: an axis without a name, or with another one in each tensor, may be anything."""
        tensors = (*self.inputs, *self.outputs)
        names = {tensor.shape[0] for tensor in tensors}
        name = names.pop() if len(names) == 1 and all(len(tensor.shape) > 1 for tensor in tensors) else ""
        return name if isinstance(name, str) else ""


def read_graph(file: Path) -> Graph:
    """:raises NotServable: if it is no ONNX model, or has a tensor that Triton cannot have.
    :raises OSError: if it cannot be read.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`

    try:
        model = onnx.load_model_from_string(file.read_bytes())
    except DecodeError as error:
        raise NotServable(f"{file} is no ONNX model: it cannot be decoded as one.") from error
    if not model.graph.node or not model.graph.output:
        raise NotServable(f"{file} is no ONNX model: it has no graph with an output.")
    constants = {each.name for each in model.graph.initializer}
    inputs = tuple(_tensor(file, "input", each) for each in model.graph.input if each.name not in constants)
    if not inputs:
        raise NotServable(f"{file} has no inputs, so there is nothing that a request could send.")
    return Graph(inputs, tuple(_tensor(file, "output", each) for each in model.graph.output), _files(file, model))


def _tensor(file: Path, side: str, info: Any) -> GraphTensor:
    from onnx import TensorProto  # noqa: PLC0415  # of the extra `local`

    what = f"the {side} {info.name!r} of {file.name} is"
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        raise NotServable(f"{what} {_REMEDIES.get(str(kind), 'of no known type')}.")
    datatype = TensorProto.DataType.Name(info.type.tensor_type.elem_type)
    if datatype not in _DATATYPES:
        raise NotServable(f"{what} {datatype}, which Triton's ONNX backend does not take; cast it in the graph.")
    if not info.type.tensor_type.HasField("shape"):
        raise NotServable(f"{what} of no known rank; run onnx.shape_inference, or say its shape in the export.")
    shape = tuple(_size(axis) for axis in info.type.tensor_type.shape.dim)
    if not shape:
        raise NotServable(f"{what} a scalar, and Triton's tensors have an axis; give it the shape [1] in the export.")
    if 0 in shape:
        raise NotServable(f"{what} {list(shape)}: an axis of size 0 holds nothing.")
    return GraphTensor(info.name, _DATATYPES[datatype], shape)


def _size(axis: Any) -> int | str:
    return int(axis.dim_value) if axis.WhichOneof("value") == "dim_value" else str(axis.dim_param)


def _files(file: Path, model: Any) -> tuple[str, ...]:
    """:raises NotServable: if weights lie outside the model's folder, or are not there."""
    from onnx import external_data_helper  # noqa: PLC0415  # of the extra `local`

    outside = [each for each in model.graph.initializer if external_data_helper.uses_external_data(each)]
    names = dict.fromkeys(external_data_helper.ExternalDataInfo(each).location for each in outside)
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise NotServable(f"{file.name} has weights in {name!r}; they must lie in the model's own folder.")
        if not (file.parent / name).is_file():
            raise NotServable(f"{file.name} has weights in {name!r}, which is not beside it.")
    return tuple(names)


# What is made of it


def config_text(name: str, graph: Graph, most: int) -> str:
    """The model's config.pbtxt. most: rows that Triton may put together; 0 if it must not."""
    config = model_config_pb2.ModelConfig(name=name, backend="onnxruntime", max_batch_size=most)
    for tensors, declared in ((graph.inputs, config.input), (graph.outputs, config.output)):
        for tensor in tensors:
            datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
            dims = [size if isinstance(size, int) else -1 for size in tensor.shape[1 if most else 0 :]]
            declared.add(name=tensor.name, data_type=f"TYPE_{datatype}", dims=dims)
    if most:
        config.dynamic_batching.SetInParent()
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    said = "# Read from the graph by `inference-gateway models add`. On a GPU: KIND_GPU in place of KIND_CPU.\n"
    return said + str(text_format.MessageToString(config))


def explained(graph: Graph, most: int, asked: bool) -> list[str]:
    """What is meant by the axes that are left open, a sentence each. asked: somebody said what `most` is."""
    lines = []
    if most:
        lines.append(f"The first axis is taken for the batch: Triton puts requests together, up to {most} rows.")
    elif not asked and all(isinstance(tensor.shape[0], str) for tensor in (*graph.inputs, *graph.outputs)):
        lines.append(
            "The first axes may or may not be one batch, so Triton puts no requests together; "
            f"if they are, --batch {USUAL_BATCH} says so."
        )
    left = {size for each in graph.inputs for size in each.shape[1 if most else 0 :] if isinstance(size, str)}
    if left:
        which = ", ".join(sorted(f"'{name}'" if name else "one without a name" for name in left))
        lines.append(f"Axes of any size ({which}) are -1 in its config.")
    return lines


def batch_error(graph: Graph, most: int) -> str:
    """Why the first axis can't be the batch; "" if it can."""
    for tensor in (*graph.inputs, *graph.outputs):
        if most and not isinstance(tensor.shape[0], str):
            return f"{tensor} begins with an axis of one size, which can be no batch"
        if most and len(tensor.shape) == 1:
            return f"{tensor} has no axis but the first, and Triton wants one beside the batch"
    return ""


def shapes_of(graph: Graph, given: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The shape of each input of a request.

    given:  shapes by input, whole; open axes of the others are 1.
    :raises NotServable: if an input is not there, or does not have such a shape.
    """
    for name in given.keys() - {each.name for each in graph.inputs}:
        raise NotServable(f"The model has no input {name!r}; it has {', '.join(each.name for each in graph.inputs)}.")
    shapes = {}
    for each in graph.inputs:
        shape = list(given.get(each.name, [size if isinstance(size, int) else 1 for size in each.shape]))
        wrong = [
            1 for size, wanted in zip(shape, each.shape, strict=False) if wanted != size and isinstance(wanted, int)
        ]
        if wrong or len(shape) != len(each.shape):
            raise NotServable(f"The input {each} has no shape {shape}.")
        shapes[each.name] = shape
    return shapes
