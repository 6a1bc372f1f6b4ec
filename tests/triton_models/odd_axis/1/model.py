"""Splits texts into words, as many rows as there are, whatever its config says of a batch axis."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.01)
        return [_answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]


def _answer(texts):
    words = [[word] for text in texts.flatten() for word in text.split()]
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array(words, np.object_).reshape(-1, 1))])
