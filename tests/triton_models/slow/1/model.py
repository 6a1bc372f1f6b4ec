"""Sleeps for as long as its input says, and heeds nothing meanwhile."""

import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [_sleep(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]


def _sleep(milliseconds):
    time.sleep(int(milliseconds[0, 0]) / 1000)
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", milliseconds)])
