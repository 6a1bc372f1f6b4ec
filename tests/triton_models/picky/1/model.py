"""Refuses negative numbers, for tests of who suffers when requests travel together."""

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.01)
        return [_answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]


def _answer(numbers):
    if (numbers < 0).any():
        error = pb_utils.TritonError("a number is negative", pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(error=error)
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers)])
