"""steps (pure): `file_blocks` and `file_type`, before and after the magika model of file types. May use step.

They give the same answers as the `magika` package 1.0.3; model_repository/README.md has its rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.steps.labels import read_labels, read_text
from gateway.steps.step import BadTensor, Params, Read, Step, StepError, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec

PADDING = 256
"""The token that stands where the file has no byte."""


class FileBlocksParams(Params):
    """Which bytes of a file the model sees."""

    ends: int = Field(
        default=1024,
        ge=8,
        le=65_536,
        description="Bytes taken from the beginning, and as many from the end. What the model was trained with.",
    )
    block: int = Field(
        default=4096,
        ge=8,
        le=1 << 20,
        description="Bytes looked at on either side, white space included. What the model was trained with.",
    )
    min_file_size: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Smaller files, in bytes, are `txt` or `unknown` without asking the model.",
    )
    max_bytes: int = Field(
        default=64 << 20,
        ge=1,
        description="Largest file, in bytes. Only its ends are needed, so send those of a large one.",
    )


class FileBlocks(Step[FileBlocksParams]):
    """Files → the tokens of their ends, and the answer for files that need no model.

    Every row goes to the model, so that a request stays one batch; in `file_type` what is `decided` wins.
    """

    params_type = FileBlocksParams

    def __init__(self, params: FileBlocksParams, read: Read) -> None:
        self.reads = (TensorSpec("file", "BYTES", (1,)),)
        self.writes = (TensorSpec("bytes", "INT32", (2 * params.ends,)), TensorSpec("decided", "BYTES", (1,)))
        self._params = params

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        files = tensors["file"]
        tokens = np.full((len(files), 2 * self._params.ends), PADDING, np.int32)
        decided = np.full((len(files), 1), b"", np.object_)
        for row, data in enumerate(files[:, 0]):
            if len(data) > self._params.max_bytes:
                raise BadTensor("file", f"{len(data)} bytes; at most {self._params.max_bytes} are allowed", row)
            decided[row, 0] = self._fill(data, tokens[row])
        return {"bytes": tokens, "decided": decided}

    def _fill(self, data: bytes, tokens: Array) -> bytes:
        """Write one row of tokens. Returns the label of a file that needs no model, else b""."""
        if not data:
            return b"empty"
        ends, block = self._params.ends, self._params.block
        begin = data[:block].lstrip()[:ends]
        end = data[-block:].rstrip()[-ends:]
        tokens[: len(begin)] = np.frombuffer(begin, np.uint8)
        tokens[len(tokens) - len(end) :] = np.frombuffer(end, np.uint8)
        return _tell_text(data[:block]) if len(begin) < self._params.min_file_size else b""


def _tell_text(data: bytes) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError:
        return b"unknown"
    return b"txt"


class _Type(BaseModel):
    """The facts about one label."""

    model_config = ConfigDict(frozen=True)

    mime_type: str | None
    is_text: bool

    @property
    def mime(self) -> str:
        return self.mime_type or ("text/plain" if self.is_text else "application/octet-stream")


class _Types(BaseModel):
    """The part of content_types.json that is used here."""

    model_config = ConfigDict(frozen=True)

    thresholds: dict[str, float]
    medium_confidence_threshold: float
    overwrite_map: dict[str, str]
    types: dict[str, _Type]

    def threshold(self, label: str, confidence: str) -> float:
        if confidence == "any":
            return -np.inf
        medium = self.medium_confidence_threshold
        return medium if confidence == "medium" else self.thresholds.get(label, medium)

    def named(self, label: str) -> str:
        return self.overwrite_map.get(label, label)

    def generic(self, label: str) -> str:
        return "txt" if self.types[self.named(label)].is_text else "unknown"


class FileTypeParams(Params):
    """How the model's answer becomes a file type."""

    labels: str = Field(description="File with the model's labels, one a line, relative to the config file.")
    types: str = Field(
        description="content_types.json beside it: thresholds, labels that stand for others, MIME types; relative to "
        "the config file."
    )
    confidence: Literal["high", "medium", "any"] = Field(
        default="high",
        description="When to believe the model: above a threshold of each type's own (high), above one for all "
        "(medium), or always (any). An answer that is not believed becomes `txt` or `unknown`.",
    )


class FileType(Step[FileTypeParams]):
    """The model's probabilities → one label with its probability and MIME type."""

    params_type = FileTypeParams

    def __init__(self, params: FileTypeParams, read: Read) -> None:
        self.reads = (TensorSpec("target_label", "FP32", (-1,)), TensorSpec("decided", "BYTES", (1,)))
        self.writes = (
            TensorSpec("label", "BYTES", (1,)),
            TensorSpec("score", "FP32", (1,)),
            TensorSpec("mime_type", "BYTES", (1,)),
        )
        types = _load_types(params.types, read)
        labels = [label.decode() for label in read_labels("labels", params.labels, read)]
        try:
            self._sure = _objects(types.named(label) for label in labels)
            self._unsure = _objects(types.generic(label) for label in labels)
        except KeyError as exc:
            raise StepError("types", f"'{params.types}' does not know the label {exc}") from exc
        self._thresholds = np.array([types.threshold(label, params.confidence) for label in labels])
        self._mime_types = {label.encode(): about.mime.encode() for label, about in types.types.items()}

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        probabilities, decided = tensors["target_label"], tensors["decided"]
        if probabilities.shape[1] != len(self._sure):
            classes = probabilities.shape[1]
            raise WrongAnswer(f"tensor 'target_label' has {classes} classes, the file of labels has {len(self._sure)}")
        best = probabilities.argmax(axis=1)
        score = probabilities.max(axis=1)
        # The original compares in double precision: in float32, 0.9 would be a little less than 0.9.
        label = np.where(score.astype(np.float64) >= self._thresholds[best], self._sure[best], self._unsure[best])
        needs_model = decided[:, 0] == b""
        label = np.where(needs_model, label, decided[:, 0])[:, None]
        score = np.where(needs_model, score, np.float32(1))[:, None]
        return {"label": label, "score": score, "mime_type": self._mime(label)}

    def _mime(self, label: Array) -> Array:
        names = [self._mime_types.get(name, b"application/octet-stream") for name in label[:, 0]]
        return np.array(names, np.object_).reshape(label.shape)


def _load_types(path: str, read: Read) -> _Types:
    try:
        return _Types.model_validate_json(read_text("types", path, read))
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StepError("types", f"'{path}' is not a table of file types: {where}: {first['msg']}") from exc


def _objects(names: Iterable[str]) -> Array:
    return np.array([name.encode() for name in names], np.object_)
