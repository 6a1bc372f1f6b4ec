"""Speaks English text, a sentence at a time. Decoupled; runs in Triton's Python backend, with `hibari` beside it.

Every text under way has one sentence spoken in turn, so that a long text keeps nobody waiting. Before each sentence its
caller is looked for, and a text whose caller has gone is dropped.

Answers: `audio` for each sentence; then the last one, which is empty.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hibari import Hibari

_MOST_CHARACTERS: Final = 10_000
_SLOWEST, _FASTEST = 0.5, 2.0

Spoken = tuple[Any, Iterator[np.ndarray]]  # whom the parts are for, and the parts that are still to be made


class TritonPythonModel:
    """One instance: a thread that speaks whatever texts are under way."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._pause = float(parameters.get("pause_ms", {}).get("string_value", 0)) / 1000
        self._speaker = Hibari()
        self._speaker("Ready.")  # reads its dictionaries
        self._texts: deque[Spoken] = deque()
        self._there_is = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                parts = self._parts_of(request)
            except ValueError as error:
                _end(sender, pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
                continue
            with self._there_is:
                self._texts.append((sender, parts))
                self._there_is.notify()

    def finalize(self) -> None:
        with self._there_is:
            self._ends = True
            self._there_is.notify()
        self._thread.join()

    def _parts_of(self, request: Any) -> Iterator[np.ndarray]:
        """Audio for each sentence, made when it is asked for. raises: ValueError if the text can't be spoken."""
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().flat[0].decode("utf-8", "replace")
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"text has {len(text)} characters; at most {_MOST_CHARACTERS} are spoken")
        speed = float(_maybe(request, "speed", 1.0))
        if not _SLOWEST <= speed <= _FASTEST:
            raise ValueError(f"speed is {speed:g}; it is from {_SLOWEST} (slow) to {_FASTEST} (fast), and 1 is usual")
        sounds = self._speaker.phonemize(text)
        if not sounds:
            raise ValueError("text has nothing that can be spoken: no English word and no number")
        noise = np.random.default_rng(int(_maybe(request, "seed", 0)))  # as `Hibari.stream` makes it
        return (self._speaker.from_ids(self._speaker.ids(each), speed, noise) for each in sounds)

    def _speak(self) -> None:
        while True:
            with self._there_is:
                self._there_is.wait_for(lambda: self._texts or self._ends)
                if not self._texts:
                    return
                sender, parts = self._texts.popleft()
            if self._say_next(sender, parts):
                with self._there_is:
                    self._texts.append((sender, parts))

    def _say_next(self, sender: Any, parts: Iterator[np.ndarray]) -> bool:
        """Make and send one part. Is there more to come?"""
        if sender.is_cancelled():
            _end(sender, pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED))
            return False
        try:
            audio = next(parts, None)
        except Exception as error:
            _end(sender, pb_utils.TritonError(f"hibari: {error}"))
            return False
        if audio is None:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return False
        samples = (np.clip(audio, -1.0, 1.0) * 32767).astype(np.int16)  # as `hibari.write_wav` makes it
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("audio", samples)]))
        time.sleep(self._pause)
        return True


def _maybe(request: Any, name: str, default: float) -> float:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().flat[0]


def _end(sender: Any, error: Any) -> None:
    sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
