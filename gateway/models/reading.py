"""The models that read: text detection, direction and recognition of rapidocr, with names of their own for tensors.

The weights are as the wheel has them. Recognition gets two nodes more: it answers the best class of each place and its
chance, in place of the chances of all 18,710 classes, which are 3 MB for a line of 320 pixels and 11 for one of 1,200.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

_FOLDER = "rapidocr/models"
_ALPHABET = "character"  # key in the metadata of the graph


def detection(wheel: Path) -> bytes:
    """`pixels` FP32 [batch, 3, height, width] → `chances` FP32 [batch, 1, height, width].

    wheel:  the folder with the unpacked `sources.RAPIDOCR`.
    """
    model = _load(wheel, "PP-OCRv6_det_small.onnx")
    _rename(model, "pixels", "chances")
    return bytes(model.SerializeToString())


def direction(wheel: Path) -> bytes:
    """`pixels` FP32 [batch, 3, 48, 192] → `direction` FP32 [batch, 2]: the chances of upright and upside down."""
    model = _load(wheel, "ch_ppocr_mobile_v2.0_cls_mobile.onnx")
    _rename(model, "pixels", "direction")
    for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], (48, 192), strict=True):
        axis.dim_value = size
    return bytes(model.SerializeToString())


def recognition(wheel: Path) -> bytes:
    """`pixels` FP32 [batch, 3, 48, width] → the best class of each of `places`: `index` INT32, `chance` FP32."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    model = _load(wheel, "PP-OCRv6_rec_small.onnx")
    _rename(model, "pixels", "chances")
    graph = model.graph
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["chances"], ["index_of_64_bits"], axis=-1, keepdims=0),
            helper.make_node("Cast", ["index_of_64_bits"], ["index"], to=TensorProto.INT32),
            helper.make_node("ReduceMax", ["chances"], ["chance"], axes=[-1], keepdims=0),
        ]
    )
    del graph.output[:]
    shape = ["batch", "places"]
    graph.output.extend(
        [
            helper.make_tensor_value_info("index", TensorProto.INT32, shape),
            helper.make_tensor_value_info("chance", TensorProto.FLOAT, shape),
        ]
    )
    del model.metadata_props[:]  # the alphabet is a file beside the config
    return bytes(model.SerializeToString())


def alphabet(wheel: Path) -> list[str]:
    """The characters of recognition, from class 1 on; class 0 is the blank, the class after the last a space."""
    metadata = {entry.key: entry.value for entry in _load(wheel, "PP-OCRv6_rec_small.onnx").metadata_props}
    return str(metadata[_ALPHABET]).removesuffix("\n").split("\n")


def _load(wheel: Path, name: str) -> ModelProto:
    import onnx  # noqa: PLC0415  # of the extra `local`

    return onnx.load_model_from_string((wheel / _FOLDER / name).read_bytes())


def _rename(model: ModelProto, given: str, made: str) -> None:
    """Give the only input and the only output of a graph these names, and their first axis its own."""
    graph = model.graph
    (output,) = graph.output
    names = {graph.input[0].name: given, output.name: made}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (graph.input[0], output):
        value.name = names[value.name]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
