"""Compares two answers to one request. Runs on a thread: tensors are parsed here. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.experiments.compare import Agreement, CannotCompare, Comparison, Outputs, non_finite
from gateway.forwarding.messages import parse_response
from gateway.steps import WrongAnswer

_MOST_TEXT = 300  # characters of what a user's comparison throws


@dataclass(frozen=True, slots=True)
class Pair:
    """A request and its two answers, as Triton's bytes."""

    model: str  # public name
    variant: str  # that answered the caller
    shadow: str  # the variant that got the copy
    request_id: str
    request: bytes
    answer: bytes
    copy: bytes  # the shadow's answer


@dataclass(frozen=True, slots=True)
class Compared:
    """What became of a pair. `agreement` is None if it could not be compared; then `why` says why."""

    agreement: Agreement | None
    why: str
    wrong: Sequence[str] = ()  # outputs of the shadow with NaN or infinity
    wrong_here: Sequence[str] = ()  # outputs of the caller's answer with them


def compare(pair: Pair, comparison: Comparison) -> Compared:
    """Compare the two answers. Whatever a user's comparison throws is told in `why`."""
    try:
        reference, candidate = _outputs(pair.answer), _outputs(pair.copy)
    except WrongAnswer as error:
        return Compared(None, str(error))
    wrong, wrong_here = non_finite(candidate), non_finite(reference)
    try:
        agreement = comparison(reference, candidate)
    except CannotCompare as error:
        return Compared(None, str(error), wrong, wrong_here)
    except BaseException as error:  # a user's code may raise anything, `SystemExit` too
        text = f"the comparison failed: {type(error).__name__}: {error}"
        return Compared(None, text[:_MOST_TEXT], wrong, wrong_here)
    return Compared(agreement, agreement.why, wrong, wrong_here)


def _outputs(answer: bytes) -> Outputs:
    return {name: array for name, (_, array) in parse_response(answer).items()}
