"""Answers each request with as many responses as it asks for, from a thread of its own, so that requests overlap."""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.threads = []

    def execute(self, requests):
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        for request in requests:
            times = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            delay = pb_utils.get_input_tensor_by_name(request, "DELAY")
            pause = int(delay.as_numpy()[0]) / 1000 if delay else 0.0
            fail_at = pb_utils.get_input_tensor_by_name(request, "FAIL_AT")
            fail = int(fail_at.as_numpy()[0]) if fail_at else -1
            # The response sender keeps the request alive, as is_cancelled() needs.
            args = (request.get_response_sender(), times, pause, fail)
            thread = threading.Thread(target=_answer, args=args, daemon=True)
            thread.start()
            self.threads.append(thread)

    def finalize(self):
        for thread in self.threads:
            thread.join()


def _answer(sender, times, pause, fail):
    for number in range(times):
        time.sleep(pause)
        if sender.is_cancelled():  # said, so that nobody takes what has come so far for all
            cancelled = pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED)
            sender.send(pb_utils.InferenceResponse(error=cancelled))
            break
        if number == fail:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("told to fail")))
            continue
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([number], np.int32))]))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
