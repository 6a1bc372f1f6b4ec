"""steps (pure): where text is, from a map of how likely each pixel is text. May use numpy only.

What the detector's answer becomes is "differentiable binarization" (Liao et al., 2020): the map is cut at a threshold,
each connected region gets the smallest rectangle around it, whose mean in the map is its score, and the rectangle is
widened, since the detector learned to mark the middle of a line only.

The rules and numbers are those of rapidocr 3.10.0 (`ch_ppocr_det/utils.py`), which uses OpenCV, pyclipper and shapely:
the regions' contours, `minAreaRect`, and a polygon offset of that. Here a region is its runs of pixels, the smallest
rectangle is found on its convex hull, and a rectangle that grows by d on all sides needs no polygon library. Regions
inside a hole of another count as any other; a hole itself is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gateway.v2.spec import Array

_LEAST_SIDE: Final = 3.0  # pixels of the map: what is thinner is no text, and 5 when it has been widened
_LEAST_WIDENED: Final = 5.0
_LEAST_ON_PAGE: Final = 3  # whole pixels


@dataclass(frozen=True, slots=True)
class Rules:
    """When a region counts as text."""

    threshold: float = 0.3  # of the map
    least_score: float = 0.5  # mean of the map inside the rectangle
    widen: float = 1.6  # times area / perimeter, in pixels, on each side
    candidates: int = 1000  # most regions that are looked at, the largest first


def text_boxes(chances: Array, width: int, height: int, rules: Rules) -> Iterator[Array]:
    """The corners of each text region: (4, 2) float32, from the top left clockwise, in pixels of the page.

    chances: (rows, columns) float32, how likely each pixel is text.
    width, height: of the page, to which the map is scaled.
    """
    rows, columns = chances.shape
    scale = np.array([width / columns, height / rows])
    for points in _regions(_thickened(chances > rules.threshold), rules.candidates):
        box, short = _smallest_rectangle(points)
        if short < _LEAST_SIDE or _mean_inside(chances, box) < rules.least_score:
            continue
        wide, short = _widened(box, rules.widen)
        if short < _LEAST_WIDENED:
            continue
        on_page = np.clip(np.round(wide * scale), 0, (width, height)).astype(np.int32)
        corners = np.minimum(_clockwise(on_page), (width - 1, height - 1)).astype(np.float32)
        across, down = np.hypot(*(corners[1] - corners[0])), np.hypot(*(corners[3] - corners[0]))
        if int(across) > _LEAST_ON_PAGE and int(down) > _LEAST_ON_PAGE:
            yield corners


def _thickened(mask: Array) -> Array:
    """Each pixel with its neighbours to the right and below: a dilation by 2 x 2."""
    thick = mask.copy()
    thick[:, 1:] |= mask[:, :-1]
    thick[1:] |= thick[:-1].copy()
    return thick


def _regions(mask: Array, most: int) -> Iterator[Array]:
    """The outline of each connected region (8 neighbours), the largest first: (points, 2), x and y of pixels.

    Of each row of pixels only the first and the last of the region are given: its convex hull has no others.
    """
    columns = mask.shape[1]
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).view(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]  # of each run of pixels in a row; exclusive
    if not len(row):
        return
    order = np.lexsort((row, region := _connected(row, start, end, columns + 2)))
    row, start, end, region = row[order], start[order], end[order], region[order]
    is_first_in_row = np.r_[True, (np.diff(region) != 0) | (np.diff(row) != 0)]
    at = np.flatnonzero(is_first_in_row)
    left, right = np.minimum.reduceat(start, at), np.maximum.reduceat(end, at) - 1
    row, region = row[at], region[at]
    first = np.flatnonzero(np.r_[True, np.diff(region) != 0])
    bounds = np.r_[first, len(region)]
    size = np.add.reduceat(right - left + 1, first)
    for number in np.argsort(-size, kind="stable")[:most]:
        part = slice(bounds[number], bounds[number + 1])
        yield np.stack([np.r_[left[part], right[part]], np.r_[row[part], row[part]]], axis=1)


def _connected(row: Array, start: Array, end: Array, stride: int) -> Array:
    """The region of each run: the number of one of its runs. Runs are in the order of their pixels."""
    begins, ends = row * stride + start, row * stride + end
    low = np.searchsorted(ends, begins + stride, side="left")  # the first in the next row that touches it
    touching = np.maximum(np.searchsorted(begins, ends + stride, side="right") - low, 0)
    one = np.repeat(np.arange(len(row)), touching)
    other = np.repeat(low - np.cumsum(touching) + touching, touching) + np.arange(len(one))
    region = np.arange(len(row))
    while True:
        here, there = region[one], region[other]
        if (here == there).all():
            return region
        np.minimum.at(region, np.maximum(here, there), np.minimum(here, there))
        while (region != region[region]).any():
            region = region[region]


def _hull(points: Array) -> Array:
    """The corners of the convex hull, in order (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))
    sides: list[list[tuple[float, float]]] = []
    for way in (ordered, ordered[::-1]):
        side: list[tuple[float, float]] = []
        for x, y in way:
            while len(side) > 1:
                (ax, ay), (bx, by) = side[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                side.pop()
            side.append((x, y))
        sides.append(side[:-1])
    return np.array([*sides[0], *sides[1]] or ordered[:1], np.float64)


def _smallest_rectangle(points: Array) -> tuple[Array, float]:
    """The smallest rectangle around the points: its corners, and the length of its shorter side.

    One of its sides is on the hull (Freeman and Shapira, 1975).
    """
    hull = _hull(points)
    along = np.roll(hull, -1, axis=0) - hull
    length = np.hypot(along[:, 0], along[:, 1])
    if not length.any():
        return np.repeat(hull[:1], 4, axis=0), 0.0
    along = along[length > 0] / length[length > 0, None]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    on_along, on_across = hull @ along.T, hull @ across.T  # (corners, sides)
    low = np.stack([on_along.min(axis=0), on_across.min(axis=0)])
    high = np.stack([on_along.max(axis=0), on_across.max(axis=0)])
    size = high - low
    best = int(np.argmin(size[0] * size[1]))
    axes = np.stack([along[best], across[best]])
    (a, b), (c, d) = low[:, best], high[:, best]
    corners = np.array([(a, b), (c, b), (c, d), (a, d)]) @ axes
    return corners, float(size[:, best].min())


def _widened(box: Array, ratio: float) -> tuple[Array, float]:
    """The rectangle, grown by ratio x area / perimeter on all sides, and its shorter side."""
    across, down = np.hypot(*(box[1] - box[0])), np.hypot(*(box[3] - box[0]))
    grow = across * down * ratio / (2 * (across + down))
    whole, _ = _smallest_rectangle(np.trunc(box))  # the original offsets whole pixels
    along, aside = whole[1] - whole[0], whole[3] - whole[0]
    wide, high = np.hypot(*along), np.hypot(*aside)
    along, aside = along / max(wide, 1e-9) * grow, aside / max(high, 1e-9) * grow
    corners = whole + np.array([-along - aside, along - aside, along + aside, aside - along])
    return corners, float(min(wide, high) + 2 * grow)


def _mean_inside(chances: Array, box: Array) -> float:
    """The mean of the map over the pixels inside a rectangle, its edges included."""
    rows, columns = chances.shape
    low = np.clip(np.floor(box.min(axis=0)), 0, (columns - 1, rows - 1)).astype(int)
    high = np.clip(np.ceil(box.max(axis=0)), 0, (columns - 1, rows - 1)).astype(int)
    x, y = np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1)[:, None]
    corners = np.trunc(box - low) + low
    inside = np.ones((len(y), len(x)), np.bool_)
    centre = corners.mean(axis=0)
    for begin, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = end - begin
        length = np.hypot(*along)
        if length == 0:
            continue
        nx, ny = -along[1] / length, along[0] / length
        side = 1.0 if nx * (centre[0] - begin[0]) + ny * (centre[1] - begin[1]) >= 0 else -1.0
        inside &= side * (nx * (x - begin[0]) + ny * (y - begin[1])) >= -0.5
    values = chances[low[1] : high[1] + 1, low[0] : high[0] + 1][inside]
    return float(values.mean()) if values.size else 0.0


def _clockwise(corners: Array) -> Array:
    """The corners from the top left clockwise: of the two on the left the upper one first."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    left, right = (pair[np.argsort(pair[:, 1], kind="stable")] for pair in (by_x[:2], by_x[2:]))
    return np.stack([left[0], right[0], right[1], left[1]])
