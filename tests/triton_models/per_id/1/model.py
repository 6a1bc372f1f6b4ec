"""Tells what reached it with each row."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.01)
        return [_answer(request) for request in requests]


def _answer(request):
    rows = len(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy())
    told = {"id": request.request_id(), "parameters": json.loads(request.parameters() or "{}")}
    text = json.dumps(told, sort_keys=True).encode()
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([[text]] * rows, np.object_))])
