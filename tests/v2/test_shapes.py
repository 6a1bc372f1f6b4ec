"""A shape that a peer sends costs the same whatever is in it: nobody multiplies more than a few small numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput
from gateway.forwarding.messages import array_of, build_response, parse_response
from gateway.steps import WrongAnswer, to_array
from gateway.telemetry.capture import redact
from gateway.v2.layout import Layouts
from gateway.v2.peek import peek_request
from gateway.v2.shapes import MAX_AXES, MAX_SIZE, ImpossibleShape, elements_of


class Watched(Sequence[int]):
    """A shape that counts how many of its sizes were looked at."""

    def __init__(self, axes: int, size: int) -> None:
        self.axes, self.size, self.looked_at = axes, size, 0

    def __len__(self) -> int:
        return self.axes

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...
    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(self.axes))]
        if at >= self.axes:
            raise IndexError
        self.looked_at += 1
        return self.size


@given(st.lists(st.integers(0, MAX_SIZE), max_size=MAX_AXES))
def test_the_elements_are_the_product_of_the_sizes(shape: list[int]) -> None:
    assert elements_of(shape) == math.prod(shape)


@pytest.mark.parametrize("shape", [[1] * (MAX_AXES + 1), [-1], [2, -2, -1], [MAX_SIZE + 1], [0, 2**62]])
def test_impossible_shapes_are_refused(shape: list[int]) -> None:
    with pytest.raises(ImpossibleShape, match="is not possible: at most 32 axes of 0 to"):
        elements_of(shape)


REFUSING: dict[str, Callable[[Sequence[int]], Any]] = {
    "raw": lambda shape: to_array("x", "BYTES", shape, b""),
    "typed": lambda shape: array_of("x", "FP32", shape, [1.0]),
}


@pytest.mark.parametrize("use", REFUSING.values(), ids=REFUSING)
@pytest.mark.parametrize("axes", [MAX_AXES + 1, 1000, 100_000])
def test_a_shape_of_many_axes_is_refused_by_their_number(use: Callable[[Sequence[int]], Any], axes: int) -> None:
    shape = Watched(axes, 2**62)
    with pytest.raises(BadInput, match="is not possible: at most 32 axes") as refused:
        use(shape)
    assert shape.looked_at <= MAX_AXES
    assert len(refused.value.text) < 400


@pytest.mark.parametrize("shape", [[1] * 1000, [2**62] * 1000, [2**62], [2**40, 0]])
def test_an_answer_of_such_a_shape_is_the_models_fault(shape: list[int]) -> None:
    answer = pb.ModelInferResponse.FromString(build_response("m", "1", "", {}))
    answer.outputs.add(name="y", datatype="FP32", shape=shape).contents.fp32_contents.append(1.0)
    with pytest.raises(WrongAnswer, match="is not possible"):
        parse_response(answer.SerializeToString())


@pytest.mark.parametrize("shape", [[1] * 1000, [1, *[2**62] * 1000], [1, 2**31]])
def test_a_request_of_such_a_shape_is_not_merged(shape: list[int]) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="UINT8", shape=shape)
    request.raw_input_contents.append(b"\1")
    body = request.SerializeToString()
    assert Layouts(pb.ModelInferRequest).maybe_read(body, peek_request(body)) is None


class Parsed:
    """Stands for the class of a request's message; notes how many bytes it is given to parse."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def FromString(self, text: bytes) -> Any:
        self.sizes.append(len(text))
        return pb.ModelInferRequest.FromString(text)


@pytest.mark.parametrize(("padding", "is_read"), [(3000, True), (5000, False)])
def test_what_could_not_be_remembered_of_a_request_is_not_parsed(padding: int, is_read: bool) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x" * padding, datatype="UINT8", shape=[1, 1])
    request.raw_input_contents.append(b"\1")
    body = request.SerializeToString()
    layouts, parsed = Layouts(pb.ModelInferRequest), Parsed()
    layouts._message = parsed  # type: ignore[assignment]
    for _ in range(3):
        assert (layouts.maybe_read(body, peek_request(body)) is not None) is is_read
    assert len(parsed.sizes) == is_read, "read once and known, or never"


@pytest.mark.parametrize("shape", [[2**62] * 1000, [-1], [2**62]])
def test_texts_of_such_a_shape_are_redacted_to_what_came(shape: list[int]) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="BYTES", shape=shape)
    request.raw_input_contents.append(b"\1\0\0\0a")
    assert redact(request, ["x"]) == ["x"]
    assert list(request.raw_input_contents) == [bytes(4)]
