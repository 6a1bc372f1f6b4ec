"""Do two small answers agree, as can be seen at a glance? Pure, and quick enough for the event loop.

Of small answers all that `compare` needs to begin costs many times what there is to compare: protobuf messages, arrays,
and a thread that is woken for it. What is said here is what `compare` would say; most copies agree.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

from gateway.errors import GatewayError
from gateway.experiments.compare import Agreement, Classification, Comparison, Tensors
from gateway.forwarding.shadowing.comparison import Compared
from gateway.v2.faults import has_non_finite
from gateway.v2.outputs import Answer, AnswerReader
from gateway.v2.peek import RAW_OUTPUT, KnownHeads, peek_response

_MOST: Final = 1 << 14  # bytes of an answer
_OUTPUTS: Final = 8  # of an answer
_FLOATS: Final = ("FP16", "BF16", "FP32", "FP64")


class Glance:
    """Remembers how the answers of models are laid out."""

    def __init__(self) -> None:
        self._heads = KnownHeads(peek_response, RAW_OUTPUT)
        self._reader = AnswerReader()

    def maybe_compare(self, answer: bytes, copy: bytes, comparison: Comparison) -> Compared | None:
        """What became of a pair of which the two agree, and have neither NaN nor infinity; None: look closer."""
        if len(answer) > _MOST or len(copy) > _MOST:
            return None
        if type(comparison) is not Tensors and type(comparison) is not Classification:  # a subclass may do otherwise
            return None
        try:
            reference = self._reader.read(answer, self._heads.peek(answer))
            candidate = self._reader.read(copy, self._heads.peek(copy))
        except GatewayError:
            return None
        alike = reference.outputs is candidate.outputs or reference.outputs == candidate.outputs
        if not alike or not _is_plain(reference) or not _is_plain(candidate):
            return None
        if isinstance(comparison, Classification):
            agreement = _of_classes(reference, candidate, comparison)
        else:
            assert isinstance(comparison, Tensors)  # noqa: S101  (one of the two)
            agreement = _of_tensors(reference, candidate, comparison)
        return None if agreement is None else Compared(agreement, "")


def _is_plain(answer: Answer) -> bool:
    """Has it a few outputs, which are there, of fixed size, and which nobody could refuse to read?"""
    outputs, spans = answer.outputs, answer.spans
    if not outputs or len(outputs) > _OUTPUTS or len(outputs) != len(spans):
        return False
    names: set[str] = set()
    for number in range(len(outputs)):
        output = outputs[number]
        at, stop = spans[number]
        if output.is_typed or output.elements == 0 or output.size != stop - at:
            return False
        names.add(output.name)
    return len(names) == len(outputs)


def _of_classes(reference: Answer, candidate: Answer, comparison: Classification) -> Agreement | None:
    """Scores that are the same have the same classes."""
    outputs = reference.outputs
    names = [output.name for output in outputs]
    if comparison.output not in names and (comparison.output or len(names) > 1):
        return None
    scores = outputs[names.index(comparison.output)] if comparison.output else outputs[0]
    if scores.datatype not in _FLOATS or not scores.shape or comparison.score < 0.0:
        return None
    for number in range(len(outputs)):
        if not _are_equal(reference, candidate, number) or has_non_finite(reference, number):
            return None
    return Agreement(True, {"top1": 1.0, "topk": 1.0, "score": 0.0})


def _of_tensors(reference: Answer, candidate: Answer, comparison: Tensors) -> Agreement | None:
    worst = Worst()
    for number in range(len(reference.outputs)):
        if _are_equal(reference, candidate, number):
            if has_non_finite(reference, number):
                return None
            continue
        if not reference.has_few_finite(number) or not candidate.has_few_finite(number):
            return None
        a, b = reference.few(number), candidate.few(number)
        if a is None or b is None or not worst.add(a, b, comparison):
            return None
    if worst.cosine < comparison.cosine:
        return None
    return Agreement(True, {"absolute": worst.absolute, "relative": worst.relative, "cosine": worst.cosine})


def _are_equal(reference: Answer, candidate: Answer, number: int) -> bool:
    at, stop = reference.spans[number]
    begin, end = candidate.spans[number]
    return reference.body[at:stop] == candidate.body[begin:end]


class Worst:
    """The measures of `Tensors`, of finite numbers."""

    __slots__ = ("absolute", "cosine", "relative")

    def __init__(self) -> None:
        self.absolute = 0.0
        self.relative = 0.0
        self.cosine = 1.0

    def add(self, values: tuple[float, ...], others: tuple[float, ...], comparison: Tensors) -> bool:
        """False: two of them are too far apart."""
        absolute, relative = comparison.absolute, comparison.relative
        both = own = other = 0.0
        for at in range(len(values)):
            x, y = values[at], others[at]
            apart, size = abs(x - y), abs(x)
            if apart > absolute + relative * size:
                return False
            self.absolute = max(self.absolute, apart)
            if size > 0.0:
                self.relative = max(self.relative, apart / size)
            both, own, other = both + x * y, own + x * x, other + y * y
        if both == own == other:  # as they are equal; rounding would make it a little less than 1
            return True
        length = sqrt(own) * sqrt(other)
        self.cosine = min(self.cosine, both / length if length > 0.0 else 0.0)
        return True
