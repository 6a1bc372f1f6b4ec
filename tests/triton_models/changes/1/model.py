"""Means something else by its first axis, once it is loaded with another config."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.has_batches = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests):
        time.sleep(0.005)
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]

    def _answer(self, numbers):
        more = np.int32(0 if self.has_batches else len(numbers))
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers + more)])
