"""The FP16 graph: a smaller one that answers as the FP32 graph does, and refuses what it can't tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gateway.models.half import NotHalvable, to_half
from gateway.models.measure import held_out, scores

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(scope="module")
def halved(repository: Path) -> onnx.ModelProto:
    return onnx.load(repository / "efficientnet_lite0_onnx_cuda/1/model.onnx")


def test_both_gpu_models_have_the_same_graph_and_it_is_the_fp32_models(repository: Path) -> None:
    graph = to_half((repository / "efficientnet_lite0_onnx/1/model.onnx").read_bytes())
    for model in ("efficientnet_lite0_onnx_cuda", "efficientnet_lite0_onnx_trt"):
        assert (repository / model / "1/model.onnx").read_bytes() == graph


def test_every_tensor_inside_is_half_and_every_tensor_outside_is_not(halved: onnx.ModelProto) -> None:
    """What a strongly typed network computes in; the contract with callers stays."""
    graph = halved.graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {FP32}
    assert {weight.data_type for weight in graph.initializer} == {FP16}
    assert {value.type.tensor_type.elem_type for value in graph.value_info} == {FP16}
    assert [node.op_type for node in graph.node].count("Cast") == 2


def test_the_half_graph_gives_the_classes_of_the_whole_one(repository: Path) -> None:
    inputs, _ = held_out()
    whole = scores(repository / "efficientnet_lite0_onnx/1/model.onnx", inputs[::4])
    half = scores(repository / "efficientnet_lite0_onnx_cuda/1/model.onnx", inputs[::4])
    assert (whole.argmax(1) == half.argmax(1)).all()
    assert float(np.abs(whole - half).max()) < 0.06


def _model(weight: float = 1.0, *, opset: int = 17, **nodes: onnx.NodeProto) -> bytes:
    graph = helper.make_graph(
        list(nodes.values()) or [helper.make_node("Mul", ["x", "w"], ["y"], name="scale")],
        "small",
        [helper.make_tensor_value_info("x", FP32, ["n", 2])],
        [helper.make_tensor_value_info("y", FP32, ["n", 2])],
        [numpy_helper.from_array(np.array([1, weight], np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("weight", [65504.0, -65504.0, 0.0])
def test_the_largest_weights_that_fit_are_kept(weight: float) -> None:
    halved = onnx.load_from_string(to_half(_model(weight)))
    assert numpy_helper.to_array(halved.graph.initializer[0])[1] == weight


@pytest.mark.parametrize("weight", [65505.0, 1e6, float("inf"), float("nan")])
def test_a_weight_that_does_not_fit_is_refused(weight: float) -> None:
    with pytest.raises(NotHalvable, match="weight w"):
        to_half(_model(weight))


def test_a_graph_that_says_types_by_itself_is_refused() -> None:
    cast = helper.make_node("Cast", ["x"], ["y"], name="own", to=FP32)
    with pytest.raises(NotHalvable, match="the node own"):
        to_half(_model(own=cast))
    constant = helper.make_node("Constant", [], ["c"], name="held", value=numpy_helper.from_array(np.float32(1)))
    product = helper.make_node("Mul", ["x", "c"], ["y"], name="scale")
    with pytest.raises(NotHalvable, match="the node held"):
        to_half(_model(held=constant, scale=product))
