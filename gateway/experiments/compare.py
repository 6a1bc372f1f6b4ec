"""experiments (pure): do the answers of two variants agree? The task says what counts. May use numpy.

A comparison looks at the outputs of two answers to the same request, the reference's first, and gives an `Agreement`.
It may raise `CannotCompare`: the outputs do not have the form that the task says, so that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Outputs = Mapping[str, Array]
"""By name; BYTES as objects of `bytes`, BF16 as float32."""


class CannotCompare(ValueError):
    """An answer has not the form that is compared; the text says what is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two answers agree."""

    agrees: bool
    measures: Mapping[str, float]  # what was measured, by names that do not depend on the request
    why: str = ""  # in what they differ, if they do


Comparison = Callable[[Outputs, Outputs], Agreement]
"""A user's own is such a function, too. It is called on a thread beside the event loop."""


def non_finite(outputs: Outputs) -> Sequence[str]:
    """The outputs that have NaN or infinity among their values."""
    return [name for name, array in outputs.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]


@dataclass(frozen=True, slots=True)
class Tensors:
    """Every element is close: |a - b| <= absolute + relative * |a|, as numpy.allclose has it. NaN equals NaN.

    Measures: `absolute`, the largest |a - b|; `relative`, the largest |a - b| / |a| where a is not 0; `cosine`, the
    smallest cosine of two outputs. Texts must be equal.
    """

    absolute: float = 1e-5
    relative: float = 1e-3
    cosine: float = -1.0  # the least cosine of each output

    def __call__(self, reference: Outputs, candidate: Outputs) -> Agreement:
        worst = {"absolute": 0.0, "relative": 0.0, "cosine": 1.0}
        differs: list[str] = []
        for name in _common(reference, candidate):
            a, b = reference[name], candidate[name]
            if a.shape != b.shape:
                differs.append(f"output '{name}' has shape {list(b.shape)} and not {list(a.shape)}")
                continue
            if a.dtype.kind not in "fiub" or b.dtype.kind not in "fiub":
                unequal = int(np.count_nonzero(a != b))
                if unequal:
                    differs.append(f"output '{name}' differs in {unequal} of {a.size} texts")
                continue
            close = self._measure(a, b, worst)
            if close < a.size:
                differs.append(f"output '{name}' differs in {a.size - close} of {a.size} elements")
        if worst["cosine"] < self.cosine:
            differs.append(f"the cosine is {worst['cosine']:.4g} and not {self.cosine:g} or more")
        return Agreement(not differs, worst, "; ".join(differs))

    def _measure(self, a: Array, b: Array, worst: dict[str, float]) -> int:
        """Note what is worse than before. returns: the number of elements that are close."""
        wide_a, wide_b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            apart = np.abs(wide_a - wide_b)
            same = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
            apart = np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
            if a.dtype.kind in "iu" and b.dtype.kind in "iu":
                same = (a == b).ravel()
                apart = np.maximum(apart, ~same)  # 64 bits are more than a float64 can tell apart
            close = same | (apart <= self.absolute + self.relative * np.abs(wide_a))
            at_all = apart[wide_a != 0] / np.abs(wide_a[wide_a != 0])
        worst["absolute"] = max(worst["absolute"], float(apart.max(initial=0.0)))
        worst["relative"] = max(
            worst["relative"], float(np.nan_to_num(at_all, nan=0.0, posinf=np.inf).max(initial=0.0))
        )
        worst["cosine"] = min(worst["cosine"], _cosine(wide_a, wide_b))
        return int(np.count_nonzero(close))


def _cosine(a: Array, b: Array) -> float:
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if np.array_equal(a, b):
        return 1.0  # which rounding would miss, so that answers that are equal would not reach a least cosine of 1
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if size == 0.0:
        return 0.0
    return float(np.dot(a, b) / size)


@dataclass(frozen=True, slots=True)
class Classification:
    """Each row's best class is the same, and its score is near.

    Measures: `top1`, the share of rows with the same best class; `topk`, the mean overlap of the `top` best classes;
    `score`, the largest difference of the reference's best class's score.
    """

    output: str = ""  # of scores, shape [..., classes]; "": the only output
    top: int = 5
    score: float = np.inf

    def __call__(self, reference: Outputs, candidate: Outputs) -> Agreement:
        name, a, b = _two(reference, candidate, self.output)
        if a.dtype.kind != "f" or b.dtype.kind != "f" or not a.ndim or not a.shape[-1]:
            raise CannotCompare(f"output '{name}' has no scores; name one of floats whose last axis is the classes")
        if a.shape != b.shape:
            return Agreement(False, {}, f"output '{name}' has shape {list(b.shape)} and not {list(a.shape)}")
        rows_a, rows_b = a.reshape(-1, a.shape[-1]).astype(np.float64), b.reshape(-1, a.shape[-1]).astype(np.float64)
        if not len(rows_a):
            return Agreement(True, {"top1": 1.0, "topk": 1.0, "score": 0.0})
        best_a, best_b = _best(rows_a, self.top), _best(rows_b, self.top)
        same = best_a[:, 0] == best_b[:, 0]
        overlap = (best_a[:, :, None] == best_b[:, None, :]).any(axis=2).mean()
        rows = np.arange(len(rows_a))
        apart = np.abs(rows_a[rows, best_a[:, 0]] - rows_b[rows, best_a[:, 0]])
        score = float(np.where(np.isnan(apart), np.inf, apart).max())
        agrees = bool(same.all()) and score <= self.score
        why = (
            ""
            if agrees
            else f"the best class differs in {int((~same).sum())} of {len(same)} rows; scores by {score:.4g}"
        )
        return Agreement(agrees, {"top1": float(same.mean()), "topk": float(overlap), "score": score}, why)


