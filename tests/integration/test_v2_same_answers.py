"""What a request gets through the gateway is what Triton itself answers to it, byte for byte.

Invariant: for every ModelInferRequest, sent under the model's own name, status, text and body are Triton's; sent under
a public name, they differ in the model's name alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_fixture import DTYPES
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor
from v2_calls import call, channel_to, infer, public_name, set_parameters

from gateway.app import Gateway
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

TYPED = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
FLOATS = {"FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_}


@dataclass(frozen=True)
class Ways:
    """The three ways to the same models."""

    triton: grpc.aio.Channel
    gateway: grpc.aio.Channel
    bare: grpc.aio.Channel


@pytest.fixture(scope="module")
async def ways(triton: LocalTriton, gateway: Gateway, bare: Gateway) -> AsyncIterator[Ways]:
    async with (
        channel_to(triton.grpc_address) as direct,
        channel_to(gateway.listen) as through,
        channel_to(bare.listen) as plain,
    ):
        yield Ways(direct, through, plain)


def item_size(dtype: str) -> int:
    return np.dtype(FLOATS.get(dtype) or dtype.lower()).itemsize


values_by_dtype = {
    "BYTES": st.binary(max_size=20),
    "BOOL": st.booleans(),
    "FP32": st.floats(width=32),
    "FP64": st.floats(),
    **{
        dtype: st.integers(np.iinfo(dtype.lower()).min, np.iinfo(dtype.lower()).max)
        for dtype in DTYPES
        if "INT" in dtype
    },
}

text = st.text(max_size=40)
parameter_values = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), text)
free_parameters = st.dictionaries(text.filter(lambda key: not key.startswith("triton_")), parameter_values, max_size=4)
known_parameters = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 3),
        "timeout": st.integers(0, 10**9),
        "triton_enable_empty_final_response": st.booleans(),
        "binary_data_output": st.booleans(),
    },
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A request to an identity model, right in most cases: its dtype, and the message."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(0, 6))
    request = pb.ModelInferRequest(id=draw(text), model_version=draw(st.sampled_from(["", "", "1", "9", "abc"])))
    tensor = request.inputs.add(name="IN", datatype=dtype, shape=[rows, columns])
    if dtype in TYPED and draw(st.booleans()):
        items = draw(st.lists(values_by_dtype[dtype], min_size=rows * columns, max_size=rows * columns))
        getattr(tensor.contents, TYPED[dtype]).extend(items)
    elif dtype == "BYTES":
        items = draw(st.lists(st.binary(max_size=20), min_size=rows * columns, max_size=rows * columns))
        request.raw_input_contents.append(b"".join(len(item).to_bytes(4, "little") + item for item in items))
    else:
        size = rows * columns * item_size(dtype)
        raw = draw(st.binary(min_size=size, max_size=size))
        request.raw_input_contents.append(bytes(b & 1 for b in raw) if dtype == "BOOL" else raw)
    set_parameters(request, draw(free_parameters) | draw(known_parameters))
    if draw(st.booleans()):
        request.outputs.add(name="OUT")
    unknown = draw(st.sampled_from([b"", b"\xf8\x07\x05", b"\xfa\x07\x03abc"]))  # field 127: a number, a text
    return dtype, request.SerializeToString() + unknown


def renamed(body: bytes, model: str) -> bytes:
    request = pb.ModelInferRequest.FromString(body)
    request.model_name = model
    return bytes(request.SerializeToString())


@settings(max_examples=250, deadline=None)
@given(requests())
async def test_any_request_gets_tritons_own_answer(ways: Ways, request_: tuple[str, bytes]) -> None:
    dtype, body = request_
    own, public = f"identity_{dtype.lower()}", public_name(dtype)
    direct = await call(ways.triton, renamed(body, own))
    for channel in (ways.gateway, ways.bare):
        through = await call(channel, renamed(body, own))
        assert (through.code, through.text, through.body) == (direct.code, direct.text, direct.body)
    answered = await call(ways.gateway, renamed(body, public))
    assert (answered.code, answered.text.replace(public, own)) == (direct.code, direct.text)
    expected = direct.response
    if direct.code is grpc.StatusCode.OK:
        expected.model_name = public
    assert answered.response == expected


def wrong(**changes: Any) -> Any:
    """A request to `identity_fp32` with something wrong about it."""
    request = infer("identity_fp32", [[1, 2]])
    for key, value in changes.items():
        if key in ("datatype", "name"):
            setattr(request.inputs[0], key, value)
        elif key == "shape":
            request.inputs[0].shape[:] = value
        elif key == "raw":
            request.raw_input_contents[:] = value
        elif key == "parameters":
            set_parameters(request, value)
        elif key == "output":
            request.outputs.add(name=value)
        else:
            setattr(request, key, value)
    return request


def both_contents() -> Any:
    request = wrong()
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    return request


def uint64_parameter() -> Any:
    request = wrong()
    request.parameters["custom"].uint64_param = 3
    return request


def classification_of_a_region() -> Any:
    request = wrong()
    output = request.outputs.add(name="OUT")
    output.parameters["classification"].int64_param = 2
    output.parameters["shared_memory_region"].string_param = "none"
    return request


WRONG = {
    "dtype": wrong(datatype="INT32"),
    "no such dtype": wrong(datatype="FP31"),
    "input's name": wrong(name="INN"),
    "no input": pb.ModelInferRequest(model_name="identity_fp32"),
    "shape": wrong(shape=[1, 3]),
    "negative shape": wrong(shape=[1, -2]),
    "huge shape": wrong(shape=[2**40, 2**40]),
    "rank": wrong(shape=[2]),
    "batch": wrong(shape=[9, 1], raw=[bytes(36)]),
    "too few bytes": wrong(raw=[b"1234"]),
    "too many buffers": wrong(raw=[bytes(8), bytes(8)]),
    "no contents": wrong(raw=[]),
    "raw and typed contents": both_contents(),
    "unknown output": wrong(output="OUTT"),
    "version": wrong(model_version="9"),
    "version that is no number": wrong(model_version="abc"),
    "negative version": wrong(model_version="-1"),
    "unknown model": wrong(model_name="nobody"),
    "empty model": wrong(model_name=""),
    "reserved parameter": wrong(parameters={"triton_mine": 1}),
    "uint64 parameter": uint64_parameter(),
    "priority of the wrong type": wrong(parameters={"priority": "high"}),
    "timeout of the wrong type": wrong(parameters={"timeout": "long"}),
    "sequence to a model without": wrong(parameters={"sequence_id": 3, "sequence_start": True}),
    "sequence id of the wrong type": wrong(parameters={"sequence_id": True}),
    "start that is no bool": wrong(parameters={"sequence_id": 3, "sequence_start": 1}),
    "unknown shared memory": classification_of_a_region(),
    "decoupled": infer("repeat", [1], "INT32"),
    "sequence without id": infer("accumulate", [[1]], "INT32"),
    "sequence not started": infer("accumulate", [[1]], "INT32", parameters={"sequence_id": 987}),
    "unknown model in a sequence": wrong(model_name="nobody", parameters={"sequence_id": 5, "sequence_start": True}),
}


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
async def test_a_wrong_request_gets_tritons_own_error(ways: Ways, request_: Any) -> None:
    direct = await call(ways.triton, request_)
    for channel in (ways.gateway, ways.bare):
        through = await call(channel, request_)
        assert (through.code, through.text, through.body) == (direct.code, direct.text, direct.body)


@pytest.mark.parametrize("code", ["INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED"])
@pytest.mark.parametrize("model", ["failing", "fails"])
async def test_a_models_own_error_is_passed_on(ways: Ways, code: str, model: str) -> None:
    request = infer("fails", [b"it broke: \xc3\xa4"], "BYTES")
    request.inputs.add(name="CODE", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(serialize_byte_tensor(np.array([code.encode()], np.object_)).item())
    direct = await call(ways.triton, request)
    request.model_name = model
    through = await call(ways.gateway, request)
    assert direct.code is not grpc.StatusCode.OK
    assert (through.code, through.text) == (direct.code, direct.text)


@pytest.mark.parametrize("body", [b"\xff\xff", b"\x0a\x05ab", b"\x0a\x01\xff"], ids=repr)
async def test_bytes_that_are_no_message_are_refused_like_tritons(ways: Ways, body: bytes) -> None:
    direct, through = await call(ways.triton, body), await call(ways.gateway, body)
    assert through.code is direct.code


@pytest.mark.parametrize("count", [1, 3, 9])
async def test_classification_outputs_are_tritons(ways: Ways, count: int) -> None:
    request = infer("classifier", [[0.1, 0.4, 0.3, 0.2], [4, 3, 2, 1]])
    request.outputs.add(name="OUT").parameters["classification"].int64_param = count
    direct = await call(ways.triton, request)
    request.model_name = "labels"
    through = await call(ways.gateway, request)
    assert through.response.raw_output_contents == direct.response.raw_output_contents
    assert through.response.outputs == direct.response.outputs


async def test_parameters_and_id_reach_the_model_as_they_are(ways: Ways) -> None:
    request = infer("params_echo", [0], "INT32", id="größe/1", parameters={"who": "me", "n": -3, "x": 0.5, "ok": True})
    direct = await call(ways.triton, request)
    request.model_name = "echo"
    through = await call(ways.gateway, request)
    assert direct.response.raw_output_contents == through.response.raw_output_contents
    assert through.response.id == "größe/1"
