"""v2 (pure): the outputs of an answer, and where in it their contents are. Of protobuf it uses the message class alone.

Descriptions of outputs repeat from answer to answer, so they are looked up by their bytes.
Source: grpc_service.proto: ModelInferResponse `outputs` 5, `raw_output_contents` 6, one for each output, which is empty
if the output is in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.bounded import make_room
from gateway.errors import MalformedMessage
from gateway.v2.layout import SIZES
from gateway.v2.peek import RAW_OUTPUT, Head, fields, read_varint
from gateway.v2.raw import few_floats
from gateway.v2.shapes import ImpossibleShape, elements_of

_KEPT: Final = 1024  # descriptions that are remembered; servers choose what they are
_LONGEST: Final = 4096  # bytes of one that is
_SHOWN: Final = 60  # characters of a name that a text shows
_MOST_SHARED: Final = 1 << 16  # bytes of an answer that is kept for whoever looks at it next


@dataclass(frozen=True, slots=True)
class Output:
    """The description of one output of one answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int  # bytes that its contents must have; -1: not known, as for texts and in shared memory
    elements: int  # 0 if the shape is impossible
    fault: str  # what is wrong with the description itself; "" if nothing is
    is_typed: bool = False  # has it contents of its own beside the raw ones, or in their place?


class Answer:
    """An answer, taken apart."""

    __slots__ = ("_are_finite", "_number", "_values", "body", "outputs", "spans")

    def __init__(self, body: bytes, outputs: tuple[Output, ...], spans: list[tuple[int, int]]) -> None:
        """spans: of raw contents."""
        self.body = body
        self.outputs = outputs
        self.spans = spans
        self._number = -1  # of the output that was asked for last …
        self._values: tuple[float, ...] | None = None  # … its numbers, if they are few …
        self._are_finite = False  # … and whether all of them are finite

    def few(self, number: int) -> tuple[float, ...] | None:
        """The numbers of this output, of which there is a span; None if they are many, or no FP32."""
        if self._number != number:
            at, stop = self.spans[number]
            values = self._values = few_floats(self.outputs[number].datatype, self.body, at, stop)
            self._number = number
            if values is not None:
                total = sum(values, 0.0)  # of 64 numbers of 32 bits, which is finite if they are
                self._are_finite = total - total == 0.0
        return self._values

    def has_few_finite(self, number: int) -> bool:
        """Are there few numbers, and all of them finite?"""
        return self.few(number) is not None and self._are_finite


class AnswerReader:
    """Reads answers, and remembers descriptions, and the last answer, which several may look at one after the other."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Output, ...]] = {}
        self._last: Answer | None = None
        self._head: Head | None = None  # of the last answer whose description was known …
        self._outputs: tuple[Output, ...] = ()  # … which is this

    def read(self, body: bytes, head: Head) -> Answer:
        """An answer's outputs and where their contents are. head: its own, or one that it shares.

        :raises MalformedMessage: if they can't be read.
        """
        last = self._last
        if last is not None and last.body is body:
            return last
        answer = self._read(body, head)
        self._last = answer if len(body) <= _MOST_SHARED else None
        return answer

    def _read(self, body: bytes, head: Head) -> Answer:
        spans = _maybe_raw_spans(body, head.raw)
        if spans is None:  # some other serializer's order
            spans = [(at, stop) for tag, _, at, stop in fields(body, 0, len(body)) if tag == RAW_OUTPUT]
            return Answer(body, tuple(map(_output, parsed_answer(body).outputs)), spans)
        if head is not self._head:
            self._outputs = self._described(body[head.front : head.raw])
            self._head = head
        return Answer(body, self._outputs, spans)

    def _described(self, text: bytes) -> tuple[Output, ...]:
        found = self._known.get(text)
        if found is None:
            found = tuple(map(_output, parsed_answer(text).outputs))
            if len(text) <= _LONGEST:
                make_room(self._known, _KEPT)
                self._known[text] = found
        return found


def parsed_answer(text: bytes) -> Any:
    """Any: protobuf classes carry no types. :raises MalformedMessage: if it is no part of an answer."""
    try:
        return pb.ModelInferResponse.FromString(text)
    except Exception as error:  # protobuf's implementations have different DecodeError classes
        raise MalformedMessage("The answer is no valid ModelInferResponse.") from error


def _output(tensor: Any) -> Output:
    shape = tuple(tensor.shape)
    size, elements, fault = -1, 0, ""
    try:
        elements = elements_of(shape)
        width = SIZES.get(tensor.datatype, 0)
        if width and "shared_memory_region" not in tensor.parameters:
            size = elements * width
    except ImpossibleShape as error:
        fault = f"output '{tensor.name[:_SHOWN]}': {error}"
    return Output(tensor.name, tensor.datatype, shape, size, elements, fault, tensor.HasField("contents"))


def _maybe_raw_spans(body: bytes, at: int) -> list[tuple[int, int]] | None:
    """Where each raw content is; None if something else follows the first.

    :raises MalformedMessage: if the bytes are no fields.
    """
    spans: list[tuple[int, int]] = []
    end = len(body)
    while at < end:
        if body[at] != RAW_OUTPUT:
            return None
        begin = at + 2
        if begin > end:
            raise MalformedMessage("The answer is cut off.")
        size = body[at + 1]
        if size > 0x7F:
            try:
                size, begin = read_varint(body, at + 1)
            except IndexError:
                raise MalformedMessage("The answer is cut off.") from None
        at = begin + size
        spans.append((begin, at))
    if at > end:
        raise MalformedMessage("A field of the answer is longer than the answer.")
    return spans
