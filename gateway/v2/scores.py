"""v2 (pure): how sure a classification is: the score of its best class. May use numpy."""

from __future__ import annotations

from typing import Final

import numpy as np

from gateway.v2.outputs import Answer, Output
from gateway.v2.raw import few_floats, to_array

_FLOATS: Final = ("FP16", "BF16", "FP32", "FP64")


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
    numbers = few_floats(output.datatype, answer.body, at, stop) if output.elements == output.shape[-1] else None
    if numbers is not None:
        total = sum(numbers, 0.0)  # NaN and infinity show in it, and may not in the largest
        return max(numbers) if total - total == 0.0 else None
    array = to_array(output.name, output.datatype, output.shape, answer.body[at:stop])
    score = float(array.max(axis=-1).mean(dtype=np.float64))
    return score if np.isfinite(score) else None


def _find(answer: Answer, name: str) -> tuple[Output, tuple[int, int]] | None:
    if len(answer.spans) != len(answer.outputs) or (not name and len(answer.outputs) != 1):
        return None
    for output, span in zip(answer.outputs, answer.spans, strict=True):
        if name in ("", output.name):
            return output, span
    return None
