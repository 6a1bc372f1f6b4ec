"""Answers OUT = IN, whatever the dtype; the fixture writes one config per dtype for it."""

import json

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        dtype = json.loads(args["model_config"])["input"][0]["data_type"]
        self.copy = _copy_dlpack if dtype == "TYPE_BF16" else _copy  # NumPy does not know BF16

    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([self.copy(pb_utils.get_input_tensor_by_name(request, "IN"))])
            for request in requests
        ]


def _copy(tensor):
    return pb_utils.Tensor("OUT", tensor.as_numpy())


def _copy_dlpack(tensor):
    return pb_utils.Tensor.from_dlpack("OUT", tensor)
