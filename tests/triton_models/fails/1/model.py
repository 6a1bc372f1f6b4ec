"""Fails as it is told: IN is the text, CODE the name of a TRITONSERVER error code."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [_fail(request) for request in requests]


def _fail(request):
    text = pb_utils.get_input_tensor_by_name(request, "IN")
    if not text.as_numpy()[0]:
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", text.as_numpy())])
    code = pb_utils.get_input_tensor_by_name(request, "CODE")
    name = code.as_numpy()[0].decode() if code else "INTERNAL"
    error = pb_utils.TritonError(text.as_numpy()[0].decode(), getattr(pb_utils.TritonError, name))
    return pb_utils.InferenceResponse(error=error)
