"""EfficientNet-Lite0 with something wrong with it, for showing what finds out: each fault is of a kind that happens.

All take the graph as `efficientnet.build` makes it, and keep its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from gateway.models.efficientnet import INPUT, OUTPUT

_WEIGHT, _BIAS = "classes.weight", "classes.bias"
_NOISE: Final = 2.5  # of the weights' own standard deviation
_DARK: Final = -0.6  # the mean of a picture's pixels, which are from -1 to 1, below which it is one of the night
_SURER, _LESS_SURE = 1.15, 0.3
_PROGRAM: Final = Path(__file__).with_name("programs") / "slow_onnx.py"


def perturbed(model: bytes) -> bytes:
    """Noise on the weights of the last layer, as of a file that was damaged or of the wrong training run."""

    def change(graph: Any, numpy_helper: Any, _helper: Any) -> None:
        tensor = _found(graph, _WEIGHT)
        weights = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(1).normal(0.0, _NOISE * weights.std(), weights.shape)
        tensor.CopyFrom(numpy_helper.from_array((weights + noise).astype(np.float32), _WEIGHT))

    return _changed(model, change)


def not_a_number(model: bytes) -> bytes:
    """One weight is NaN, as after a training that diverged: so is one score of each answer."""

    def change(graph: Any, numpy_helper: Any, _helper: Any) -> None:
        tensor = _found(graph, _BIAS)
        bias = numpy_helper.to_array(tensor).copy()
        bias[0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(bias, _BIAS))

    return _changed(model, change)


def worse_at_night(model: bytes) -> bytes:
    """Surer of its best class than `model` with most pictures, and much less so with dark ones."""

    def change(graph: Any, numpy_helper: Any, helper: Any) -> None:
        graph.node[-1].output[0] = "even"
        values = {"dark": [[_DARK]], "surer": [[_SURER]], "less_sure": [[_LESS_SURE]]}
        graph.initializer.extend(
            numpy_helper.from_array(np.array(each, np.float32), name) for name, each in values.items()
        )
        graph.node.extend(
            [
                helper.make_node("ReduceMean", [INPUT], ["brightness"], axes=[1, 2, 3], keepdims=1),
                helper.make_node("Flatten", ["brightness"], ["brightness_of_each"]),
                helper.make_node("Less", ["brightness_of_each", "dark"], ["is_dark"]),
                helper.make_node("Where", ["is_dark", "less_sure", "surer"], ["factor"]),
                helper.make_node("Mul", ["even", "factor"], [OUTPUT]),
            ]
        )

    return _changed(model, change)


def slow_program() -> bytes:
    """For Triton's Python backend: answers as the `model.onnx` beside it does, 0.15 s later."""
    return _PROGRAM.read_bytes()


def _found(graph: Any, name: str) -> Any:  # Any: onnx has no types
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def _changed(model: bytes, change: Callable[[Any, Any, Any], None]) -> bytes:
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import helper, numpy_helper  # noqa: PLC0415

    made = onnx.load_from_string(model)
    change(made.graph, numpy_helper, helper)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString(deterministic=True))
