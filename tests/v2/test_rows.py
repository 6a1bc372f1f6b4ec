"""The rows of a request, read from the shape of its first input."""

from __future__ import annotations

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.v2.peek import RAW_INPUT, KnownHeads, peek_front, peek_request
from gateway.v2.rows import clamped, rows_of


def request(*shape: int, raw: bool = True) -> bytes:
    message = pb.ModelInferRequest(model_name="net")
    message.parameters["a"].int64_param = 300
    tensor = message.inputs.add(name="IN", datatype="FP32", shape=shape)
    tensor.parameters["p"].string_param = "x" * 200
    message.inputs.add(name="B", datatype="FP32", shape=[77])
    if raw:
        message.raw_input_contents.append(b"1234" * 8)
    else:
        tensor.contents.fp32_contents.extend([1.0] * 8)
    return message.SerializeToString()


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("shape", "rows"), [((8, 1), 8), ((300,), 300), ((), 1), ((0, 4), 1), ((-1, 4), 1)])
def test_the_first_dimension_of_the_first_input(shape: tuple[int, ...], rows: int, raw: bool) -> None:
    body = request(*shape, raw=raw)
    assert rows_of(body, peek_request(body)) == rows


def test_it_is_read_once_for_requests_that_are_alike() -> None:
    heads, body = KnownHeads(peek_request, RAW_INPUT), request(8, 1)
    head = heads.peek(body)
    assert rows_of(body, head) == 8
    assert rows_of(b"", heads.peek(body)) == 8


def test_what_cannot_be_read_is_one_row() -> None:
    body = request(8, 1)
    head = peek_request(body)
    for end in range(len(body)):
        assert rows_of(body[:end], head) in (1, 8)
    assert rows_of(b"\xff" * 40, head) == 1


def test_the_front_of_a_large_request_is_enough() -> None:
    message = pb.ModelInferRequest(model_name="net")
    message.inputs.add(name="IN", datatype="FP32", shape=[5, 4])
    message.raw_input_contents.append(bytes(100_000))
    front = message.SerializeToString()[:1000]
    head = peek_front(front)
    assert head is not None
    assert rows_of(front, head) == 5


@pytest.mark.parametrize("before", [b"\x22\x00" * 100, b"\xa8\x06\x01", b"\xab\x06\xa8\x06\x01\xac\x06"])
def test_what_is_before_the_first_input_hides_no_rows(before: bytes) -> None:
    """A hundred parameters, an unknown number, an unknown group."""
    body = before + request(8, 1)
    pb.ModelInferRequest.FromString(body)
    assert rows_of(body, peek_request(body)) == 8


def test_what_is_before_a_shape_hides_no_rows() -> None:
    shape = b"\x1a\x00" + b"\x1a\x01\x08" + b"\x18\x09"  # nothing, eight and nine
    tensor = b"\x22\x00" * 100 + shape
    body = b"\x0a\x03net\x2a\xcf\x01" + tensor
    assert list(pb.ModelInferRequest.FromString(body).inputs[0].shape) == [8, 9]
    assert rows_of(body, peek_request(body)) == 8


def test_no_more_rows_are_believed_than_a_request_can_have() -> None:
    body = request(8, 1)
    assert clamped(8, body, len(body), may_share_memory=False) == 8
    assert clamped(1 << 30, body, 500, may_share_memory=True) == 500
    shared = body + b"shared_memory_region"
    assert clamped(1000, shared, 500, may_share_memory=True) == 1000
    assert clamped(1 << 30, shared, 500, may_share_memory=True) == 65_536
    assert clamped(1000, shared, 500, may_share_memory=False) == 500
