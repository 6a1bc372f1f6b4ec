"""Tells its version by what it adds."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.added = np.float32(100 * int(args["model_version"]))

    def execute(self, requests):
        time.sleep(0.005)
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]

    def _answer(self, numbers):
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers + self.added)])
