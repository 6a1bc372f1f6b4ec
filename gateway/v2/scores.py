"""v2 (pure): how sure a classification is: the score of its best class. May use numpy."""

from __future__ import annotations

from typing import Final

import numpy as np

from gateway.v2.outputs import Answer, Output
from gateway.v2.raw import to_array

_FLOATS: Final = ("FP16", "BF16", "FP32", "FP64")
_FEW: Final = 64  # numbers that are sooner looked at one by one than by numpy


def top_score(answer: Answer, name: str) -> float | None:
    """The largest number along the last axis of an output, the mean of its rows.

    name: of the output; "": the only one.
    returns: None if there is no such output of floats, or it has no numbers here, or they are not finite.
    """
    found = _find(answer, name)
    if found is None:
        return None
    output, (at, stop) = found
    if output.datatype not in _FLOATS or output.size != stop - at or not output.size or not output.shape:
        return None
    if output.elements == output.shape[-1] and output.elements <= _FEW and output.datatype == "FP32" and _IS_LITTLE:
        numbers = memoryview(answer.body)[at:stop].cast("f")
        total = sum(numbers, 0.0)  # NaN and infinity show in it, and may not in the largest
        return float(max(numbers)) if total - total == 0.0 else None
    array = to_array(output.name, output.datatype, output.shape, answer.body[at:stop])
    score = float(array.max(axis=-1).mean(dtype=np.float64))
    return score if np.isfinite(score) else None


_IS_LITTLE: Final = np.little_endian


def _find(answer: Answer, name: str) -> tuple[Output, tuple[int, int]] | None:
    if len(answer.spans) != len(answer.outputs) or (not name and len(answer.outputs) != 1):
        return None
    for output, span in zip(answer.outputs, answer.spans, strict=True):
        if name in ("", output.name):
            return output, span
    return None
