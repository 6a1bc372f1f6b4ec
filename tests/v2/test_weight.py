"""What a message would become is counted from its bytes, and no more of it is looked at than is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.forwarding import messages
from gateway.forwarding.messages import parse_response, read_request, tensors_of
from gateway.steps import WrongAnswer
from gateway.v1 import prediction_pb2
from gateway.v2 import weight
from gateway.v2.peek import fields
from gateway.v2.weight import BRIEF, FIELD, MOST, PREDICT_REQUEST, TEXT, V2_REQUEST, TooHeavy, maybe_brief, weigh


def typed(field: str, values: list[Any]) -> bytes:
    request = pb.ModelInferRequest()
    getattr(request.inputs.add().contents, field).extend(values)
    return bytes(request.SerializeToString())


LISTS = {
    "bool_contents": [True] * 70,
    "int_contents": [-1, 1, 300] * 30,
    "int64_contents": [-1, 2**40] * 40,
    "uint_contents": [2**31] * 50,
    "uint64_contents": [2**64 - 1] * 50,
    "fp32_contents": [1.0] * 60,
    "fp64_contents": [1.0] * 60,
}


@pytest.mark.parametrize("field", LISTS)
def test_numbers_in_a_list_weigh_one_each(field: str) -> None:
    values = LISTS[field]
    assert weigh(typed(field, values), V2_REQUEST) == 2 * FIELD + len(values)


def test_texts_and_other_fields_weigh_more() -> None:
    assert weigh(typed("bytes_contents", [b"", b"a" * 5000]), V2_REQUEST) == 2 * FIELD + 2 * TEXT


def predict(kind: str, values: list[Any]) -> bytes:
    request = prediction_pb2.PredictRequest()
    getattr(request.inputs["x"], kind).values.extend(values)
    return bytes(request.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "values", "each"), [("floats", [1.0], 1), ("integers", [-1], 1), ("strings", [b""], TEXT)]
)
def test_lists_of_the_typed_api_weigh_the_same(kind: str, values: list[Any], each: int) -> None:
    small, large = (weigh(predict(kind, values * count), PREDICT_REQUEST) for count in (10, 30))
    assert large - small == 20 * each


def parameters(count: int) -> bytes:
    request = pb.ModelInferRequest()
    tensor = request.inputs.add()
    for number in range(count):
        tensor.parameters[str(number)].int64_param = 1
    return bytes(request.SerializeToString())


def outputs(count: int) -> bytes:
    return bytes(prediction_pb2.PredictRequest(outputs=["x"] * count).SerializeToString())


HEAVY = {
    "texts": (typed("bytes_contents", [b""] * (MOST // TEXT)), V2_REQUEST),
    "numbers": (typed("fp32_contents", [0.0] * MOST), V2_REQUEST),
    "varints": (typed("bool_contents", [True] * MOST), V2_REQUEST),
    "long varints": (typed("int_contents", [-1] * MOST), V2_REQUEST),
    "parameters of a tensor": (parameters(MOST // FIELD), V2_REQUEST),
    "outputs": (outputs(MOST // FIELD + 1), PREDICT_REQUEST),
    "strings": (predict("strings", [b""] * (MOST // TEXT)), PREDICT_REQUEST),
}


@pytest.mark.parametrize(("body", "parts"), HEAVY.values(), ids=HEAVY)
def test_what_weighs_too_much_is_refused(body: bytes, parts: weight.Parts) -> None:
    with pytest.raises(TooHeavy, match="more than 262144 texts, 4194304 numbers in lists or 16384 fields"):
        weigh(body, parts)
    assert maybe_brief(body, parts) is None


async def test_it_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parser:
        @staticmethod
        def FromString(_: bytes) -> Any:
            raise AssertionError("parsed")

    monkeypatch.setattr(messages.pb, "ModelInferRequest", Parser)
    monkeypatch.setattr(messages.pb, "ModelInferResponse", Parser)
    with pytest.raises(TooHeavy):
        await read_request(HEAVY["texts"][0])
    with pytest.raises(WrongAnswer, match="holds more than"):
        parse_response(HEAVY["texts"][0])


def test_whether_it_is_brief_is_known_from_its_first_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counting(*args: Any) -> Any:
        nonlocal seen
        for found in fields(*args):
            seen += 1
            yield found

    monkeypatch.setattr(weight, "fields", counting)
    assert maybe_brief(HEAVY["texts"][0], V2_REQUEST) is None
    assert seen <= BRIEF // TEXT + 2


def test_raw_texts_are_counted_before_one_is_made() -> None:
    answer = pb.ModelInferResponse()
    for number in range(2):  # together too many, and their contents no texts at all
        answer.outputs.add(name=str(number), datatype="BYTES", shape=[MOST // TEXT // 2 + 1])
        answer.raw_output_contents.append(b"\xff" * 4 * (MOST // TEXT // 2 + 1))
    with pytest.raises(WrongAnswer, match="holds more than"):
        parse_response(answer.SerializeToString())


def test_raw_numbers_weigh_nothing() -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1 << 20])
    request.raw_input_contents.append(bytes(4 << 20))
    body = request.SerializeToString()
    assert maybe_brief(body, V2_REQUEST) is not None
    assert tensors_of(request.inputs, request.raw_input_contents)["x"].size == 1 << 20


def test_what_is_no_message_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        weigh(b"\x2a\x05\x2a", V2_REQUEST)
