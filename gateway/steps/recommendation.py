"""steps (pure): `rank_request` and `top_candidates`, around a model that scores candidates. May use step, numpy."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gateway.steps.step import BadTensor, Params, Read, Step, StepError, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec

UNUSED = -1
PLACES = 16
"""Histories are filled up to a multiple of so many items: Triton merges only requests of one shape."""

_BRIEF = 4096  # elements that take some 50 µs


class RankRequestParams(Params):
    """What exists, and how much of it may be asked for."""

    items: str = Field(description="The model's items.txt, one item a line. Relative to the config file.")
    max_candidates: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Most candidates of one request: each takes 2.5 µs of a core."
    )
    max_history: int = Field(
        default=1_000, ge=1, le=100_000, description="Most items of a history: more say little, and cost the same."
    )


class RankRequest(Step[RankRequestParams]):
    """Checks that the items of a request exist, and fills the history up."""

    params_type = RankRequestParams

    def __init__(self, params: RankRequestParams, read: Read) -> None:
        self.reads = (TensorSpec("history", "INT32", (-1,)), TensorSpec("candidates", "INT32", (-1,)))
        self.writes = (TensorSpec("liked", "INT32", (-1,)), TensorSpec("offered", "INT32", (-1,)))
        self._most = {"history": params.max_history, "candidates": params.max_candidates}
        try:
            self._items = read(params.items).count(b"\n")
        except OSError as error:
            wrong = f"cannot read '{params.items}': {error.strerror or type(error).__name__}"
            raise StepError("items", wrong, "build the model first: inference-gateway models build") from error
        if not self._items:
            raise StepError("items", f"'{params.items}' has no items")

    def is_brief(self, tensors: Tensors) -> bool:
        return tensors["candidates"].size + tensors["history"].size <= _BRIEF

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        history, candidates = tensors["history"], tensors["candidates"]
        for name, items in (("history", history), ("candidates", candidates)):
            self._check(name, items)
        rows, count = history.shape
        liked = np.full((rows, -(-count // PLACES) * PLACES), UNUSED, np.int32)
        liked[:, :count] = history
        return {"liked": liked, "offered": candidates}

    def _check(self, name: str, items: Array) -> None:
        count, most = items.shape[1], self._most[name]
        if not items.size:
            if len(items):
                raise BadTensor(name, f"is empty; send at least one item, 0 … {self._items - 1}")
            return
        if count > most:
            raise BadTensor(name, f"{count} items; at most {most} are allowed")
        wrong = (items < 0) | (items >= self._items)
        if wrong.any():
            row, at = (int(i) for i in np.argwhere(wrong)[0])
            reason = f"item {int(items[row, at])} (number {at} of them) does not exist; items are 0 … {self._items - 1}"
            raise BadTensor(name, reason, row)


class TopCandidatesParams(Params):
    """How many are wanted."""

    k: int = Field(default=100, ge=0, le=1_000_000, description="Most candidates to keep, best first; 0 keeps all.")


class TopCandidates(Step[TopCandidatesParams]):
    """Scores of all candidates → the best candidates, best first; of equal ones, the one that was named first."""

    params_type = TopCandidatesParams

    def __init__(self, params: TopCandidatesParams, read: Read) -> None:
        self.reads = (TensorSpec("offered", "INT32", (-1,)), TensorSpec("scores", "FP32", (-1,)))
        self.writes = (TensorSpec("items", "INT32", (-1,)), TensorSpec("best", "FP32", (-1,)))
        self._k = params.k

    def is_brief(self, tensors: Tensors) -> bool:
        return tensors["scores"].size <= _BRIEF

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        offered, scores = tensors["offered"], tensors["scores"]
        if offered.shape != scores.shape:
            raise WrongAnswer(f"the model made {scores.shape[1]} scores for {offered.shape[1]} candidates")
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k or None]
        return {"items": np.take_along_axis(offered, order, 1), "best": np.take_along_axis(scores, order, 1)}
