"""A text-to-text model that answers word by word. Decoupled; runs in Triton's Python backend.

Beside it lie `encoder.onnx`, `decoder.onnx`, `vocabulary.json` and `vocabulary.py` (`gateway.models.text_to_text` says
what each is). Every text under way makes one word in turn, so that a long text keeps nobody waiting; before each word
the caller is looked for, and a text whose caller has gone is dropped.

Answers: for each word `text`, the piece that it adds. The last one has no `text` but says in `complete` whether the
text came to its end. The first says in `unknown` which words of the source were not known.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from vocabulary import BadText, Encoded, Vocabulary  # type: ignore[import-not-found]

_OUT: Final = "_out"
_NEVER: Final = -1e30
_THREADS: Final = "intra_op_thread_count"
_PAUSE: Final = "pause_ms"
"""Parameters of the model's config. `pause_ms`: least milliseconds between two words, 0 unless a test wants to look."""


class TritonPythonModel:
    """One instance: a thread that decodes whatever texts are under way."""

    def initialize(self, args: Mapping[str, str]) -> None:
        folder = os.path.dirname(os.path.abspath(__file__))
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._decoder = Decoder(folder, int(_parameter(parameters, _THREADS, "1")))
        self._pause = float(_parameter(parameters, _PAUSE, "0")) / 1000
        self._family = pb_utils.MetricFamily(  # kept, as its metrics end with it
            name="text_stream_words_total",
            description="Words that a text-to-text model has decoded, its ends of texts included.",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._words = self._family.Metric(labels={"model": args["model_name"], "version": args["model_version"]})
        self._arrived: deque[_Answer] = deque()
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        with self._changed:
            self._arrived.extend(_Answer(request, self._decoder) for request in requests)
            self._changed.notify()

    def finalize(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        under_way: list[_Answer] = []
        while True:
            with self._changed:
                while not (under_way or self._arrived or self._is_over):
                    self._changed.wait()
                under_way.extend(self._arrived)
                self._arrived.clear()
            if not under_way:
                return
            under_way = [answer for answer in under_way if self._goes_on(answer)]

    def _goes_on(self, answer: _Answer) -> bool:
        """One word. Returns whether there are more."""
        try:
            goes_on = answer.advance()
            if answer.has_decoded:
                self._words.increment(1)
        except Exception as error:  # the thread must live, for the other texts
            pb_utils.Logger.log_error(f"a text was dropped: {type(error).__name__}: {error}")
            return answer.give_up(error)
        if self._pause:
            time.sleep(self._pause)
        return goes_on


class _Answer:
    """One request, from its text to its last answer."""

    def __init__(self, request: Any, decoder: Decoder) -> None:
        self._request = request  # the sender needs it alive to know whether it is cancelled
        self._sender = request.get_response_sender()
        self._decoder = decoder
        self._words: Iterator[tuple[str, bool]] | None = None
        self._unknown: Sequence[str] = ()
        self.has_decoded = False  # did the last turn run the network?

    def advance(self) -> bool:
        """Make and send a word. False: nothing more will come."""
        self.has_decoded = False
        try:
            if self._sender.is_cancelled():
                return self._fail("the caller has gone", pb_utils.TritonError.CANCELLED)
            if self._words is None:
                encoded = self._decoder.vocabulary.encode(_text_of(self._request))
                self._words, self._unknown = self._decoder.words(encoded), encoded.unknown
            piece, is_complete = next(self._words)
        except BadText as error:
            return self._fail(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # whatever it is, it is this text's
            return self._fail(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        self.has_decoded = True
        self._send(piece, is_complete)
        return bool(piece)

    def give_up(self, error: Exception) -> bool:
        """Tell the caller, if that can be told anything."""
        with suppress(Exception):
            self._fail(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        return False

    def _send(self, piece: str, is_complete: bool) -> None:
        unknown, self._unknown = self._unknown, ()
        tensors = [
            pb_utils.Tensor("text", np.array([[piece.encode()]], np.object_)),
            pb_utils.Tensor("unknown", np.array([[word.encode() for word in unknown or ("",)]], np.object_)),
            pb_utils.Tensor("complete", np.array([[is_complete]])),
        ]
        flags = 0 if piece else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def _fail(self, text: str, code: int) -> bool:
        error = pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))
        self._sender.send(error, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return False


class Decoder:
    """The network and its vocabulary."""

    def __init__(self, folder: str, threads: int) -> None:
        with open(os.path.join(folder, "vocabulary.json"), "rb") as file:
            self.vocabulary = Vocabulary(file.read())
        self._encoder, self._decoder = (_open(os.path.join(folder, f"{side}.onnx"), threads) for side in _SIDES)
        self._states = [node.name for node in self._decoder.get_inputs()][1:]
        self._made = [node.name for node in self._encoder.get_outputs()]
        self._changing = [node.name for node in self._decoder.get_outputs()][1:]
        words = len(self.vocabulary.target)
        self._bias = np.zeros((1, words), np.float32)
        self._bias[:, list(self.vocabulary.forbidden)] = _NEVER
        self._bias_first = self._bias.copy()
        self._bias_first[:, list(self.vocabulary.forbidden_first)] = _NEVER

    def words(self, encoded: Encoded) -> Iterator[tuple[str, bool]]:
        """Each word's piece of text, with False; last "", with whether every part came to its end.

        A word that writes nothing gives nothing. Each `next` runs the network until there is a piece.
        """
        is_complete, begins_text = True, True
        for part in encoded.parts:
            begins_part = True
            number = self.vocabulary.start
            for number in self._numbers(part):
                piece = self.vocabulary.piece(number, begins_part=begins_part, begins_text=begins_text)
                if piece:
                    begins_part = begins_text = False
                    yield piece, False
            is_complete = is_complete and number == self.vocabulary.end
        yield "", is_complete

    def _numbers(self, part: Sequence[int]) -> Iterator[int]:
        """The decoder's numbers for one part, greedily, the end included; at most `most_tokens`."""
        source = np.array([part], np.int64)
        made = self._encoder.run(None, {"src": source, "src_mask": np.zeros_like(source, np.bool_)})
        states = dict(zip(self._made, made, strict=True))
        word, bias = self.vocabulary.start, self._bias_first
        for _ in range(self.vocabulary.most_tokens):
            given = {state: states[f"{state}{_OUT}"] for state in self._states}
            scores, *changed = self._decoder.run(None, {"prefix": np.array([[word]], np.int64), **given})
            states.update(zip(self._changing, changed, strict=True))
            word = int((scores + bias).argmax())
            bias = self._bias
            yield word
            if word == self.vocabulary.end:
                return


_SIDES: Final = ("encoder", "decoder")


def _open(path: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _parameter(parameters: Mapping[str, Any], name: str, default: str) -> str:
    return str(parameters.get(name, {}).get("string_value", default))


def _text_of(request: Any) -> bytes:
    array = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
    if array.size != 1:
        raise BadText(f"the request has {array.size} texts; send one")
    return bytes(array.flat[0])
