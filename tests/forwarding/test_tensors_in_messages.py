"""V2 messages as arrays and back; whatever a caller gets wrong is told in a text that names the tensor."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput, MalformedMessage
from gateway.forwarding.messages import (
    array_of,
    build_request,
    build_response,
    parse_request,
    parse_response,
    read_response,
    tensors_of,
)
from gateway.steps import DATATYPES, WrongAnswer, datatype_of, dtype_of


def typed(datatype: str, shape: list[int], field: str, values: list[Any], name: str = "x") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    getattr(tensor.contents, field).extend(values)
    return tensor


TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [1, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.5, -math.inf]),
    "FP64": ("fp64_contents", [0.1, 1e300]),
    "BYTES": ("bytes_contents", [b"", b"\x00\xff"]),
}


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_are_what_was_sent(datatype: str) -> None:
    field, values = TYPED[datatype]
    array = tensors_of([typed(datatype, [1, 2], field, values)], [])["x"]
    assert array.dtype == dtype_of(datatype)
    assert array.tolist() == [values]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_halves_have_no_typed_contents(datatype: str) -> None:
    with pytest.raises(BadInput, match=f"input 'x': {datatype} has no typed contents; send raw"):
        tensors_of([typed(datatype, [1], "fp32_contents", [1])], [])


OUT_OF_RANGE = {
    "INT8": ("int_contents", [128]),
    "INT16": ("int_contents", [-(2**15) - 1]),
    "UINT8": ("uint_contents", [256]),
    "UINT16": ("uint_contents", [2**16]),
}


@pytest.mark.parametrize("datatype", OUT_OF_RANGE)
def test_a_value_outside_its_datatype_is_refused_and_not_wrapped(datatype: str) -> None:
    field, values = OUT_OF_RANGE[datatype]
    with pytest.raises(BadInput, match=f"input 'x': a value does not fit {datatype}"):
        tensors_of([typed(datatype, [1], field, values)], [])


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("FP16", 70_000.0), ("FP32", 1e39), ("BF16", 1e39), ("UINT64", -1), ("UINT8", -1), ("BOOL", 2), ("INT8", -129)],
)
def test_a_number_of_a_list_outside_its_datatype_is_refused(datatype: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"a value does not fit {datatype}"):
        array_of("x", datatype, [1], [value])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "BF16"])
def test_infinities_and_nan_that_were_sent_stay(datatype: str, value: float) -> None:
    np.testing.assert_array_equal(array_of("x", datatype, [1], [value]), np.array([value], dtype_of(datatype)))


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.sampled_from([d for d in DATATYPES if d.startswith(("INT", "UINT"))]),
)
def test_integers_arrive_exactly_or_not_at_all(values: list[int], datatype: str) -> None:
    limits = np.iinfo(dtype_of(datatype))
    if all(limits.min <= value <= limits.max for value in values):
        assert array_of("x", datatype, [len(values)], values).tolist() == values
    else:
        with pytest.raises(BadInput):
            array_of("x", datatype, [len(values)], values)


SHAPES = {
    "too few": [3],
    "too many": [1],
    "negative": [-2],
    "two negatives": [-1, -2],
    "many axes": [1] * 99 + [2],
    "many other axes": [7] * 99,
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_that_does_not_fit_its_elements_is_refused(shape: list[int]) -> None:
    with pytest.raises(BadInput, match="input 'x': ") as caught:
        tensors_of([typed("FP32", shape, "fp32_contents", [1, 2])], [])
    assert len(str(caught.value)) < 200


@given(st.lists(st.integers(-3, 2**40), max_size=40), st.sampled_from(DATATYPES))
def test_no_shape_ends_in_a_bug(shape: list[int], datatype: str) -> None:
    raw = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape)
    for tensors, contents in (([raw], [b""]), ([typed(datatype, shape, "fp32_contents", [])], [])):
        try:
            arrays = tensors_of(tensors, contents)
        except BadInput:
            continue
        assert arrays["x"].size == 0


def _raw(name: str = "x", **fields: Any) -> Any:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=[1], **fields)


def _in_shared_memory() -> Any:
    tensor = _raw()
    tensor.parameters["shared_memory_region"].string_param = "r"
    return tensor


FOUR = bytes(4)
MISMATCHES = {
    "fewer buffers": ([_raw("x"), _raw("y")], [FOUR], "raw contents are given for 1 tensors, but 2 are declared"),
    "more buffers": ([_raw()], [FOUR, FOUR], "raw contents are given for 2 tensors, but 1 are declared"),
    "twice": ([_raw(), _raw()], [FOUR, FOUR], "input 'x' is given twice"),
    "both kinds": ([typed("FP32", [1], "fp32_contents", [1])], [FOUR], "input 'x' has both raw and typed contents"),
    "neither": ([_raw()], [], r"input 'x': shape \[1\] does not fit 0 elements"),
    "shared memory": ([_in_shared_memory()], [], "input 'x': pipelines take no shared memory"),
    "other list": ([typed("FP32", [1], "int_contents", [1])], [], "does not fit 0 elements"),
    "wrong size": ([_raw()], [bytes(3)], r"input 'x': FP32 \[1\] takes 4 bytes, got 3"),
}


@pytest.mark.parametrize(("tensors", "raw", "text"), MISMATCHES.values(), ids=MISMATCHES)
def test_contents_that_do_not_match_their_declaration_are_refused(tensors: Any, raw: list[bytes], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        tensors_of(tensors, raw)


def test_a_request_is_read_as_it_was_written() -> None:
    tensors = {"a": np.array([[1.5]], np.float32), "b": np.array([b"x", b""], np.object_)}
    parameter = pb.InferParameter(string_param="v")
    message = parse_request(
        build_request("m", tensors, outputs=("o",), version="3", id="7", parameters={"k": parameter})
    )
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "7")
    assert [output.name for output in message.outputs] == ["o"]
    assert message.parameters["k"].string_param == "v"
    read = tensors_of(message.inputs, message.raw_input_contents)
    assert {name: array.tolist() for name, array in read.items()} == {"a": [[1.5]], "b": [b"x", b""]}


def test_a_message_is_written_byte_for_byte_as_protobuf_would() -> None:
    planes = np.arange(2 * 3 * 50_000, dtype=np.float32).reshape(2, 3, 50_000).transpose(0, 2, 1)  # not as in memory
    tensors: dict[str, np.ndarray] = {
        "x": planes,
        "none": np.empty((2, 0), np.int64),
        "text": np.array([b"", b"\xff"], np.object_),
    }
    request = pb.ModelInferRequest(model_name="m", id="7", outputs=[{"name": "y"}])
    response = pb.ModelInferResponse(model_name="m", model_version="1", id="7")
    for (name, array), raw in zip(tensors.items(), (planes.tobytes(), b"", b"\0\0\0\0\1\0\0\0\xff"), strict=True):
        declared = {"name": name, "datatype": datatype_of(array), "shape": array.shape}
        request.inputs.add(**declared)
        response.outputs.add(**declared)
        request.raw_input_contents.append(raw)
        response.raw_output_contents.append(raw)
    assert build_request("m", tensors, outputs=("y",), id="7") == request.SerializeToString()
    answered = {name: (datatype_of(array), array) for name, array in tensors.items()}
    assert build_response("m", "1", "7", answered) == response.SerializeToString()


def test_an_answer_is_read_as_it_was_written() -> None:
    half = np.array([1.5, 3.0], np.float32)
    body = build_response("m", "1", "7", {"h": ("BF16", half), "s": ("BYTES", np.array([b"x"], np.object_))})
    response = pb.ModelInferResponse.FromString(body)
    assert (response.model_name, response.model_version, response.id) == ("m", "1", "7")
    assert response.raw_output_contents[0] == half.astype(ml_dtypes.bfloat16).tobytes()
    read = parse_response(body)
    assert {name: (datatype, array.tolist()) for name, (datatype, array) in read.items()} == {
        "h": ("BF16", [1.5, 3.0]),
        "s": ("BYTES", [b"x"]),
    }


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff"], ids=["tag", "cut off", "not UTF-8"])
def test_bytes_that_are_no_request_are_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        parse_request(body)


def _answer_of_wrong_size() -> bytes:
    response = pb.ModelInferResponse(raw_output_contents=[b"123"])
    response.outputs.add(name="o", datatype="FP32", shape=[1])
    return bytes(response.SerializeToString())


@pytest.mark.parametrize("body", [b"\xff", _answer_of_wrong_size()], ids=["no message", "wrong size"])
async def test_an_upstreams_bad_answer_is_not_called_the_callers_fault(body: bytes) -> None:
    with pytest.raises(WrongAnswer):
        parse_response(body)
    with pytest.raises(WrongAnswer):
        await read_response(body)
