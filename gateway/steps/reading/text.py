"""steps (pure): `ctc_text`, `reading_order`: from the reading model's answers to a page's text. May use step, numpy."""

from __future__ import annotations

from typing import Final

import numpy as np
from pydantic import Field

from gateway.steps.labels import read_text
from gateway.steps.step import Params, Read, Step, StepError, WrongAnswer
from gateway.v2.spec import Array, Tensors, TensorSpec

_SAME_LINE: Final = 0.5  # of the lower height: regions whose middles differ by less are beside each other


class CtcTextParams(Params):
    """What the classes mean."""

    alphabet: str = Field(
        description="File with the characters of the model, one a line, UTF-8, from its class 1 on; relative to the "
        "config file. Class 0 is the blank, and the class after the last is a space."
    )


class CtcText(Step[CtcTextParams]):
    """The best class of each place, and its chance → the text, and the mean chance of its characters.

    Connectionist temporal classification (Graves et al., 2006), decoded greedily: what is repeated counts once, and
    blanks go.
    """

    params_type = CtcTextParams

    def __init__(self, params: CtcTextParams, read: Read) -> None:
        self.reads = (TensorSpec("index", "INT32", (-1,)), TensorSpec("chance", "FP32", (-1,)))
        self.writes = (TensorSpec("text", "BYTES", ()), TensorSpec("score", "FP32", ()))
        characters = read_text("alphabet", params.alphabet, read).removesuffix("\n").split("\n")
        if not all(characters):
            line = characters.index("") + 1
            raise StepError("alphabet", f"'{params.alphabet}' has no character on line {line}", "one character a line")
        self._characters = np.array(["", *characters, " "], np.object_)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        index, chance = tensors["index"], tensors["chance"]
        if index.size and not 0 <= index.min() <= index.max() < len(self._characters):
            at_fault = int(index.max() if index.min() >= 0 else index.min())
            raise WrongAnswer(f"tensor 'index' has {at_fault}; the alphabet has {len(self._characters)} classes")
        is_new = index != 0
        is_new[:, 1:] &= index[:, 1:] != index[:, :-1]
        texts = np.empty(len(index), np.object_)
        scores = np.zeros(len(index), np.float32)
        for row, new in enumerate(is_new):
            texts[row] = "".join(self._characters[index[row, new]]).encode()
            if new.any():
                scores[row] = chance[row, new].mean()
        return {"text": texts, "score": scores}


class ReadingOrderParams(Params):
    """Which lines are answered."""

    least_score: float = Field(
        default=0.5, ge=0, le=1, description="Lines read with a lower mean chance are left out, as are empty ones."
    )


class ReadingOrder(Step[ReadingOrderParams]):
    """The lines of a page → those that were read, from top to bottom and left to right along the page's own slant.

    Columns are not recognised: what stands at one height is read across.
    """

    params_type = ReadingOrderParams

    def __init__(self, params: ReadingOrderParams, read: Read) -> None:
        self.reads = self.writes = (
            TensorSpec("text", "BYTES", (-1,)),
            TensorSpec("score", "FP32", (-1,)),
            TensorSpec("box", "FP32", (-1, 4, 2)),
            TensorSpec("lines", "INT32", (1,)),
        )
        self._least = params.least_score

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        orders = [self._order(tensors, row) for row in range(len(tensors["lines"]))]
        most = max(map(len, orders), default=0)
        text = np.full((len(orders), most), b"", np.object_)
        score = np.zeros((len(orders), most), np.float32)
        box = np.zeros((len(orders), most, 4, 2), np.float32)
        for row, order in enumerate(orders):
            for made, name in ((text, "text"), (score, "score"), (box, "box")):
                made[row, : len(order)] = tensors[name][row, order]
        lines = np.array([[len(order)] for order in orders], np.int32).reshape(-1, 1)
        return {"text": text, "score": score, "box": box, "lines": lines}

    def _order(self, tensors: Tensors, row: int) -> Array:
        count = tensors["lines"][row, 0]
        is_good = tensors["score"][row, :count] >= self._least
        has_text = np.array([bool(text.decode().strip()) for text in tensors["text"][row, :count]], np.bool_)
        good = np.flatnonzero(is_good & has_text)
        return good[reading_order(tensors["box"][row, good])]


def reading_order(boxes: Array) -> Array:
    """The order in which to read regions. boxes: (regions, 4, 2), corners from the top left clockwise."""
    if not len(boxes):
        return np.zeros(0, np.intp)
    along, down = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 0]
    slant = _slant(along, np.hypot(down[:, 0], down[:, 1]))
    cos, sin = np.cos(slant), np.sin(slant)
    straight = boxes.mean(axis=1) @ np.array([(cos, -sin), (sin, cos)])
    height = np.hypot(down[:, 0], down[:, 1])
    order: list[int] = []
    beside: list[int] = []
    for region in np.argsort(straight[:, 1], kind="stable").tolist():
        lowest = min(height[region], *height[beside]) if beside else 0.0
        if beside and straight[region, 1] - straight[beside, 1].mean() > _SAME_LINE * lowest:
            order += sorted(beside, key=lambda each: straight[each, 0])
            beside = []
        beside.append(region)
    return np.array(order + sorted(beside, key=lambda each: straight[each, 0]), np.intp)


def _slant(along: Array, height: Array) -> float:
    """The angle of most of the text, in radians: the median of the lines, long ones counting for more."""
    width = np.hypot(along[:, 0], along[:, 1])
    lying = width > height
    if not lying.any():
        return 0.0
    angles, weights = np.arctan2(along[lying, 1], along[lying, 0]), width[lying]
    order = np.argsort(angles)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    return float(angles[order][middle])
