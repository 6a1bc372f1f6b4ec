"""steps (pure): `softmax` and `top_k`, from a classifier's scores to labels. May use labels, step, numpy."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gateway.steps.labels import read_labels
from gateway.steps.step import Params, Read, Step, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec

_SCORES = TensorSpec("scores", "FP32", (-1,))

_BRIEF = 4096
"""Most scores that take no more than 100 µs: four rows of ImageNet's classes."""


def softmax(scores: Array) -> Array:
    """Probabilities of each row: (rows, classes) → the same shape. Each row adds up to 1, and none overflows."""
    if scores.shape[1] == 0:
        return scores
    with np.errstate(over="ignore", invalid="ignore"):  # exp(-inf) is a probability of 0, and NaN stays NaN
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


class SoftmaxParams(Params):
    """None."""


class Softmax(Step[SoftmaxParams]):
    """Scores (logits) → probabilities."""

    params_type = SoftmaxParams

    def __init__(self, params: SoftmaxParams, read: Read) -> None:
        self.reads = self.writes = (_SCORES,)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        return {"scores": softmax(tensors["scores"])}

    def is_brief(self, tensors: Tensors) -> bool:
        return tensors["scores"].size <= _BRIEF


class TopKParams(Params):
    """Which part of the scores is answered."""

    k: int = Field(
        default=5,
        ge=1,
        le=10_000,
        description="How many labels to give, best first; all of them if the model has fewer classes.",
    )
    labels: str | None = Field(
        default=None,
        description="File with the names of the classes, one a line, UTF-8, relative to the config file. Without it a "
        "label is the number of its class.",
    )
    softmax: bool = Field(
        default=False, description="Turn scores into probabilities first; for models that give logits."
    )
    undetermined_below: float | None = Field(
        default=None,
        description="If even the best score is below this, the first label becomes `undetermined`, its index -1.",
    )
    undetermined: str = Field(default="undetermined", description="What to call an answer that is none.")


class TopK(Step[TopKParams]):
    """Scores → the best labels with their scores. Of equal scores the class with the lower number comes first."""

    params_type = TopKParams

    def __init__(self, params: TopKParams, read: Read) -> None:
        self.reads = (_SCORES,)
        self.writes = (
            TensorSpec("label", "BYTES", (-1,)),
            TensorSpec("score", "FP32", (-1,)),
            TensorSpec("index", "INT32", (-1,)),
        )
        self._k = params.k
        self._softmax = params.softmax
        self._least = params.undetermined_below
        self._undetermined = params.undetermined.encode()
        self._labels: Array | None = None
        if params.labels is not None:
            self._labels = np.array(read_labels("labels", params.labels, read), np.object_)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        scores = tensors["scores"]
        if self._labels is not None and len(self._labels) != scores.shape[1]:
            classes = f"{scores.shape[1]} classes, the file of labels has {len(self._labels)}"
            raise WrongAnswer(f"tensor 'scores' has {classes}")
        order = best_of(scores, self._k)
        best = np.take_along_axis(softmax(scores) if self._softmax else scores, order, axis=1)
        labels, index = self._names(order), order.astype(np.int32)
        if self._least is not None:
            unsure = best[:, :1] < self._least
            labels[:, :1][unsure] = self._undetermined
            index[:, :1][unsure] = -1
        return {"label": labels, "score": best, "index": index}

    def is_brief(self, tensors: Tensors) -> bool:
        return tensors["scores"].size <= _BRIEF

    def _names(self, classes: Array) -> Array:
        if self._labels is not None:
            return np.asarray(self._labels[classes])
        return np.array([b"%d" % number for number in classes.flat], np.object_).reshape(classes.shape)


def best_of(scores: Array, k: int) -> Array:
    """Where the `k` best scores of each row are (all, if there are fewer), best first; of equal ones the first.

    NaN comes last. Sorts only what is as good as the k-th best.
    """
    if scores.shape[1] <= k or np.isnan(scores).any():
        return np.argsort(-scores, axis=1, kind="stable")[:, :k]
    order = np.empty((len(scores), k), np.intp)
    for row, least in enumerate(np.partition(scores, -k, axis=1)[:, -k]):
        good = np.flatnonzero(scores[row] >= least)
        order[row] = good[np.argsort(-scores[row, good], kind="stable")[:k]]
    return order
