"""Keeps a running sum per sequence, from its start to its end."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self._add(request) for request in requests]

    def _add(self, request):
        value, start, end = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("IN", "START", "END")
        )
        key = request.correlation_id()
        total = (value * 0 if start.flat[0] else self.sums.get(key, value * 0)) + value
        self.sums[key] = total
        if end.flat[0]:
            del self.sums[key]
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", total)])
