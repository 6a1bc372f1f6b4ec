"""The FP16 form of a graph: half-precision weights and arithmetic inside, FP32 inputs and outputs.

Precision is a property of the graph, not a flag of the runtime: TensorRT 11 has no flags for it, and ONNX Runtime's
CUDA provider computes in the types that it is given. So the graph itself is cast, and one file serves `trtexec`, the
CUDA provider and the TensorRT provider alike. The contract at the edges stays FP32, by a Cast behind each input and in
front of each output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LARGEST = float(np.finfo(np.float16).max)


class NotHalvable(Exception):
    """The graph can't be told in half precision; the text says what is in the way."""


def to_half(model: bytes) -> bytes:
    """The FP16 ONNX model with the inputs and outputs of `model`.

    :raises NotHalvable: if a weight does not fit FP16, or a graph has parts whose types are not told by weights alone
        (sub-graphs, functions, tensors in attributes, casts).
    """
    import onnx  # noqa: PLC0415  # of the extra `local`

    halved = onnx.load_from_string(model)
    graph = halved.graph
    _refuse_what_is_not_known(halved)
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            weight.CopyFrom(_half_tensor(weight))
    del graph.value_info[:]  # inferred again below, in the new types
    inner = {name: f"{name}.half" for name in (*_floats(graph.input), *_floats(graph.output))}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    before = [_cast(name, inner[name], onnx.TensorProto.FLOAT16) for name in _floats(graph.input)]
    after = [_cast(inner[name], name, onnx.TensorProto.FLOAT) for name in _floats(graph.output)]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    halved = onnx.shape_inference.infer_shapes(halved, strict_mode=True)
    onnx.checker.check_model(halved, full_check=True)
    return bytes(halved.SerializeToString(deterministic=True))


def _floats(values: Any) -> list[str]:
    import onnx  # noqa: PLC0415

    return [value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]


def _half_tensor(weight: Any) -> Any:
    from onnx import numpy_helper  # noqa: PLC0415

    values = numpy_helper.to_array(weight)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LARGEST:  # also for NaN
        raise NotHalvable(f"the weight {weight.name} reaches {largest:g}, and FP16 ends at {_LARGEST:g}")
    return numpy_helper.from_array(values.astype(np.float16), weight.name)


def _cast(source: str, target: str, to: int) -> Any:
    from onnx import helper  # noqa: PLC0415

    return helper.make_node("Cast", [source], [target], name=f"cast.{target}", to=to)


def _refuse_what_is_not_known(model: Any) -> None:
    from onnx import AttributeProto  # noqa: PLC0415

    if model.functions:
        raise NotHalvable("the model has functions of its own")
    held = (AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSOR, AttributeProto.TENSORS)
    for node in model.graph.node:
        if node.op_type == "Cast" or any(attribute.type in held for attribute in node.attribute):
            raise NotHalvable(f"the node {node.name or node.op_type} says types by itself")