def _best(rows: Array, top: int) -> Array:
    """The classes with the highest scores in order, of each row; NaN is the lowest, and of equals the first wins."""
    filled = np.where(np.isnan(rows), -np.inf, rows)
    return np.argsort(-filled, axis=1, kind="stable")[:, : min(top, rows.shape[1])]


@dataclass(frozen=True, slots=True)
class Texts:
    """Each text is the same but for a share of its characters.

    Measures: `equal`, the share of texts that are the same; `distance`, the largest edit distance (V. Levenshtein,
    1966) by the length of the longer text. Of longer texts the first MOST_TEXT characters are compared, and whether
    they are equal.
    """

    output: str = ""
    distance: float = 0.0

    def __call__(self, reference: Outputs, candidate: Outputs) -> Agreement:
        name, a, b = _two(reference, candidate, self.output)
        if a.dtype.kind != "O" or b.dtype.kind != "O":
            raise CannotCompare(f"output '{name}' has no texts; name one of BYTES")
        if a.shape != b.shape:
            return Agreement(False, {}, f"output '{name}' has shape {list(b.shape)} and not {list(a.shape)}")
        pairs = [(_text(x), _text(y)) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
        equal = [x == y for x, y in pairs]
        worst = max((_distance(x, y) for x, y in pairs if x != y), default=0.0)
        share = sum(equal) / len(equal) if equal else 1.0
        agrees = worst <= self.distance
        why = (
            "" if agrees else f"{len(equal) - sum(equal)} of {len(equal)} texts differ, by {worst:.2g} of their length"
        )
        return Agreement(agrees, {"equal": share, "distance": worst}, why)


MOST_TEXT: Final = 2000


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _distance(a: str, b: str) -> float:
    if a == b:
        return 0.0
    a, b = a[:MOST_TEXT], b[:MOST_TEXT]
    longest = max(len(a), len(b))
    letters = np.array([ord(letter) for letter in b])
    row = np.arange(len(b) + 1)
    for at, letter in enumerate(a):
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        following = np.concatenate(([at + 1], above))
        # An insertion costs 1 for each place to the right: the smallest of what is left of it, and the way from there.
        row = np.minimum.accumulate(following - np.arange(len(following))) + np.arange(len(following))
    return max(float(row[-1]), 1.0) / longest  # their ends may be what differs


@dataclass(frozen=True, slots=True)
class Detections:
    """The same things are found in the same places: boxes are paired from the highest score on, by their overlap (IoU).

    Boxes are [..., 4] as x1, y1, x2, y2; scores and classes have the same number. A box below `score` does not count.
    Measures: `matched`, the share of the boxes of either answer that have a partner; `iou`, the mean of the pairs.
    """

    boxes: str
    scores: str
    classes: str = ""
    iou: float = 0.5
    score: float = 0.5
    matched: float = 1.0  # the share of boxes that must have a partner

    def __call__(self, reference: Outputs, candidate: Outputs) -> Agreement:
        a, b = self._found(reference), self._found(candidate)
        overlaps: list[float] = []
        free = list(range(len(b[0])))
        for box, kind in zip(*a, strict=True):
            near = [(_iou(box, b[0][at]), at) for at in free if b[1][at] == kind]
            best = max(near, default=(0.0, -1))
            if best[0] >= self.iou:
                overlaps.append(best[0])
                free.remove(best[1])
        total = len(a[0]) + len(b[0])
        share = 2 * len(overlaps) / total if total else 1.0
        measures = {"matched": share, "iou": float(np.mean(overlaps)) if overlaps else 1.0 if not total else 0.0}
        why = "" if share >= self.matched else f"{total - 2 * len(overlaps)} of {total} boxes have no partner"
        return Agreement(share >= self.matched, measures, why)

    def _found(self, outputs: Outputs) -> tuple[Array, list[object]]:
        boxes, scores = _output(outputs, self.boxes), _output(outputs, self.scores).ravel()
        if boxes.ndim < 2 or boxes.shape[-1] != 4 or boxes.size // 4 != scores.size:
            raise CannotCompare(
                f"outputs '{self.boxes}' and '{self.scores}' are no boxes of four numbers with a score each"
            )
        kinds = _output(outputs, self.classes).ravel() if self.classes else np.zeros(scores.size)
        if kinds.size != scores.size:
            raise CannotCompare(f"output '{self.classes}' has {kinds.size} classes for {scores.size} boxes")
        order = [at for at in np.argsort(-scores, kind="stable") if scores[at] >= self.score]
        return boxes.reshape(-1, 4).astype(np.float64)[order], [kinds[at] for at in order]


def _iou(a: Array, b: Array) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = max(0.0, float(width)) * max(0.0, float(height))
    both = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / both if both > 0.0 else 1.0 if np.array_equal(a, b) else 0.0


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best `top` are the same, in nearly the same order. The output has candidates' scores, or their ids in order.

    Measures: `overlap`, the share of the best that both have, mean of the rows; `tau`, Kendall's rank correlation
    (M. Kendall, 1938; -1 to 1) of the scores of all candidates, or of the ids that both have; smallest of the rows.
    """

    output: str = ""
    top: int = 10
    overlap: float = 1.0
    tau: float = -1.0

    def __call__(self, reference: Outputs, candidate: Outputs) -> Agreement:
        name, a, b = _two(reference, candidate, self.output)
        if not a.ndim or not b.ndim or a.shape[:-1] != b.shape[:-1]:
            raise CannotCompare(f"output '{name}' has no lists of candidates, or not as many of them")
        overlaps, taus = [1.0], [1.0]
        rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
        pairs = [self._measure(x, y) for x, y in rows]
        if pairs:
            overlaps, taus = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        measures = {"overlap": float(np.mean(overlaps)), "tau": float(min(taus))}
        agrees = measures["overlap"] >= self.overlap and measures["tau"] >= self.tau
        why = (
            ""
            if agrees
            else f"of the best {self.top} they share {measures['overlap']:.2g}; tau is {measures['tau']:.2g}"
        )
        return Agreement(agrees, measures, why)

    def _measure(self, a: Array, b: Array) -> tuple[float, float]:
        if a.dtype.kind == "f":
            if len(a) != len(b):
                raise CannotCompare(f"{len(a)} candidates have scores in one answer, and {len(b)} in the other")
            best_a, best_b = (list(_best(row[None].astype(np.float64), self.top)[0]) for row in (a, b))
            tau = _tau(a.astype(np.float64), b.astype(np.float64))
        else:
            best_a, best_b = list(a[: self.top]), list(b[: self.top])
            places = {value: at for at, value in reversed(list(enumerate(b.tolist())))}
            both = [places[value] for value in dict.fromkeys(a.tolist()) if value in places]
            tau = _tau(np.arange(len(both)), np.array(both))
        return len(set(best_a) & set(best_b)) / max(1, len(best_a)), tau


_MOST_RANKED: Final = 1000  # all pairs of them are compared


def _tau(a: Array, b: Array) -> float:
    """Kendall's tau-b of two lists of one length; of more than _MOST_RANKED, of those that are best in `a`."""
    if len(a) > _MOST_RANKED:
        best = np.argsort(-a, kind="stable")[:_MOST_RANKED]
        a, b = a[best], b[best]
    upper = np.triu_indices(len(a), 1)
    x = np.sign(a[:, None] - a[None, :])[upper]
    y = np.sign(b[:, None] - b[None, :])[upper]
    untied = float(np.sqrt(np.count_nonzero(x)) * np.sqrt(np.count_nonzero(y)))
    return max(-1.0, min(1.0, float(np.dot(x, y)) / untied)) if untied else 1.0


def _common(reference: Outputs, candidate: Outputs) -> Sequence[str]:
    """The outputs of the reference. :raises CannotCompare: if the candidate lacks one."""
    lacking = sorted(set(reference) - set(candidate))
    if lacking:
        raise CannotCompare(f"the answer lacks output '{lacking[0]}'; it has {', '.join(sorted(candidate)) or 'none'}")
    return list(reference)


def _two(reference: Outputs, candidate: Outputs, name: str) -> tuple[str, Array, Array]:
    if not name:
        if len(reference) != 1:
            raise CannotCompare(f"there are {len(reference)} outputs; say which: {', '.join(sorted(reference))}")
        name = next(iter(reference))
    return name, _output(reference, name), _output(candidate, name)


def _output(outputs: Outputs, name: str) -> Array:
    found = outputs.get(name)
    if found is None:
        raise CannotCompare(f"the answer lacks output '{name}'; it has {', '.join(sorted(outputs)) or 'none'}")
    return found
