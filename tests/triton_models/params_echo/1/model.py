"""Tells what reached the model: the request's parameters, id, timeout and flags."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [_tell(request) for request in requests]


def _tell(request):
    told = {
        "parameters": json.loads(request.parameters() or "{}"),
        "request_id": request.request_id(),
        "correlation_id": request.correlation_id(),
        "timeout": request.timeout(),
    }
    text = np.array([json.dumps(told, sort_keys=True).encode()], np.object_)
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", text)])
