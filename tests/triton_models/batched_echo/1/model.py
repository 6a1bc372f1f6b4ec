"""`params_echo` with a batch axis."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.002)
        return [_tell(request) for request in requests]


def _tell(request):
    told = {"parameters": json.loads(request.parameters() or "{}"), "request_id": request.request_id()}
    text = json.dumps(told, sort_keys=True).encode()
    rows = len(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy())
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([[text]] * rows, np.object_))])
