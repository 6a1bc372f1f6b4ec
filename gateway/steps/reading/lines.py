"""steps (pure): `text_regions`, `line_pixels`, `turned_line`: the items of a page. May use page, regions, step, numpy.

The sizes and thresholds are those of rapidocr 3.10.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from PIL import Image
from pydantic import Field

from gateway.steps.reading.page import normalised, sampled
from gateway.steps.reading.regions import Rules, text_boxes
from gateway.steps.step import Params, Read, SplitStep, Step
from gateway.v2.spec import Array, Tensors, TensorSpec

_UPRIGHT: Final = 1.5  # a region that is so many times higher than wide is a line from bottom to top or top to bottom
_TURNED: Final = 1  # the class "180" of the model of directions
_LINE: Final = TensorSpec("line", "UINT8", (-1, -1, 3))


class TextRegionsParams(Params):
    """What counts as text, and how its lines are cut out."""

    threshold: float = Field(default=0.3, gt=0, lt=1, description="From which chance on a pixel is text.")
    least_score: float = Field(
        default=0.5, ge=0, le=1, description="Least mean chance of a region. Lower finds fainter text, and noise."
    )
    widen: float = Field(
        default=1.6,
        ge=0,
        le=10,
        description="How far a region is widened: area / perimeter times this. The model marks the middle of lines.",
    )
    candidates: int = Field(default=1000, ge=1, le=10_000, description="Most regions that are looked at in one page.")
    height: int = Field(
        default=48, ge=8, le=256, description="Height of a line, in pixels, that the reading model takes."
    )
    most_width: int = Field(
        default=3200,
        ge=48,
        le=20_000,
        description="Widest line, in pixels at that height; a wider one is squeezed. 3200 is some 200 letters.",
    )
    direction_width: int = Field(
        default=192, ge=48, le=4096, description="Widest line, in pixels, that the model of directions takes."
    )


class TextRegions(SplitStep[TextRegionsParams]):
    """A page and the detector's map → its lines of text, cut out and straightened, in no order.

    `box` has the corners on the page as it was sent, from the top left clockwise, x and y in pixels.
    """

    params_type = TextRegionsParams

    def __init__(self, params: TextRegionsParams, read: Read) -> None:
        self.reads = (
            TensorSpec("page", "UINT8", (-1, -1, 3)),
            TensorSpec("chances", "FP32", (1, -1, -1)),
            TensorSpec("frame", "FP32", (5,)),
        )
        self.writes = (TensorSpec("box", "FP32", (4, 2)), _LINE, TensorSpec("short_line", "UINT8", (-1, -1, 3)))
        self._rules = Rules(params.threshold, params.least_score, params.widen, params.candidates)
        self._height, self._most, self._short = params.height, params.most_width, params.direction_width

    def split(self, row: Tensors) -> Iterator[Tensors]:
        page = Image.fromarray(row["page"])
        across, down, above, width, height = row["frame"].tolist()
        for corners in text_boxes(row["chances"][0], page.width, page.height, self._rules):
            line = straightened(page, corners)
            box = np.clip((corners - (0, above)) * (across, down), 0, (width, height))
            yield {
                "box": box.astype(np.float32),
                "line": np.asarray(self._sized(line, self._most)),
                "short_line": np.asarray(self._sized(line, self._short)),
            }

    def _sized(self, line: Image.Image, most: int) -> Image.Image:
        width = min(math.ceil(self._height * line.width / line.height), most)
        return sampled(line, (max(width, 1), self._height))


def straightened(page: Image.Image, corners: Array) -> Image.Image:
    """The region as an upright rectangle, by perspective; a line that stands is laid on its left side.

    corners: (4, 2), from the top left clockwise.
    """
    top, right, bottom, left = (np.hypot(*side) for side in np.roll(corners, -1, axis=0) - corners)
    width, height = int(max(top, bottom)), int(max(right, left))
    line = page.transform(
        (width, height), Image.Transform.PERSPECTIVE, _perspective(corners, width, height), Image.Resampling.BICUBIC
    )
    return line.transpose(Image.Transpose.ROTATE_90) if height >= _UPRIGHT * width else line


def _perspective(corners: Array, width: int, height: int) -> tuple[float, ...]:
    """Pillow's eight numbers (a … h) that lead from the rectangle to the region: x' = (ax + by + c) / (gx + hy + 1)."""
    flat = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)
    equations, values = [], []
    for (x, y), (on_x, on_y) in zip(flat, corners.astype(np.float64), strict=True):
        equations += [(x, y, 1, 0, 0, 0, -on_x * x, -on_x * y), (0, 0, 0, x, y, 1, -on_y * x, -on_y * y)]
        values += [on_x, on_y]
    matrix = np.append(np.linalg.solve(np.array(equations), np.array(values)), 1).reshape(3, 3)
    # In Pillow a pixel lies half a pixel from its corner, and here it is the corner.
    half = np.array([(1, 0, 0.5), (0, 1, 0.5), (0, 0, 1)])
    matrix = half @ matrix @ np.linalg.inv(half)
    return tuple((matrix / matrix[2, 2]).ravel()[:8].tolist())


class LinePixelsParams(Params):
    """How wide the lines are made, so that those of one width are one batch."""

    least_width: int = Field(
        default=320, ge=1, le=20_000, description="Least width, in pixels; shorter lines are padded."
    )
    round_to: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Wider ones are padded to a multiple of this above it: larger makes larger batches, and more "
        "padding.",
    )


class LinePixels(Step[LinePixelsParams]):
    """Lines → what the models of lines take: blue, green, red, in [-1, 1], padded with 0 on the right."""

    params_type = LinePixelsParams

    def __init__(self, params: LinePixelsParams, read: Read) -> None:
        self.reads = (_LINE,)
        self.writes = (TensorSpec("pixels", "FP32", (3, -1, -1)),)
        self._least, self._round_to = params.least_width, params.round_to

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        lines = tensors["line"]
        count, height, width, _ = lines.shape
        more = math.ceil(max(0, width - self._least) / self._round_to)
        pixels = np.zeros((count, 3, height, self._least + more * self._round_to), np.float32)
        for line, target in zip(lines, pixels, strict=True):
            target[:, :, :width] = normalised(line)
        return {"pixels": pixels}


class TurnedLineParams(Params):
    """When a line is turned."""

    least_chance: float = Field(
        default=0.9, ge=0, le=1, description="How sure the model must be that a line is upside down."
    )


class TurnedLine(Step[TurnedLineParams]):
    """Lines and the model's chances that they are upright or upside down → all of them upright."""

    params_type = TurnedLineParams

    def __init__(self, params: TurnedLineParams, read: Read) -> None:
        self.reads = (_LINE, TensorSpec("direction", "FP32", (2,)))
        self.writes = (_LINE,)
        self._least = params.least_chance

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        lines = tensors["line"].copy()
        direction = tensors["direction"]
        turned = (direction.argmax(axis=1) == _TURNED) & (direction[:, _TURNED] > self._least)
        lines[turned] = lines[turned][:, ::-1, ::-1]
        return {"line": lines}
