"""v2 (pure): how sure a classification is: the score of its best class. May use numpy."""

from __future__ import annotations

from typing import Final

import numpy as np

from gateway.v2.outputs import Answer
from gateway.v2.raw import to_array

_FLOATS: Final = ("FP16", "BF16", "FP32", "FP64")


def top_score(answer: Answer, name: str) -> float | None:
    """The largest number along the last axis of an output, the mean of its rows.

    name: of the output; "": the only one.
    returns: None if there is no such output of floats, or it has no numbers here, or they are not finite.
    """
    number = _place(answer, name)
    if number < 0:
        return None
    output = answer.outputs[number]
    at, stop = answer.spans[number]
    if output.datatype not in _FLOATS or output.size != stop - at or not output.size or not output.shape:
        return None
    few = answer.few(number) if output.elements == output.shape[-1] else None
    if few is not None:
        return _largest(few) if answer.has_few_finite(number) else None
    array = to_array(output.name, output.datatype, output.shape, answer.body[at:stop])
    score = float(array.max(axis=-1).mean(dtype=np.float64))
    return score if np.isfinite(score) else None


def _largest(values: tuple[float, ...]) -> float:
    """As `max`, which the compiler makes a slow call of."""
    largest = values[0]
    for value in values:
        largest = value if value > largest else largest
    return largest


def _place(answer: Answer, name: str) -> int:
    """Of the output among all; -1 if there is none."""
    outputs = answer.outputs
    if len(answer.spans) != len(outputs) or (not name and len(outputs) != 1):
        return -1
    for number in range(len(outputs)):
        if not name or name == outputs[number].name:
            return number
    return -1
