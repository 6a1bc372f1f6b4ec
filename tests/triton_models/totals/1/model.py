"""Its answer depends on whether it batches."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.batches = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests):
        time.sleep(0.005)
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]

    def _answer(self, numbers):
        added = np.float32(0) if self.batches else numbers.sum()
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers + added)])
