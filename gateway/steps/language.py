"""steps (pure): `text_features`, before the model of languages; `top_k` comes after it. May use step, numpy.

It makes the same features as the `py3langid` package 0.4.0; model_repository/README.md has its rules.
"""

from __future__ import annotations

import io
import unicodedata
from functools import cache
from typing import Final

import numpy as np
from pydantic import Field

from gateway.steps.step import BadTensor, Params, Read, Step, StepError
from gateway.v2.spec import Array, Tensors, TensorSpec

LEAST_PLACES = 64
"""Fewest places for features in a request; more are a power of two. Triton merges only requests of one shape."""

_MOST_MARKS: Final = 30
"""Combining marks that are put in order behind one letter. No script writes nearly as many, and sorting takes the
square of their number while it holds the interpreter: a text of 1 MiB of them would stop the process for minutes.
source: UAX #15, 13 (Stream-Safe Text Format), whose limit it is."""

_LAST: Final = 0x1FFFF  # Unicode 17 has no marks beyond it


class TextFeaturesParams(Params):
    """Where the automaton is, and how long a text may be."""

    tables: str = Field(
        description="Folder with the automaton that recognises features: next_state.npy, row_base.npy, feature.npy. "
        "Relative to the config file."
    )
    max_bytes: int = Field(
        default=1 << 20,
        ge=1,
        le=1 << 28,
        description="Longest text, in bytes of UTF-8. Each takes up to 80 ns of one core: 1 MiB 80 ms.",
    )


class TextFeatures(Step[TextFeaturesParams]):
    """Texts → how often each feature occurs. A feature is a sequence of bytes that tells languages apart."""

    params_type = TextFeaturesParams

    def __init__(self, params: TextFeaturesParams, read: Read) -> None:
        self.reads = (TensorSpec("text", "BYTES", (1,)),)
        self.writes = (
            TensorSpec("features", "INT32", (-1,)),
            TensorSpec("counts", "FP32", (-1,)),
            TensorSpec("length", "INT32", (1,)),
        )
        self._max_bytes = params.max_bytes
        next_state, row_base, self._feature = (
            _load_table(f"{params.tables}/{name}.npy", read) for name in ("next_state", "row_base", "feature")
        )
        _check_tables(params.tables, next_state, row_base, self._feature)
        # Plain memoryviews: a Python loop reads them several times faster than numpy arrays.
        self._next_state, self._row_base = next_state.data, row_base.data

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        texts = [self._encode(data, row) for row, data in enumerate(tensors["text"][:, 0])]
        found = [np.unique(self._visit(text), return_counts=True) for text in texts]
        most = max((len(features) for features, _ in found), default=0)
        shape = (len(texts), max(LEAST_PLACES, 1 << (most - 1).bit_length() if most else 0))
        features, counts = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, (which, how_often) in enumerate(found):
            features[row, : len(which)] = which
            counts[row, : len(which)] = how_often
        lengths = np.array([len(text) for text in texts], np.int32)
        return {"features": features, "counts": counts, "length": lengths.reshape(-1, 1)}

    def _encode(self, data: bytes, row: int) -> bytes:
        if len(data) > self._max_bytes:
            raise BadTensor("text", f"{len(data)} bytes; at most {self._max_bytes} are allowed", row)
        return normalise(data)

    def _visit(self, text: bytes) -> Array:
        """The features of a text, each as often as it occurs."""
        next_state, row_base = self._next_state, self._row_base
        state = 0
        states = [state := next_state[row_base[state] + byte] for byte in text]
        features = self._feature[np.array(states, np.intp)]
        return features[features >= 0]


def normalise(data: bytes) -> bytes:
    """Bring a text to the form of the training data: a text all in capitals in lower case, and NFC.

    Bytes that are not UTF-8 stay as they are; up to three bytes of a last character that was cut are dropped.
    """
    text = _decode(data)
    if text is None:
        return data
    if text.isupper():
        text = text.lower()
    return _composed(text).encode()


def _composed(text: str) -> str:
    """NFC, but that of more than 30 marks behind one letter each 30 are put in order among themselves."""
    if text.isascii():
        return text
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    others = np.flatnonzero(np.r_[True, ~_is_mark()[np.minimum(codes, _LAST)], True])
    marks = np.diff(others) - 1  # that follow each other
    ends = [0]
    for at in np.flatnonzero(marks > _MOST_MARKS):
        ends += range(int(others[at]) + _MOST_MARKS, int(others[at + 1]), _MOST_MARKS)
    pieces = (text[begin:end] for begin, end in zip(ends, [*ends[1:], None], strict=True))
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


@cache
def _is_mark() -> Array:
    """Is this character, up to `_LAST`, one that is put in order with its neighbours?"""
    first = (unicodedata.normalize("NFD", chr(code))[0] for code in range(_LAST + 1))
    return np.fromiter((unicodedata.combining(each) > 0 for each in first), np.bool_, _LAST + 1)


def _decode(data: bytes) -> str | None:
    for trim in range(4):
        try:
            return data[: len(data) - trim].decode()
        except UnicodeDecodeError as exc:
            if exc.start < len(data) - 3:  # a fault before the end, which dropping bytes can't mend
                return None
    return None


def _load_table(path: str, read: Read) -> Array:
    """View a .npy file of one axis, without a copy."""
    try:
        data = read(path)
    except OSError as exc:
        raise StepError("tables", f"cannot read '{path}': {exc.strerror or type(exc).__name__}") from exc
    stream = io.BytesIO(data)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        table = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
    except ValueError as exc:
        raise StepError("tables", f"'{path}' is not a .npy file of format 1.0 ({exc})") from exc
    if dtype.kind not in "iu":
        raise StepError("tables", f"'{path}' holds {dtype}, not integers")
    return table


def _check_tables(folder: str, next_state: Array, row_base: Array, feature: Array) -> None:
    """Check once that no text can lead outside the tables."""
    states = len(row_base)
    if not (next_state.ndim == row_base.ndim == feature.ndim == 1 and states and len(feature) == states):
        raise StepError("tables", f"the tables in '{folder}' do not belong together")
    if int(row_base.max()) + 256 > len(next_state) or int(next_state.max()) >= states or int(next_state.min()) < 0:
        raise StepError("tables", f"the tables in '{folder}' lead to states that do not exist")
