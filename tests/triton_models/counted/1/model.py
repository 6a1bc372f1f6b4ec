"""Says by its answers which version of it has answered; a millisecond or two, so that requests meet."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.version = np.int32(args["model_version"])

    def execute(self, requests):
        time.sleep(0.002)
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]

    def _answer(self, numbers):
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers + self.version)])
