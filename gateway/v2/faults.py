"""v2 (pure): what is wrong with an answer whose status is OK. May use numpy.

A number that is NaN or infinite, contents that are not of the size which datatype and shape say, and an output that the
model's metadata does not have so. The numbers are looked at where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gateway.v2.outputs import Answer, Output, parsed_answer
from gateway.v2.shapes import shown

NOT_FINITE: Final = "not_finite"
CONTRACT: Final = "contract"

Declared = Mapping[str, tuple[str, tuple[int, ...]]]
"""Datatype and shape of a model's outputs by name, as its metadata tells them: -1 is any size."""

_SHOWN: Final = 60  # characters of a name that a text shows
_CLASSIFICATION: Final = b"classification"
"""A parameter of a requested output (the classification extension), by which the answer has texts for it."""

_EXPONENTS: Final = {"FP16": 0x7C00, "BF16": 0x7F80}  # all bits of the exponent: NaN or infinity
_FLOATS: Final = {"FP32": ("<f4", 4), "FP64": ("<f8", 8)}  # numpy's name, and bytes
_TYPED: Final = {"FP32": "fp32_contents", "FP64": "fp64_contents"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an answer."""

    kind: str  # NOT_FINITE or CONTRACT
    text: str


def maybe_not_finite(answer: Answer) -> Fault | None:
    """The first output that has NaN or infinity among its numbers, or contents that do not fit its description."""
    outputs, spans = answer.outputs, answer.spans
    if not spans:
        return _typed_not_finite(answer)
    if len(spans) != len(outputs):
        return Fault(CONTRACT, f"it has {len(spans)} raw contents for {len(outputs)} outputs")
    for number in range(len(spans)):  # rather than `zip`, which costs small answers more than the rest of this
        output = outputs[number]
        at, stop = spans[number]
        if output.fault:
            return Fault(CONTRACT, output.fault)
        if output.size >= 0 and stop - at != output.size:
            what = f"{output.datatype} {shown(output.shape)} takes {output.size} bytes, and it has {stop - at}"
            return Fault(CONTRACT, f"output '{output.name[:_SHOWN]}': {what}")
        if stop > at and has_non_finite(answer, number):
            return _not_finite(output)
    return None


def _typed_not_finite(answer: Answer) -> Fault | None:
    """As `maybe_not_finite`, of an answer without raw contents: some servers other than Triton send such."""
    if any(output.datatype in _TYPED for output in answer.outputs):
        for output, tensor in zip(answer.outputs, parsed_answer(answer.body).outputs, strict=True):
            field = _TYPED.get(output.datatype)
            if field is not None and not np.isfinite(np.array(getattr(tensor.contents, field), np.float64)).all():
                return _not_finite(output)
    return None


def maybe_misfit(outputs: Sequence[Output], declared: Declared, asked: bytes) -> Fault | None:
    """The first output that the model's metadata does not have so.

    asked: the request without its raw tensors, in which its caller may have asked for classes in place of numbers.
    """
    for output in outputs:
        found, name = declared.get(output.name), output.name[:_SHOWN]
        if found is None:
            known = ", ".join(declared) or "none"
            return Fault(CONTRACT, f"output '{name}' is not in the model's metadata; there: {known[:200]}")
        datatype, shape = found
        if output.datatype == "BYTES" and datatype != "BYTES" and _CLASSIFICATION in asked:
            continue
        if output.datatype != datatype:
            what = output.datatype[:_SHOWN]
            return Fault(CONTRACT, f"output '{name}' is {what}, and {datatype} in the model's metadata")
        if len(output.shape) != len(shape) or any(
            size not in (-1, dim) for dim, size in zip(output.shape, shape, strict=True)
        ):
            wrong = f"has shape {shown(output.shape)}, and {shown(shape)} in the model's metadata"
            return Fault(CONTRACT, f"output '{name}' {wrong}")
    return None


def _not_finite(output: Output) -> Fault:
    return Fault(NOT_FINITE, f"output '{output.name[:_SHOWN]}' has NaN or infinity")


def has_non_finite(answer: Answer, number: int) -> bool:
    """Has this output, whose contents are as long as its description says, NaN or infinity among its numbers?"""
    if answer.few(number) is not None:
        return not answer.has_few_finite(number)
    datatype, body = answer.outputs[number].datatype, answer.body
    at, stop = answer.spans[number]
    exponent = _EXPONENTS.get(datatype)
    if exponent is not None:
        bits = np.frombuffer(body, "<u2", (stop - at) // 2, at)
        return bool(((bits & exponent) == exponent).any())
    kind = _FLOATS.get(datatype)
    if kind is None:
        return False
    name, width = kind
    return not np.isfinite(np.frombuffer(body, name, (stop - at) // width, at)).all()
