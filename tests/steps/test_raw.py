"""Raw tensors come out as they went in; anything malformed is the caller's fault and names the input."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import serialize_byte_tensor

from gateway.errors import BadInput
from gateway.steps import DATATYPES, datatype_of, dtype_of, to_array, to_raw

NUMBERS = [datatype for datatype in DATATYPES if datatype not in ("BYTES", "BF16")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@given(data=st.data(), datatype=st.sampled_from(NUMBERS), shape=SHAPES)
def test_numbers_come_out_as_they_went_in(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    array = data.draw(hnp.arrays(dtype_of(datatype), shape))
    back = to_array("x", datatype, shape, to_raw(datatype, array))
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()
    assert datatype_of(back) == datatype


@given(data=st.data(), shape=SHAPES)
def test_bytes_come_out_as_they_went_in(data: st.DataObject, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    array = np.empty(count, np.object_)
    array[:] = data.draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    raw = to_raw("BYTES", array.reshape(shape))
    assert np.array_equal(to_array("x", "BYTES", shape, raw), array.reshape(shape))
    if count:
        assert raw == serialize_byte_tensor(array.reshape(shape)).item()


def test_numbers_are_little_endian_on_the_wire() -> None:
    assert to_raw("INT32", np.array([1], np.int32)) == b"\1\0\0\0"
    assert to_raw("INT16", np.array([[1, 2], [3, 4]], np.int16).T) == b"\1\0\3\0\2\0\4\0"


@given(bits=st.integers(0, 0xFFFF))
@example(bits=0x7F81)  # a signalling NaN
def test_bf16_survives_the_way_through_float32(bits: int) -> None:
    raw = struct.pack("<H", bits)
    value = to_array("x", "BF16", [1], raw)
    assert value.dtype == np.float32
    back = to_raw("BF16", value)
    assert back == raw or np.isnan(value[0])
    assert np.isnan(to_array("x", "BF16", [1], back)[0]) == np.isnan(value[0])


@pytest.mark.parametrize(
    ("value", "want"),
    [(1.0, 0x3F80), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (1.005, 0x3F81), (3.4e38, 0x7F80), (-0.0, 0x8000)],
)
def test_bf16_rounds_to_the_nearest_ties_to_even(value: float, want: int) -> None:
    assert to_raw("BF16", np.array([value], np.float32)) == struct.pack("<H", want)


def test_any_byte_but_zero_is_true() -> None:
    assert to_array("x", "BOOL", [3], b"\0\1\7").tolist() == [False, True, True]


def test_arrays_cannot_be_written_to() -> None:
    for datatype, raw in (("INT8", b"ab"), ("BOOL", b"\0\1"), ("BF16", bytes(4)), ("BYTES", bytes(8))):
        assert not to_array("x", datatype, [2], raw).flags.writeable


MALFORMED = [
    ("FP32", [2], bytes(7), "FP32 [2] takes 8 bytes, got 7"),
    ("FP32", [2], bytes(9), "FP32 [2] takes 8 bytes, got 9"),
    ("FP32", [2**31 - 1, 2**31 - 1], b"", "FP32 [2147483647, 2147483647] takes 18446744056529682436 bytes, got 0"),
    ("FP32", [-1], b"", "shape [-1] is not possible: at most 32 axes of 0 to 2^31-1 each"),
    (
        "FP32",
        [1] * 33,
        bytes(4),
        "shape [1, 1, 1, 1, 1, 1, 1, 1, '…'] is not possible: at most 32 axes of 0 to 2^31-1 each",
    ),
    (
        "INT8",
        [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
        b"",
        "shape [0, 2147483647, 2147483647, 2147483647] is not possible",
    ),
    ("FP8", [1], b"", f"unknown datatype 'FP8'; known: {', '.join(DATATYPES)}"),
    ("BYTES", [2**30], bytes(8), "1073741824 BYTES elements take at least 4294967296 bytes, got 8"),
    ("BYTES", [1], b"\5\0\0\0abc", "element 0 claims 5 bytes, 3 are left"),
    ("BYTES", [2], b"\3\0\0\0abc\1", "the data ends before element 1 of 2"),
    ("BYTES", [1], b"\1\0\0\0abc", "2 bytes are left after the last of 1 elements"),
    ("BYTES", [1], b"\xff\xff\xff\xff", "element 0 claims 4294967295 bytes, 0 are left"),
    ("BYTES", [0], b"\0", "1 bytes are left after the last of 0 elements"),
]


@pytest.mark.parametrize(("datatype", "shape", "raw", "reason"), MALFORMED)
def test_a_malformed_tensor_is_refused_with_its_name_and_reason(
    datatype: str, shape: list[int], raw: bytes, reason: str
) -> None:
    with pytest.raises(BadInput) as caught:
        to_array("x", datatype, shape, raw)
    assert caught.value.text == f"input 'x': {reason}"


@given(
    datatype=st.sampled_from([*DATATYPES, "FP8", ""]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=40),
    raw=st.binary(max_size=64),
)
def test_any_tensor_is_understood_or_refused_and_nothing_else(datatype: str, shape: list[int], raw: bytes) -> None:
    try:
        array = to_array("x", datatype, shape, raw)
    except BadInput as refused:
        text = refused.text
    else:
        assert list(array.shape) == shape
        return
    assert text.startswith("input 'x': ")


@pytest.mark.parametrize(
    ("datatype", "array"),
    [("FP32", np.zeros(1)), ("BYTES", np.array(["text"], np.object_)), ("INT8", np.zeros(1, np.uint8))],
)
def test_an_array_of_another_type_is_not_written(datatype: str, array: Any) -> None:
    with pytest.raises(TypeError):
        to_raw(datatype, array)
