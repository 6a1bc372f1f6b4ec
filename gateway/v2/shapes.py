"""v2 (pure): how many elements a shape has. Peers choose shapes, so sizes are bounded before they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_AXES: Final = 32
"""Most axes of a tensor: numpy 1's limit, far above any model's."""

MAX_SIZE: Final = 2**31 - 1
"""Largest size of an axis."""

_SHOWN: Final = 8  # axes that a text shows


class ImpossibleShape(ValueError):
    """No tensor can have this shape. The text tells what is allowed, and is short whatever the shape is."""


def elements_of(shape: Sequence[int]) -> int:
    """The product of a shape's sizes.

    The product of many large sizes takes time that grows with the square of their number, so no shape that a peer sent
    may be multiplied elsewhere.

    :raises ImpossibleShape: if it has more than MAX_AXES axes, or a size below 0 or above MAX_SIZE.
    """
    if len(shape) > MAX_AXES:
        raise _impossible(shape)
    product = 1
    for size in shape:
        if not 0 <= size <= MAX_SIZE:
            raise _impossible(shape)
        product *= size
    return product


def shown(shape: Sequence[int]) -> str:
    """A shape as text: only its first axes, since a peer may send a million."""
    return str([*shape[:_SHOWN], "…"] if len(shape) > _SHOWN else [*shape])


def _impossible(shape: Sequence[int]) -> ImpossibleShape:
    return ImpossibleShape(
        f"shape {shown(shape)} is not possible: at most {MAX_AXES} axes of 0 to 2^31-1 each",
    )
