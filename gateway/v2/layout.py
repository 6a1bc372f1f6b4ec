"""Layouts: all that is around the raw tensors in a V2 message, parsed once and then looked up by its bytes.

The bytes between a message's name and its raw contents (parameters, tensors' names and shapes, requested outputs)
repeat from one caller, and differ between callers often only in the number of rows. So they are looked up; protobuf
parses only unknown ones. Requests and answers are treated alike.

Source: grpc_service.proto: ModelInferRequest `inputs` 5, `outputs` 6, `raw_input_contents` 7; ModelInferResponse
`outputs` 5, `raw_output_contents` 6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.v2.peek import RAW_INPUT, RAW_OUTPUT, Head, fields, read_varint
from gateway.v2.shapes import ImpossibleShape, elements_of

SIZES: Final = {
    "BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "BF16": 2, "INT32": 4, "UINT32": 4, "FP32": 4,
    "INT64": 8, "UINT64": 8, "FP64": 8, "BYTES": 0,
}  # fmt: skip

_LONGEST: Final = 4096  # bytes of a layout that is remembered, and of a request's that is read
_KEPT: Final = 1024
_LENGTHS: Final = 8  # lengths of known layouts that are tried before a message is parsed
_MOST_STRINGS: Final = 4096  # of one request's BYTES tensors: each is looked at on the event loop

_HARMLESS: Final = frozenset({"triton_enable_empty_final_response"})  # NVIDIA's C++ client sends it with every request
_FINAL: Final = "triton_final_response"  # an answer is its request's only one, so this holds for each part of it
_RESERVED: Final = ("sequence_", "priority", "timeout", "triton_", "headers", "binary_data_output")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of one message."""

    name: str
    element: int  # bytes of one element; 0 for BYTES, whose elements carry their own length
    row_elements: int  # elements in one row
    dims: tuple[int, ...] = ()  # shape of one row


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """All that is around the raw tensors of a message, apart from its name, version and id."""

    signature: bytes  # equal for messages that differ only in their number of rows
    rows: int
    parts: tuple[Part, ...]
    tag: int  # RAW_INPUT or RAW_OUTPUT
    _message: Any = field(repr=False)  # Any, a protobuf message: without scalars and raw contents
    _encoded: dict[int, bytes] = field(default_factory=dict, repr=False)  # by number of rows

    def encoded(self, rows: int) -> bytes:
        """The layout's bytes for another number of rows."""
        found = self._encoded.get(rows)
        if found is None:
            message = type(self._message)()
            message.CopyFrom(self._message)
            for tensor in _tensors(message):
                tensor.shape[0] = rows
            found = message.SerializeToString()
            if len(self._encoded) < _KEPT:
                self._encoded[rows] = found
        return found


_NO_LAYOUT: Final = Layout(b"", 0, (), 0, None)
"""Says of a shared head that its messages can't be merged."""


class Layouts:
    """Layouts seen lately, either of requests or of answers."""

    def __init__(self, message: type[Any]) -> None:
        """message: pb.ModelInferRequest or pb.ModelInferResponse (Any: protobuf classes carry no types)."""
        self._message = message
        self._is_request = message is pb.ModelInferRequest
        self._tag = RAW_INPUT if self._is_request else RAW_OUTPUT
        self._known: OrderedDict[bytes, Layout | None] = OrderedDict()
        self._lengths: list[int] = []  # lengths of the known layouts, the latest first

    def maybe_read(self, body: bytes, head: Head) -> tuple[Layout, list[tuple[int, int]]] | None:
        """A message's layout and where each raw content is; None if it can't be merged or taken apart.

        None is the answer for typed or missing contents, shared memory, contents that do not fit their shape, very many
        strings in a request, a parameter with a meaning of its own, no batch axis, and unknown fields. In an answer no
        parameter can be taken apart, as it is about the whole batch. Such a request is sent by itself, and Triton says
        what is wrong with it.
        """
        if head.strays:
            return None
        if head.fronts is not None:  # then messages with this head are equal up to their raw contents
            layout = head.derived
            if layout is None:
                layout = head.derived = self._known_layout(body[head.front : head.raw]) or _NO_LAYOUT
            spans = _raw_spans(layout, body, head.raw) if layout is not _NO_LAYOUT else None
            return (layout, spans) if spans is not None else None
        at = head.front
        for length in self._lengths:
            layout = self._known.get(body[at : at + length])
            if layout is not None:
                spans = _raw_spans(layout, body, at + length)
                if spans is not None:
                    return layout, spans
        return self._parse(body, at)

    def maybe_read_apart(
        self, text: bytes, memory: memoryview, spans: list[tuple[int, int]]
    ) -> tuple[Layout, list[tuple[int, int]]] | None:
        """As `maybe_read`, of a message whose raw contents are elsewhere, and that has nothing behind them.

        text: all of it that is between names and raw contents. spans: where these begin and end in the memory.
        """
        layout = self._known_layout(text)
        if layout is None or len(spans) != len(layout.parts):
            return None
        for part, (at, stop) in zip(layout.parts, spans, strict=True):
            elements = layout.rows * part.row_elements
            if stop - at != elements * part.element if part.element else not _holds(memory, at, stop, elements):
                return None
        return layout, spans

    def _parse(self, body: bytes, at: int) -> tuple[Layout, list[tuple[int, int]]] | None:
        try:
            end = next((begin for tag, begin, _, _ in fields(body, at, len(body)) if tag == self._tag), len(body))
        except MalformedMessage:
            return None
        layout = self._known_layout(body[at:end])
        spans = _raw_spans(layout, body, end) if layout is not None else None
        return (layout, spans) if layout is not None and spans is not None else None

    def _known_layout(self, text: bytes) -> Layout | None:
        if self._is_request and len(text) > _LONGEST:
            return None  # it would not be remembered, and so be parsed on the event loop with every request
        if text in self._known:
            return self._known[text]
        layout = self._maybe_layout(text)
        self._keep(text, layout)
        return layout

    def _keep(self, text: bytes, layout: Layout | None) -> None:
        if len(text) > _LONGEST:
            return
        self._known[text] = layout
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        if layout is not None and len(text) not in self._lengths:
            self._lengths = [len(text), *self._lengths[: _LENGTHS - 1]]

    def _maybe_layout(self, text: bytes) -> Layout | None:
        try:
            message = self._message.FromString(text)
        except Exception:  # protobuf's implementations have different DecodeError classes
            return None
        if not (_is_mergeable(message) if self._is_request else _is_divisible(message)) or _has_unknown(message):
            return None
        tensors = _tensors(message)
        rows = {tensor.shape[0] if tensor.shape else 0 for tensor in tensors}
        if len(rows) != 1 or min(rows) < 1:
            return None
        parts: list[Part] = []
        for tensor in tensors:
            part = _maybe_part(tensor)
            if part is None:
                return None
            parts.append(part)
        count = rows.pop()
        strings = sum([count * part.row_elements for part in parts if not part.element])
        if self._is_request and strings > _MOST_STRINGS:
            return None
        return Layout(_signature(message), count, tuple(parts), self._tag, message)


