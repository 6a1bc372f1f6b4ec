"""The models that the load goes to: a real one, and others made on the spot, which cost little beside their tensors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from gateway.models import catalogue

PICTURE = (3, 224, 224)  # FP32: 602,112 bytes
TINY = 8  # FP32 numbers: 32 bytes
CLASSES = 1000

TINY_A, TINY_B = "tiny_a", "tiny_b"  # FP32[8] → FP32[8], x + 1: two variants of one contract
WIDE_IN = "wide_in"  # FP32[3,224,224] → FP32[1]
WIDE_OUT = "wide_out"  # FP32[8] → FP32[3,224,224]
ECHO = "echo"  # FP32[n] → FP32[n], x + 1: any payload
EFFICIENTNET = "efficientnet_lite0_onnx"  # the project's own, from model_repository/
SCORES = "scores"  # FP32[3,224,224] → FP32[1000]: in place of an image classifier

ALL = (TINY_A, TINY_B, WIDE_IN, WIDE_OUT, ECHO, SCORES, EFFICIENTNET)

_REPOSITORY = Path(__file__).parents[1] / "model_repository"

Dims = Sequence[int]


def build(repository: Path) -> Path:
    """Write ALL into a folder that Triton can serve.

    :raises BuildFailed, FetchFailed: if EfficientNet's weights can't be had.
    """
    build_tiny(repository)
    _write(repository, ECHO, 8, [-1], [-1], [_add("x", "y")])
    mean = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0)
    column = helper.make_node("Reshape", ["mean", "column_shape"], ["y"])
    _write(repository, WIDE_IN, 8, PICTURE, [1], [mean, column])
    pixel = helper.make_node("Slice", ["x", "zero", "first", "axis"], ["pixel"])
    corner = helper.make_node("Reshape", ["pixel", "corner_shape"], ["corner"])
    spread = helper.make_node("Expand", ["corner", "picture_shape"], ["y"])
    _write(repository, WIDE_OUT, 8, [TINY], PICTURE, [pixel, corner, spread])
    scores = helper.make_node("Add", ["column", "ramp"], ["y"])
    _write(repository, SCORES, 8, PICTURE, [CLASSES], [mean, _to_column(), scores])
    shutil.copytree(_REPOSITORY / EFFICIENTNET, repository / EFFICIENTNET)
    catalogue.build([EFFICIENTNET], repository)  # does nothing if they were built before
    return repository


def build_tiny(repository: Path) -> Path:
    """Likewise TINY_A and TINY_B alone."""
    for name in (TINY_A, TINY_B):
        _write(repository, name, 64, [TINY], [TINY], [_add("x", "y")])
    return repository


def _add(source: str, target: str) -> NodeProto:
    return helper.make_node("Add", [source, "one"], [target])


def _to_column() -> NodeProto:
    return helper.make_node("Reshape", ["mean", "column_shape"], ["column"])


_CONSTANTS = (
    helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
    helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
    helper.make_tensor("first", TensorProto.INT64, [1], [1]),
    helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    helper.make_tensor("column_shape", TensorProto.INT64, [2], [-1, 1]),
    helper.make_tensor("corner_shape", TensorProto.INT64, [4], [-1, 1, 1, 1]),
    helper.make_tensor("picture_shape", TensorProto.INT64, [4], [1, *PICTURE]),
    helper.make_tensor("ramp", TensorProto.FLOAT, [CLASSES], [i / CLASSES for i in range(CLASSES)]),
)


def _write(
    repository: Path, name: str, max_batch: int, dims_in: Dims, dims_out: Dims, nodes: Sequence[NodeProto]
) -> None:
    used = {each for node in nodes for each in node.input}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _shape(dims_in))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, _shape(dims_out))],
        [constant for constant in _CONSTANTS if constant.name in used],
    )
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    # Versions that every onnxruntime this package allows can read.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "1" / "model.onnx")
    (folder / "config.pbtxt").write_text(
        f"""backend: "onnxruntime"
        max_batch_size: {max_batch}
        dynamic_batching {{ }}
        input [ {{ name: "x" data_type: TYPE_FP32 dims: {list(dims_in)} }} ]
        output [ {{ name: "y" data_type: TYPE_FP32 dims: {list(dims_out)} }} ]
        instance_group [ {{ kind: KIND_CPU count: 1 }} ]
        parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}"""
    )


def _shape(dims: Dims) -> list[int | str]:
    return ["rows", *(dim if dim > 0 else "n" for dim in dims)]
