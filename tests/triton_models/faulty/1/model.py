"""Answers that are wrong in kind, with status OK: the config says which."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.002)  # so that a gateway has something to merge
        return [_answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]


def _answer(numbers):
    out, asked = numbers + np.float32(1.0), numbers[:, 0]
    out[asked == -1.0] = np.nan
    out[asked == -2.0] = np.inf
    if asked[0] == -3.0:
        out = out[:, :, None]
    if asked[0] == -4.0:
        out = out.astype(np.float64)
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)])
