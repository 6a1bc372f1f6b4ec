"""A request's rows are one text for it, whose words it sorts: no row of its answer belongs to a row of the request."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.002)
        return [_answer(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()) for request in requests]


def _answer(texts):
    words = sorted(word for text in texts.flat for word in text.split())
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array(words, np.object_))])
