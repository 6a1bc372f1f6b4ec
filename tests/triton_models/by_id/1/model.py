"""Answers until it is told to stop, by a request that has the id of the one to be stopped."""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.running = {}
        self.threads = []

    def execute(self, requests):
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        for request in requests:
            times = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            sender, id = request.get_response_sender(), request.request_id()
            if times == 0:
                if id in self.running:
                    self.running[id].set()
                sender.send(pb_utils.InferenceResponse([]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            stop = self.running[id] = threading.Event()
            thread = threading.Thread(target=_answer, args=(sender, times, stop), daemon=True)
            thread.start()
            self.threads.append(thread)

    def finalize(self):
        for thread in self.threads:
            thread.join()


def _answer(sender, times, stop):
    for number in range(times):
        time.sleep(0.01)
        if stop.is_set() or sender.is_cancelled():
            break
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([number + 1], np.int32))]))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
