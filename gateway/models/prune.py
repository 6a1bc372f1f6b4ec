"""The pruned variant of EfficientNet-Lite0: fewer channels in the widened part of each block, nothing trained again.

Whole channels are taken out, so that what remains is a smaller graph of the same nodes, with which any runtime is
faster; single weights set to zero would cost as much time as before, as no dense kernel skips them. Which channels go,
and how the convolution that narrows the block makes up for them, is an Optimal Brain Surgeon's step over that
convolution's inputs on real pictures: of all channels the one goes whose absence the others can hide best, and their
weights are set so that they do. A block is cut until its output would be off by `tolerance` of its variance, so blocks
with little to spare keep all.

What this gains and costs is measured by `gateway.models.measure` and stated in `model_repository/README.md`.

source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992; per
layer and by least squares as in E. Frantar, D. Alistarh, "Optimal Brain Compression", NeurIPS 2022.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gateway.models.efficientnet import INPUT, blocks

TOLERANCE: Final = 0.2
"""Of the variance of a block's output, the share that may be lost, counted with the ridge."""

_MULTIPLE: Final = 16
"""Channels are kept in these steps: a vector register of AVX-512 has 16 floats, and half of one costs as much."""
_RIDGE: Final = 1.0
"""Of the mean energy of a channel. It keeps channels from being trusted to hide each other for what eighteen pictures
have in common: with 0.001 the classes of other pictures change several times as often for the same size."""
_BATCH: Final = 10
_POSITIONS: Final = 98  # per picture and layer at most: neighbours in a large layer say nearly the same

Floats = NDArray[np.float64]


def prune(model: bytes, inputs: NDArray[np.float32], tolerance: float = TOLERANCE) -> bytes:
    """The ONNX model with fewer channels, and with the inputs and outputs of `model`.

    model:   as `efficientnet.build` makes it.
    inputs:  tensors of real pictures, [n, 3, 224, 224].
    """
    import onnx  # noqa: PLC0415  # of the extra `local`

    pruned = onnx.load_from_string(model)
    names = [f"block{block.number}" for block in blocks() if block.expand != 1]
    weights = {tensor.name: tensor for tensor in pruned.graph.initializer}
    for name, energy in zip(names, _energies(model, [f"{name}.depthwise.out" for name in names], inputs), strict=True):
        _prune_block(weights, name, energy, tolerance)
    nodes = {node.name: node for node in pruned.graph.node}
    for name in names:
        for attribute in nodes[f"{name}.depthwise.conv"].attribute:
            if attribute.name == "group":
                attribute.i = weights[f"{name}.depthwise.weight"].dims[0]
    del pruned.graph.value_info[:]  # inferred again below, with the new widths
    pruned = onnx.shape_inference.infer_shapes(pruned, strict_mode=True)
    onnx.checker.check_model(pruned, full_check=True)
    return bytes(pruned.SerializeToString(deterministic=True))


def _prune_block(weights: dict[str, Any], name: str, energy: Floats, tolerance: float) -> None:
    from onnx import numpy_helper  # noqa: PLC0415

    def read(part: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = numpy_helper.to_array(weights[f"{name}.{part}"])
        return values

    narrow = np.column_stack([read("project.weight")[:, :, 0, 0], read("project.bias")]).astype(np.float64)
    kept, narrow = surgeon(narrow, energy, tolerance)
    changed = {
        f"{part}.{kind}": read(f"{part}.{kind}")[kept]
        for part in ("expand", "depthwise")
        for kind in ("weight", "bias")
    }
    changed["project.weight"] = narrow[:, :-1, None, None].astype(np.float32)
    changed["project.bias"] = narrow[:, -1].astype(np.float32)
    for part, values in changed.items():
        weights[f"{name}.{part}"].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), f"{name}.{part}"))


def surgeon(weights: Floats, energy: Floats, tolerance: float) -> tuple[NDArray[np.intp], Floats]:
    """Which inputs of a linear layer stay, and the weights that make up for those that go.

    weights:    [outputs, inputs + 1]; the last column is the bias, which always stays.
    energy:     [inputs + 1, inputs + 1], the mean of x xᵀ over the layer's inputs x, whose last entry is 1.
    tolerance:  the share of the output's variance that may be lost.
    Returns the numbers of the inputs that stay, in order, and their weights, [outputs, stay + 1].
    """
    inputs = len(energy) - 1
    mean = energy[:-1, -1]
    variance = float(np.sum(weights[:, :-1] @ (energy[:-1, :-1] - np.outer(mean, mean)) * weights[:, :-1]))
    damped = energy + np.eye(inputs + 1) * (_RIDGE * np.trace(energy[:-1, :-1]) / inputs)
    inverse, weights = np.linalg.inv(damped), weights.copy()
    stays = np.ones(inputs, bool)
    steps: list[tuple[NDArray[np.bool_], Floats]] = [(stays.copy(), weights.copy())]
    lost = 0.0
    while stays.sum() > _MULTIPLE:
        costs = np.where(stays, np.sum(weights[:, :-1] ** 2, axis=0) / np.diag(inverse)[:-1], np.inf)
        goes = int(costs.argmin())
        lost += float(costs[goes])
        if lost > tolerance * variance:
            break
        row = inverse[goes] / inverse[goes, goes]
        weights -= np.outer(weights[:, goes], row)
        inverse -= np.outer(inverse[:, goes], row)
        inverse[goes, goes] = 1.0  # its row and column are zero now, and it is never looked at again
        stays[goes] = False
        if stays.sum() % _MULTIPLE == 0:
            steps.append((stays.copy(), weights.copy()))
    stays, weights = steps[-1]
    return np.flatnonzero(stays), weights[:, np.append(stays, True)]


def _energies(model: bytes, names: list[str], inputs: NDArray[np.float32]) -> list[Floats]:
    """For each named tensor the mean of x xᵀ over pictures and positions, x being its channels and a 1."""
    import onnx  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    shown = onnx.load_from_string(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    run = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"]).run
    sums: list[Any] = [0.0] * len(names)
    counts = [0] * len(names)
    for first in range(0, len(inputs), _BATCH):
        for i, values in enumerate(run(names, {INPUT: inputs[first : first + _BATCH]})):
            rows = _rows(values)
            sums[i] = sums[i] + (rows.T @ rows).astype(np.float64)
            counts[i] += len(rows)
    return [total / count for total, count in zip(sums, counts, strict=True)]


def _rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[pictures, channels, height, width] → [pictures and some of their positions, channels + 1]."""
    pictures, channels, *_ = values.shape
    flat = values.reshape(pictures, channels, -1)
    chosen = flat[:, :, :: -(-flat.shape[2] // _POSITIONS)].transpose(0, 2, 1).reshape(-1, channels)
    return np.column_stack([chosen, np.ones(len(chosen), np.float32)])
