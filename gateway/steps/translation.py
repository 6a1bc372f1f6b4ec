"""steps (pure): `text_tokens` and `token_text`, around a text-to-text model. May use step, vocabulary, numpy."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gateway.steps.step import BadTensor, Params, Read, Step, StepError
from gateway.steps.vocabulary import BadText, BadVocabulary, Encoded, Vocabulary
from gateway.v2.spec import Array, Tensors, TensorSpec

UNUSED = -1
PLACES = 8
"""Texts are filled up to a multiple of so many words: Triton merges only requests of one shape."""


class VocabularyParams(Params):
    """Where the vocabulary is."""

    vocabulary: str = Field(description="The model's vocabulary.json, relative to the config file.")


def _load(params: VocabularyParams, read: Read) -> Vocabulary:
    try:
        return Vocabulary(read(params.vocabulary))
    except OSError as error:
        wrong = f"cannot read '{params.vocabulary}': {error.strerror or type(error).__name__}"
        raise StepError("vocabulary", wrong, "build the model first: inference-gateway models build") from error
    except BadVocabulary as error:
        raise StepError("vocabulary", f"'{params.vocabulary}': {error}") from error


class TextTokens(Step[VocabularyParams]):
    """Texts → the numbers of their words, a row of numbers for each part of a text."""

    params_type = VocabularyParams

    def __init__(self, params: VocabularyParams, read: Read) -> None:
        self.reads = (TensorSpec("text", "BYTES", (1,)),)
        self.writes = (TensorSpec("tokens", "INT32", (-1, -1)), TensorSpec("unknown", "BYTES", (-1,)))
        self._vocabulary = _load(params, read)

    def is_brief(self, tensors: Tensors) -> bool:
        return sum(map(len, tensors["text"].flat)) < 1024

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        texts = [self._encode(data, row) for row, data in enumerate(tensors["text"][:, 0])]
        parts = max((len(text.parts) for text in texts), default=1)
        words = max((len(part) for text in texts for part in text.parts), default=1)
        tokens = np.full((len(texts), parts, -(-words // PLACES) * PLACES), UNUSED, np.int32)
        unknown = np.full((len(texts), max((len(text.unknown) for text in texts), default=0)), b"", np.object_)
        for row, text in enumerate(texts):
            for at, part in enumerate(text.parts):
                tokens[row, at, : len(part)] = part
            unknown[row, : len(text.unknown)] = [word.encode() for word in text.unknown]
        return {"tokens": tokens, "unknown": unknown}

    def _encode(self, data: bytes, row: int) -> Encoded:
        try:
            return self._vocabulary.encode(data)
        except BadText as error:
            raise BadTensor("text", str(error), row) from None


class TokenText(Step[VocabularyParams]):
    """The numbers that the model made → texts, and whether each came to its end."""

    params_type = VocabularyParams

    def __init__(self, params: VocabularyParams, read: Read) -> None:
        self.reads = (TensorSpec("words", "INT32", (-1, -1)),)
        self.writes = (TensorSpec("text", "BYTES", (1,)), TensorSpec("complete", "BOOL", (1,)))
        self._vocabulary = _load(params, read)

    def is_brief(self, tensors: Tensors) -> bool:
        return tensors["words"].size < 1024

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        rows = [self._vocabulary.decode(parts) for parts in tensors["words"].tolist()]
        texts = np.empty((len(rows), 1), np.object_)
        texts[:, 0] = [text.encode() for text, _ in rows]
        return {"text": texts, "complete": np.array([is_complete for _, is_complete in rows], np.bool_).reshape(-1, 1)}
