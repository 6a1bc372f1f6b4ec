"""v2 (pure): what is wrong with an answer whose status is OK. May use numpy; of protobuf, the message class alone.

A number that is NaN or infinite, contents that are not of the size which datatype and shape say, and an output that the
model's metadata does not have so. Descriptions of outputs repeat from answer to answer, so they are looked up by their
bytes; the numbers are looked at where they lie.

Source: grpc_service.proto: ModelInferResponse `outputs` 5, `raw_output_contents` 6, one for each output, which is empty
if the output is in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from gateway.bounded import make_room
from gateway.errors import MalformedMessage
from gateway.v2.layout import SIZES
from gateway.v2.peek import RAW_OUTPUT, Head, fields, read_varint
from gateway.v2.shapes import ImpossibleShape, elements_of, shown

NOT_FINITE: Final = "not_finite"
CONTRACT: Final = "contract"

Declared = Mapping[str, tuple[str, tuple[int, ...]]]
"""Datatype and shape of a model's outputs by name, as its metadata tells them: -1 is any size."""

_KEPT: Final = 1024  # descriptions that are remembered; servers choose what they are
_LONGEST: Final = 4096  # bytes of one that is
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


@dataclass(frozen=True, slots=True)
class Output:
    """The description of one output of one answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int  # bytes that its contents must have; -1: not known, as for texts and in shared memory
    fault: str  # what is wrong with the description itself; "" if nothing is


@dataclass(frozen=True, slots=True)
class Answer:
    """What there is to be looked at."""

    body: bytes
    outputs: tuple[Output, ...]
    spans: Sequence[tuple[int, int]]  # of raw contents


class AnswerReader:
    """Reads answers, and remembers descriptions."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Output, ...]] = {}

    def read(self, body: bytes, head: Head) -> Answer:
        """An answer's outputs and where their contents are. head: its own, or one that it shares.

        :raises MalformedMessage: if they can't be read.
        """
        spans = _maybe_raw_spans(body, head.raw)
        if spans is None:  # some other serializer's order
            spans = [(at, stop) for tag, _, at, stop in fields(body, 0, len(body)) if tag == RAW_OUTPUT]
            return Answer(body, tuple(map(_output, _parsed(body).outputs)), spans)
        text = body[head.front : head.raw]
        found = self._known.get(text)
        if found is None:
            found = tuple(map(_output, _parsed(text).outputs))
            if len(text) <= _LONGEST:
                make_room(self._known, _KEPT)
                self._known[text] = found
        return Answer(body, found, spans)


def maybe_not_finite(answer: Answer) -> Fault | None:
    """The first output that has NaN or infinity among its numbers, or contents that do not fit its description."""
    outputs, spans, body = answer.outputs, answer.spans, answer.body
    if not spans:
        return _typed_not_finite(answer)
    if len(spans) != len(outputs):
        return Fault(CONTRACT, f"it has {len(spans)} raw contents for {len(outputs)} outputs")
    for output, (at, stop) in zip(outputs, spans, strict=True):
        if output.fault:
            return Fault(CONTRACT, output.fault)
        if output.size >= 0 and stop - at != output.size:
            what = f"{output.datatype} {shown(output.shape)} takes {output.size} bytes, and it has {stop - at}"
            return Fault(CONTRACT, f"output '{output.name[:_SHOWN]}': {what}")
        if stop > at and _has_non_finite(output.datatype, body, at, stop):
            return _not_finite(output)
    return None


def _typed_not_finite(answer: Answer) -> Fault | None:
    """As `maybe_not_finite`, of an answer without raw contents: some servers other than Triton send such."""
    if any(output.datatype in _TYPED for output in answer.outputs):
        for output, tensor in zip(answer.outputs, _parsed(answer.body).outputs, strict=True):
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


def _parsed(text: bytes) -> Any:
    """Any: protobuf classes carry no types. :raises MalformedMessage: if it is no part of an answer."""
    try:
        return pb.ModelInferResponse.FromString(text)
    except Exception as error:  # protobuf's implementations have different DecodeError classes
        raise MalformedMessage("The answer is no valid ModelInferResponse.") from error


def _output(tensor: Any) -> Output:
    shape = tuple(tensor.shape)
    size, fault = -1, ""
    try:
        elements = elements_of(shape)
        width = SIZES.get(tensor.datatype, 0)
        if width and "shared_memory_region" not in tensor.parameters:
            size = elements * width
    except ImpossibleShape as error:
        fault = f"output '{tensor.name[:_SHOWN]}': {error}"
    return Output(tensor.name, tensor.datatype, shape, size, fault)


def _maybe_raw_spans(body: bytes, at: int) -> list[tuple[int, int]] | None:
    """Where each raw content is; None if something else follows the first.

    :raises MalformedMessage: if the bytes are no fields.
    """
    spans: list[tuple[int, int]] = []
    end = len(body)
    while at < end:
        if body[at] != RAW_OUTPUT:
            return None
        try:
            size, begin = read_varint(body, at + 1)
        except IndexError:
            raise MalformedMessage("The answer is cut off.") from None
        at = begin + size
        spans.append((begin, at))
    if at > end:
        raise MalformedMessage("A field of the answer is longer than the answer.")
    return spans


def _has_non_finite(datatype: str, body: bytes, at: int, stop: int) -> bool:
    exponent = _EXPONENTS.get(datatype)
    if exponent is not None:
        bits = np.frombuffer(body, "<u2", (stop - at) // 2, at)
        return bool(((bits & exponent) == exponent).any())
    kind = _FLOATS.get(datatype)
    if kind is None:
        return False
    name, width = kind
    return not np.isfinite(np.frombuffer(body, name, (stop - at) // width, at)).all()
