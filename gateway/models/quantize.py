"""The int8 variant of EfficientNet-Lite0: onnxruntime's static quantizer, calibrated on real pictures.

QDQ format, unsigned 8-bit activations and signed weights per output channel: the pair that x86 has instructions for.
The weights keep to 7 bits, because on a CPU without VNNI two products of full 8-bit values overflow the 16 bits in
which they are added, silently; with 7 bits they cannot. What this costs in agreement with FP32, and what it gains, is
measured by `gateway.models.measure` and stated in `model_repository/README.md`.

source: onnxruntime documentation, "Quantize ONNX models", "Data type selection" and "When to use reduce-range".
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.efficientnet import INPUT

_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""The mark by which the quantizer knows that shapes are inferred and batch normalisation is folded, as they are."""


def quantize(model: bytes, inputs: NDArray[np.float32]) -> bytes:
    """The int8 ONNX model with the inputs and outputs of `model`, which stay FP32.

    inputs:  calibration tensors, [n, 3, 224, 224].
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415

    prepared = onnx.load_from_string(model)
    prepared.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantizer's own, about numpy and about values it clips to zero
        target = Path(folder) / "int8.onnx"
        quantize_static(
            prepared,
            target,
            _calibration(inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        quantized = onnx.load(target)
    del quantized.metadata_props[:]
    onnx.checker.check_model(quantized, full_check=True)
    return bytes(quantized.SerializeToString(deterministic=True))


def _calibration(inputs: NDArray[np.float32]) -> Any:
    """An onnxruntime `CalibrationDataReader`, which is not typed."""
    from onnxruntime.quantization import CalibrationDataReader  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # its base is not typed
        def __init__(self) -> None:
            self._rows: Iterator[NDArray[np.float32]] = iter(inputs)

        def get_next(self) -> Mapping[str, NDArray[np.float32]] | None:
            row = next(self._rows, None)
            return None if row is None else {INPUT: row[None]}

    return Reader()