def _maybe_part(tensor: Any) -> Part | None:
    if tensor.datatype not in SIZES or tensor.HasField("contents"):
        return None
    if any(key.startswith("shared_memory") for key in tensor.parameters):
        return None
    try:
        elements_of(tensor.shape)
    except ImpossibleShape:
        return None
    dims = tuple(tensor.shape[1:])
    return Part(tensor.name, SIZES[tensor.datatype], elements_of(dims), dims)


def _tensors(message: Any) -> Sequence[Any]:
    return message.inputs if isinstance(message, pb.ModelInferRequest) else message.outputs  # type: ignore[no-any-return]


def _signature(message: Any) -> bytes:
    copy = type(message)()
    copy.CopyFrom(message)
    for tensor in _tensors(copy):
        tensor.shape[0] = 0
    return bytes(copy.SerializeToString(deterministic=True))


def _is_mergeable(message: Any) -> bool:
    if any(key.startswith(_RESERVED) and key not in _HARMLESS for key in message.parameters):
        return False
    return not any(key.startswith("shared_memory") for output in message.outputs for key in output.parameters)


def _is_divisible(answer: Any) -> bool:
    """Has the answer no parameters? They are about the whole batch, so no part can be given them."""
    return not any(
        key != _FINAL or value.WhichOneof("parameter_choice") != "bool_param" or not value.bool_param
        for key, value in answer.parameters.items()
    ) and not any(output.parameters for output in answer.outputs)


def _has_unknown(message: Any) -> bool:
    """Has the message, on any level, a field that is not known here?"""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.DiscardUnknownFields()
    return bool(copy.ByteSize() != message.ByteSize())


def _raw_spans(layout: Layout, body: bytes, at: int) -> list[tuple[int, int]] | None:
    """Where each raw content begins and ends; None if one is missing or of a wrong size, or a field follows them."""
    spans = []
    end = len(body)
    rows, tag = layout.rows, layout.tag
    try:
        for part in layout.parts:
            if body[at] != tag:
                return None
            size = body[at + 1]
            at += 2
            if size > 0x7F:
                size, at = read_varint(body, at - 1)
            stop = at + size
            elements = rows * part.row_elements
            if stop > end or (
                size != elements * part.element if part.element else not _holds(body, at, stop, elements)
            ):
                return None
            spans.append((at, stop))
            at = stop
    except (IndexError, MalformedMessage):
        return None
    return spans if at == end else None


def _holds(body: bytes | memoryview, at: int, stop: int, elements: int) -> bool:
    """Are the bytes exactly this many BYTES elements?"""
    for _ in range(elements):
        at += 4 + int.from_bytes(body[at : at + 4], "little")
        if at > stop:
            return False
    return at == stop


def split_rows(part: Part, body: bytes, span: tuple[int, int], rows: Sequence[int]) -> list[bytes]:
    """Cut one raw content into parts of so many rows each. The content fits the layout, so it has the sum of them."""
    at, _ = span
    pieces = []
    for count in rows:
        begin = at
        if part.element:
            at += count * part.row_elements * part.element
        else:
            for _ in range(count * part.row_elements):
                at += 4 + int.from_bytes(body[at : at + 4], "little")
        pieces.append(body[begin:at])
    return pieces
