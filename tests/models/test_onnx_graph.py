"""What is read from an ONNX file, what is said to Triton of it, and what no Triton can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from triton_fixture import save_onnx
from tritonclient.grpc import model_config_pb2

from gateway.models.onnx_graph import (
    Graph,
    GraphTensor,
    NotServable,
    batch_error,
    config_text,
    explained,
    read_graph,
    shapes_of,
)


def value(name: str, datatype: int = TensorProto.FLOAT, shape: object = ("batch", 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, datatype, shape)


def saved(folder: Path, *, inputs: list[Any], outputs: list[Any], constants: tuple[object, ...] = ()) -> Path:
    """A file whose graph is not meant to run."""
    node = helper.make_node("Identity", [inputs[0].name if inputs else "nothing"], [outputs[0].name])
    file = folder / "m.onnx"
    save_onnx(helper.make_graph([node], "g", inputs, outputs, list(constants)), file)
    return file


def test_inputs_outputs_and_axes_are_read(tmp_path: Path) -> None:
    """An input with a constant for its value is none that callers send."""
    constant = helper.make_tensor("weights", TensorProto.FLOAT, [1], [0.0])
    inputs = [value("x"), value("ids", TensorProto.INT64, ["batch", None]), value("weights", shape=[1])]
    outputs = [value("text", TensorProto.STRING, ["batch", 2, "length"])]
    graph = read_graph(saved(tmp_path, inputs=inputs, outputs=outputs, constants=(constant,)))
    assert list(map(str, graph.inputs)) == ["x FP32 [batch, 4]", "ids INT64 [batch, any]"]
    assert list(map(str, graph.outputs)) == ["text BYTES [batch, 2, length]"]
    assert graph.batch_axis == "batch"


BATCHES = {
    "one name in front of all": ([("n", 4), ("n", "m")], "n"),
    "two names": ([("n", 4), ("m", 4)], ""),
    "no name": ([("", 4), ("", 4)], ""),
    "a size": ([("n", 4), (1, 4)], ""),
    "nothing behind it": ([("n", 4), ("n",)], ""),
}


@pytest.mark.parametrize(("shapes", "axis"), BATCHES.values(), ids=BATCHES)
def test_only_what_is_surely_a_batch_is_taken_for_one(shapes: list[tuple[int | str, ...]], axis: str) -> None:
    """Rows of a request that is no batch would go to other callers."""
    first, *others = [GraphTensor(str(number), "FP32", shape) for number, shape in enumerate(shapes)]
    assert Graph((first,), tuple(others)).batch_axis == axis


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(("most", "dims"), [(8, [[4], [-1]]), (0, [[-1, 4], [-1, -1]])])
def test_the_config_says_it_to_triton(most: int, dims: list[list[int]]) -> None:
    graph = Graph((GraphTensor("x", "FP16", ("n", 4)),), (GraphTensor('odd "name"', "BYTES", ("n", "m")),))
    config = parsed(config_text("m", graph, most))
    tensors = [*config.input, *config.output]
    assert [list(tensor.dims) for tensor in tensors] == dims
    assert [tensor.name for tensor in tensors] == ["x", 'odd "name"']
    assert [tensor.data_type for tensor in tensors] == [model_config_pb2.TYPE_FP16, model_config_pb2.TYPE_STRING]
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (most, most > 0)


def test_open_axes_are_explained() -> None:
    one = Graph((GraphTensor("x", "FP32", ("n", "width", "")),), (GraphTensor("y", "FP32", ("n", 4)),))
    assert explained(one, 8, asked=False) == [
        "The first axis is taken for the batch: Triton puts requests together, up to 8 rows.",
        "Axes of any size ('width', one without a name) are -1 in its config.",
    ]
    other = Graph((GraphTensor("x", "FP32", ("n", 4)),), (GraphTensor("y", "FP32", ("m", 4)),))
    assert "--batch 8 says so" in explained(other, 0, asked=False)[0]
    assert explained(other, 0, asked=True) == ["Axes of any size ('n') are -1 in its config."]


def test_a_batch_that_cannot_be_is_told() -> None:
    assert not batch_error(Graph((GraphTensor("x", "FP32", ("n", 4)),), ()), 8)
    assert "no axis but the first" in batch_error(Graph((GraphTensor("x", "FP32", ("n",)),), ()), 8)
    assert "one size" in batch_error(Graph((GraphTensor("x", "FP32", (1, 4)),), ()), 8)
    assert not batch_error(Graph((GraphTensor("x", "FP32", (1, 4)),), ()), 0)


def test_the_shapes_of_a_request(tmp_path: Path) -> None:
    graph = Graph((GraphTensor("x", "FP32", ("n", 4)), GraphTensor("a:0", "FP32", ("n", "w"))), ())
    assert shapes_of(graph, {}) == {"x": [1, 4], "a:0": [1, 1]}
    assert shapes_of(graph, {"a:0": [2, 9]}) == {"x": [1, 4], "a:0": [2, 9]}
    for given in ({"x": [1, 5]}, {"x": [1]}, {"x": [1, 4, 1]}, {"z": [1]}):
        with pytest.raises(NotServable, match=r"has no shape|no input 'z'"):
            shapes_of(graph, given)


def sequence(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)


UNFIT = {
    "a sequence, as of scikit-learn's classifiers": ({"outputs": [sequence("y")]}, "output 'y' .* sequence.*zipmap"),
    "a datatype": ({"inputs": [value("x", TensorProto.BFLOAT16)]}, "input 'x' .* BFLOAT16.*cast"),
    "a complex one": ({"outputs": [value("y", TensorProto.COMPLEX64)]}, "output 'y' .* COMPLEX64"),
    "a scalar": ({"inputs": [value("x", shape=[])]}, "input 'x' .* scalar.*shape \\[1\\]"),
    "an empty axis": ({"inputs": [value("x", shape=[0, 4])]}, r"input 'x' .* \[0, 4\]"),
    "no rank": ({"outputs": [value("y", shape=None)]}, "output 'y' .* no known rank.*shape_inference"),
    "no inputs": ({"inputs": []}, "no inputs"),
}


@pytest.mark.parametrize(("parts", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_no_triton_can_serve_is_refused_with_a_remedy(
    tmp_path: Path, parts: dict[str, list[object]], reason: str
) -> None:
    file = saved(tmp_path, **{"inputs": [value("x")], "outputs": [value("y")], **parts})
    with pytest.raises(NotServable, match=reason):
        read_graph(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\x80\x04 a pickle", b"# text\n"])
def test_what_is_no_onnx_model_is_told_apart(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(content)
    with pytest.raises(NotServable, match="is no ONNX model"):
        read_graph(file)


@pytest.mark.parametrize(("place", "reason"), [("w.data", ""), ("lost", "not beside it"), ("../w.data", "own folder")])
def test_weights_in_files_of_their_own_are_found(tmp_path: Path, place: str, reason: str) -> None:
    constant = helper.make_tensor("weights", TensorProto.FLOAT, [1], [0.0])
    constant.ClearField("float_data")
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value=place)
    (tmp_path / "w.data").write_bytes(bytes(4))
    file = saved(tmp_path, inputs=[value("x")], outputs=[value("y")], constants=(constant,))
    if reason:
        with pytest.raises(NotServable, match=reason):
            read_graph(file)
    else:
        assert read_graph(file).files == ("w.data",)
