"""What is wrong with an answer whose status is OK, on bytes as servers write them, and on any bytes."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.v2.faults import CONTRACT, NOT_FINITE, Fault, maybe_misfit, maybe_not_finite
from gateway.v2.outputs import _KEPT, AnswerReader
from gateway.v2.peek import peek_response

DECLARED = {"OUT": ("FP32", (-1, 2)), "NAMES": ("BYTES", (-1,))}
NAN, INFINITY = float("nan"), float("inf")


def answer(values: Any = ((1.0, 2.0),), datatype: str = "FP32", *, name: str = "OUT", raw: bytes | None = None) -> Any:
    message = pb.ModelInferResponse(model_name="m", model_version="1")
    array = np.asarray(values, np.float32)
    message.outputs.add(name=name, datatype=datatype, shape=array.shape)
    message.raw_output_contents.append(array.tobytes() if raw is None else raw)
    return message


def typed(values: Any) -> Any:
    message = pb.ModelInferResponse(model_name="m")
    message.outputs.add(name="OUT", datatype="FP32", shape=[len(values)]).contents.fp32_contents.extend(values)
    return message


def in_shared_memory() -> Any:
    message = answer(raw=b"")
    message.outputs[0].parameters["shared_memory_region"].string_param = "region"
    return message


def read(body: bytes) -> Any:
    return AnswerReader().read(body, peek_response(body))


NUMBERS = {
    "finite": (answer(), None),
    "nothing": (pb.ModelInferResponse(model_name="m"), None),
    "an empty batch": (answer(np.zeros((0, 2))), None),
    "NaN": (answer([[1.0, NAN]]), NOT_FINITE),
    "minus infinity": (answer([[-INFINITY, 1.0]]), NOT_FINITE),
    "the largest number": (answer([[float(np.finfo(np.float32).max), 1.0]]), None),
    "the bits of NaN in whole numbers": (answer([[NAN, NAN]], "INT32"), None),
    "texts": (answer([1.0], "BYTES", raw=b"\x03\x00\x00\x00nan"), None),
    "too few bytes": (answer(raw=bytes(4)), CONTRACT),
    "too many bytes": (answer(raw=bytes(12)), CONTRACT),
    "in shared memory": (in_shared_memory(), None),
    "typed contents": (typed([1.0, 2.0]), None),
    "NaN in typed contents": (typed([1.0, NAN]), NOT_FINITE),
}


@pytest.mark.parametrize(("message", "kind"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_finite_and_of_their_size(message: Any, kind: str | None) -> None:
    fault = maybe_not_finite(read(message.SerializeToString()))
    assert (fault.kind if fault is not None else None) == kind


def test_the_second_output_is_looked_at_too() -> None:
    message = answer()
    message.MergeFrom(answer([[NAN, 1.0]], name="OTHER"))
    assert maybe_not_finite(read(message.SerializeToString())) == Fault(
        NOT_FINITE, "output 'OTHER' has NaN or infinity"
    )


def test_contents_before_their_description_are_read_as_well() -> None:
    message = answer([[NAN, 1.0]])
    raw = pb.ModelInferResponse(raw_output_contents=message.raw_output_contents)
    del message.raw_output_contents[:]
    fault = maybe_not_finite(read(raw.SerializeToString() + message.SerializeToString()))
    assert fault is not None
    assert fault.kind == NOT_FINITE


FITS = {
    "as declared": (answer(), b"", ""),
    "any number of rows": (answer(np.zeros((7, 2))), b"", ""),
    "another width": (answer([[1.0]]), b"", "output 'OUT' has shape [1, 1], and [-1, 2] in the model's metadata"),
    "another rank": (answer([1.0]), b"", "output 'OUT' has shape [1], and [-1, 2] in the model's metadata"),
    "another datatype": (answer([[1.0]], "FP64"), b"", "output 'OUT' is FP64, and FP32 in the model's metadata"),
    "not declared": (answer(name="X"), b"", "output 'X' is not in the model's metadata; there: OUT, NAMES"),
    "classes that were asked for": (answer([1.0], "BYTES"), b"..classification..", ""),
    "texts that were not": (answer([1.0], "BYTES"), b"", "output 'OUT' is BYTES, and FP32 in the model's metadata"),
}


@pytest.mark.parametrize(("message", "asked", "text"), FITS.values(), ids=FITS)
def test_outputs_are_as_the_metadata_says(message: Any, asked: bytes, text: str) -> None:
    found = maybe_misfit(read(message.SerializeToString()).outputs, DECLARED, asked)
    assert found == (Fault(CONTRACT, text) if text else None)


def test_what_is_remembered_of_answers_is_bounded() -> None:
    reader = AnswerReader()
    for n in range(_KEPT + 100):
        body = answer(name=f"OUT{n}").SerializeToString()
        reader.read(body, peek_response(body))
    assert len(reader._known) <= _KEPT


@given(
    st.binary(max_size=60)
    | st.builds(lambda at, cut: answer([[NAN, 1.0]]).SerializeToString()[at:cut], st.integers(0, 9), st.integers(0, 60))
)
def test_any_bytes_are_an_answer_or_malformed(body: bytes) -> None:
    try:
        found = read(body)
    except MalformedMessage:
        return
    with contextlib.suppress(MalformedMessage):
        maybe_not_finite(found)
