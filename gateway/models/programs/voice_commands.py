"""Reads commands from speech, by PocketSphinx and a grammar. Runs in Triton's Python backend; needs `pocketsphinx`.

Beside it lie the acoustic model `en-us`, the dictionary and a model of phones; one folder up, `commands.gram`, the
sentences that there are. A grammar finds one of its sentences in whatever it hears. So the phones alone, in any order,
are tried on the same audio: where they fit much better than the sentence does, nothing is answered for text.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pocketsphinx
import triton_python_backend_utils as pb_utils

_RATE: Final = 16_000
_MOST_SECONDS: Final = 30
_SILENCE: Final = np.zeros(_RATE * 3 // 10, np.int16)
"""Before and after what is to be read: decoders learn from it what quiet is, and need an end."""

_NOISE: Final = 8.0  # deviation in steps of 16-bit audio; digital silence has no logarithm


class TritonPythonModel:
    """One instance: two decoders, which take one utterance after the other."""

    def initialize(self, args: Mapping[str, str]) -> None:
        folder = os.path.dirname(os.path.abspath(__file__))
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._least = float(parameters["least_score"]["string_value"])
        sounds = {"hmm": os.path.join(folder, "en-us"), "lm": None, "loglevel": "FATAL", "samprate": _RATE}
        grammar = os.path.join(os.path.dirname(folder), "commands.gram")
        with _dictionary(os.path.join(folder, "cmudict-en-us.dict"), grammar) as words:
            self._sentences = pocketsphinx.Decoder(dict=words, jsgf=grammar, **sounds)
            # With narrow beams it takes a third of the time, and tells commands from other sentences no worse.
            phones = os.path.join(folder, "en-us-phone.lm.bin")
            self._phones = pocketsphinx.Decoder(dict=words, allphone=phones, lw=2.0, beam=1e-6, pbeam=1e-6, **sounds)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        audio = pb_utils.get_input_tensor_by_name(request, "audio").as_numpy()
        if len(audio) > _MOST_SECONDS * _RATE:
            return _refused(f"audio has {len(audio)} samples; at most {_MOST_SECONDS} s are read, at 16,000 a second")
        if not len(audio):
            return _refused("audio has no samples")
        text, score = self._read(audio)
        texts = np.array([text.encode()], np.object_)
        scores = np.array([score], np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("text", texts), pb_utils.Tensor("score", scores)])

    def _read(self, audio: np.ndarray) -> tuple[str, float]:
        """The words, "" if none fit; and how well they fit: 0 as well as any sounds would, less is worse."""
        padded = np.concatenate([_SILENCE, audio, _SILENCE])
        noise = np.random.default_rng(0).standard_normal(len(padded)) * _NOISE
        sound = np.clip(padded + noise, -32768, 32767).astype("<i2").tobytes()
        best, reached = _decode(self._sentences, sound)
        if not best:
            return "", -math.inf
        score = reached - _decode(self._phones, sound)[1]
        return (best if score >= self._least else ""), score


@contextmanager
def _dictionary(whole: str, grammar: str) -> Iterator[str]:
    """The path of the part of a dictionary that a grammar needs: all of its 135,000 words take 20 MiB a decoder."""
    with open(grammar, encoding="utf-8") as file:
        needed = set(re.findall(r"[^\s<>()\[\]{}|;=*+/]+", file.read()))
    with open(whole, encoding="utf-8") as file, tempfile.NamedTemporaryFile("w", encoding="utf-8") as part:
        part.writelines(line for line in file if line.partition(" ")[0].partition("(")[0] in needed)
        part.flush()
        yield part.name


def _decode(decoder: Any, sound: bytes) -> tuple[str, float]:
    """The best words, and the logarithm of their score."""
    decoder.reinit_feat()  # it goes on adapting to whom it heard before, who was another caller
    decoder.start_utt()
    decoder.process_raw(sound, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return (found.hypstr, math.log(max(found.score, 1e-300))) if found is not None else ("", -math.inf)


def _refused(text: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))
