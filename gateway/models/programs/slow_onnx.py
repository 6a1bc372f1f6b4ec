"""A model that is right and slow, to show what finds that out. Runs in Triton's Python backend, beside `model.onnx`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnxruntime as ort
import triton_python_backend_utils as pb_utils

_SECONDS: Final = 0.15


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: Mapping[str, str]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        file = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self._session = ort.InferenceSession(file, options)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        time.sleep(_SECONDS)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pixels = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        (scores,) = self._session.run(["scores"], {"image": pixels})
        return pb_utils.InferenceResponse([pb_utils.Tensor("scores", scores)])
