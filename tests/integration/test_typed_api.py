"""`gateway.v1` from a client's side, over the real models and over models that answer what they are sent."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from PIL import Image
from real_models import CHECKOUT, TO_INT8, encoded, png_claiming
from triton_fixture import DTYPES
from v2_calls import channel_to, public_name

from gateway.api import typed
from gateway.app import Gateway
from gateway.steps import dtype_of, to_raw
from gateway.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    prediction_pb2,
    prediction_pb2_grpc,
)

pytestmark = pytest.mark.integration

Code = grpc.StatusCode


@pytest.fixture(scope="session")
async def classifier(real_models: Gateway) -> AsyncIterator[Any]:
    async with channel_to(real_models.listen) as channel:
        yield classification_pb2_grpc.ClassificationServiceStub(channel)


@pytest.fixture(scope="session")
async def predictor(gateway: Gateway) -> AsyncIterator[Any]:
    async with channel_to(gateway.listen) as channel:
        yield prediction_pb2_grpc.PredictionServiceStub(channel)


def item(model: str, **fields: Any) -> Any:
    return classification_pb2.ClassifyRequest(model=model, **fields)


def names(answer: Any) -> list[str]:
    return [label.name for label in answer.labels]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# Classification


async def test_a_photo_becomes_labels(classifier: Any, coffee: bytes) -> None:
    answer = await classifier.Classify(item("photo-labels", image=coffee))
    assert names(answer)[0] == "espresso"
    assert len(answer.labels) == 5
    scores = [label.score for label in answer.labels]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(0.95, abs=0.05)
    assert sum(scores) <= 1


async def test_who_answered_and_how_long_each_part_took_is_told(classifier: Any, coffee: bytes) -> None:
    call = classifier.Classify(item("photo-labels", image=coffee))
    served = (await call).served
    assert (served.model, served.variant, served.model_version, served.attempts) == ("photo-labels", "onnx", "1", 1)
    assert served.endpoint.startswith("127.0.0.1:")
    timings = served.timings
    parts = [getattr(timings, part).ToNanoseconds() for part in ("preprocess", "model", "postprocess")]
    assert min(parts) > 0
    assert sum(parts) <= timings.total.ToNanoseconds()
    trailers = dict(await call.trailing_metadata())
    assert (trailers["gateway-variant"], trailers["gateway-endpoint"]) == (served.variant, served.endpoint)


async def test_a_rule_sends_a_caller_to_the_quantized_variant(classifier: Any, coffee: bytes) -> None:
    answer = await classifier.Classify(item("photo-labels", image=coffee), metadata=[TO_INT8])
    assert answer.served.variant == "int8"
    assert names(answer)[0] == "espresso"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
async def test_every_format_of_one_picture_gets_the_same_first_label(classifier: Any, form: str) -> None:
    answer = await classifier.Classify(item("photo-labels", image=encoded(320, 240, form)))
    assert len(answer.labels) == 5


@pytest.mark.parametrize(("asked", "got"), [(0, 5), (1, 1), (3, 3), (5, 5), (100, 5)])
async def test_no_more_labels_than_asked_for_or_made(classifier: Any, coffee: bytes, asked: int, got: int) -> None:
    answer = await classifier.Classify(item("photo-labels", image=coffee, max_labels=asked))
    assert len(answer.labels) == got


def golden(model: str) -> list[Any]:
    cases = json.loads((CHECKOUT / f"tests/data/golden_{model}.json").read_text("utf-8"))
    return [pytest.param(case, id=case["name"]) for case in cases]


def data_of(case: dict[str, Any]) -> bytes:
    return base64.b64decode(case["data"]) * int(case["repeat"])


@pytest.mark.parametrize("case", golden("langid"))
async def test_a_texts_language_is_what_the_original_package_says(classifier: Any, case: dict[str, Any]) -> None:
    """Texts that are no UTF-8 can't be sent as a text, so all go as files, which are the same to the pipeline."""
    best = (await classifier.Classify(item("language", file=data_of(case)))).labels[0]
    assert (best.name, best.score) == (case["label"], pytest.approx(case["score"], abs=1e-4))


async def test_a_text_may_be_sent_as_one(classifier: Any) -> None:
    answer = await classifier.Classify(item("language", text="Größe und Stärke sind nicht dasselbe wie Güte."))
    assert names(answer)[0] == "de"
    assert len(answer.labels) == 3


@pytest.mark.parametrize("case", golden("magika"))
async def test_a_files_type_is_what_the_original_package_says(classifier: Any, case: dict[str, Any]) -> None:
    best = (await classifier.Classify(item("file-type", file=data_of(case)))).labels[0]
    assert (best.name, best.score) == (case["label"], pytest.approx(case["score"], abs=0.02))


BAD_PICTURES = {
    "empty": (b"", "input 'image', row 0: empty"),
    "no picture": (b"GIF89a...", "input 'image', row 0: not a JPEG, PNG or WebP picture"),
    "cut off": (encoded(64, 48)[:600], "input 'image', row 0: "),
    "bomb": (png_claiming(30_000, 30_000), "input 'image', row 0: 30000x30000"),
}


@pytest.mark.parametrize(("data", "text"), BAD_PICTURES.values(), ids=BAD_PICTURES)
async def test_a_bad_picture_is_refused_with_the_input_and_the_reason(classifier: Any, data: bytes, text: str) -> None:
    code, details = await refused(classifier.Classify(item("photo-labels", image=data)))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith(text)


NOT_CLASSIFIED = {
    "unknown": (item("cats", text="?"), Code.NOT_FOUND, "Request for unknown model: 'cats' is not found"),
    "no model": (item("", text="?"), Code.INVALID_ARGUMENT, "model is empty; pipelines: photo-labels"),
    "no pipeline": (item("imagenet", text="?"), Code.INVALID_ARGUMENT, "'imagenet' is no pipeline; pipelines: photo-"),
    "no item": (item("language"), Code.INVALID_ARGUMENT, "item is missing; set image, text or file"),
}


@pytest.mark.parametrize(("request_", "code", "text"), NOT_CLASSIFIED.values(), ids=NOT_CLASSIFIED)
async def test_what_cannot_be_classified_is_refused(
    classifier: Any, request_: Any, code: grpc.StatusCode, text: str
) -> None:
    got, details = await refused(classifier.Classify(request_))
    assert got is code
    assert details.startswith(text)


async def test_a_pipeline_that_makes_no_labels_is_no_classification(gateway: Gateway) -> None:
    async with channel_to(gateway.listen) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        code, details = await refused(stub.Classify(item("best-label", text="?")))
    assert code is Code.INVALID_ARGUMENT
    assert "'best-label' is no classification" in details


# Streams


async def stream(method: Any, message: Any, requests: list[Any]) -> list[Any]:
    """The answers to requests with the ids 0, 1, …"""
    asked = [message(id=str(number), request=request) for number, request in enumerate(requests)]
    return [answer async for answer in method(iter(asked))]


async def test_a_stream_answers_in_order_and_tells_errors_in_their_place(classifier: Any, coffee: bytes) -> None:
    """The photos take longest, so only by being held back do the others come after them."""
    requests = [
        item("photo-labels", image=coffee),
        item("language", text="The ship left the harbour at dawn."),
        item("photo-labels", image=b"no picture"),
        item("cats", text="?"),
        item("photo-labels", image=coffee, max_labels=1),
    ]
    answers = await stream(classifier.StreamClassify, classification_pb2.StreamClassifyRequest, requests)
    assert [answer.id for answer in answers] == ["0", "1", "2", "3", "4"]
    assert [answer.WhichOneof("outcome") for answer in answers] == ["response"] * 2 + ["error"] * 2 + ["response"]
    assert [answers[n].error.code for n in (2, 3)] == [Code.INVALID_ARGUMENT.value[0], Code.NOT_FOUND.value[0]]
    assert answers[2].error.message.startswith("input 'image', row 0: not a JPEG")
    assert [names(answers[n].response)[0] for n in (0, 1, 4)] == ["espresso", "en", "espresso"]


async def test_a_stream_longer_than_what_is_under_way_at_once_is_answered_whole(classifier: Any) -> None:
    texts = [item("language", text=f"The ship number {n} left the harbour at dawn.") for n in range(60)]
    answers = await stream(classifier.StreamClassify, classification_pb2.StreamClassifyRequest, texts)
    assert [answer.id for answer in answers] == [str(number) for number in range(60)]
    assert {names(answer.response)[0] for answer in answers} == {"en"}


async def test_a_stream_that_sends_nothing_ends_well(classifier: Any) -> None:
    assert await stream(classifier.StreamClassify, classification_pb2.StreamClassifyRequest, []) == []


async def test_a_stream_outlives_the_deadline_of_unary_calls(changed_gateway: Callable[..., Gateway]) -> None:
    limited = changed_gateway(server={"max_deadline": "3s"})
    async with limited as running, channel_to(running.listen) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        call = stub.StreamClassify()
        for _ in range(3):
            await call.write(
                classification_pb2.StreamClassifyRequest(request=item("language", text="The ship left at dawn."))
            )
            assert names((await call.read()).response)[0] == "en"
            await asyncio.sleep(1.1)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_each_item_of_a_stream_has_the_time_of_a_unary_call(changed_gateway: Callable[..., Gateway]) -> None:
    out = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(out, "PNG")  # few bytes, and half a second of work
    large = out.getvalue()
    limited = changed_gateway(server={"default_deadline": "250ms"})
    async with limited as running, channel_to(running.listen) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        code, details = await refused(stub.Classify(item("photo-labels", image=large)))
        assert code == Code.DEADLINE_EXCEEDED
        assert details.startswith(("The deadline passed while the step 'decode_image'", "The deadline passed before"))
        answers = await stream(
            stub.StreamClassify,
            classification_pb2.StreamClassifyRequest,
            [item("photo-labels", image=large), item("cats", text="?")],
        )
    assert [answer.error.code for answer in answers] == [4, 5]


async def test_a_caller_who_leaves_a_stream_leaves_nothing_behind(real_models: Gateway, coffee: bytes) -> None:
    async with channel_to(real_models.listen) as channel:
        call = classification_pb2_grpc.ClassificationServiceStub(channel).StreamClassify()
        for _ in range(20):
            await call.write(classification_pb2.StreamClassifyRequest(request=item("photo-labels", image=coffee)))
        await call.read()
        assert tasks_of(typed)
        call.cancel()
    await wait_until(lambda: not tasks_of(typed))
    async with channel_to(real_models.listen) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        assert names(await stub.Classify(item("photo-labels", image=coffee)))[0] == "espresso"


def tasks_of(module: ModuleType) -> list[Any]:
    """What still runs of a module's coroutines. Compiled ones, of other modules, have no code object."""
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    codes = [(coroutine, getattr(coroutine, "cr_code", None)) for coroutine in coroutines]
    return [coroutine for coroutine, code in codes if code is not None and code.co_filename == module.__file__]


# Prediction

LISTS = {
    "BOOL": ("integers", [1, 0]),
    "FP16": ("floats", [0.5, -2.0]),
    "BF16": ("floats", [0.5, -2.0]),
    "FP32": ("floats", [0.5, math.inf]),
    "FP64": ("floats", [0.1, -1e300]),
    "BYTES": ("strings", [b"", b"\x00\xff"]),
    **{f"INT{bits}": ("integers", [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": ("integers", [0, 2**bits - 1]) for bits in (8, 16, 32)},
    "UINT64": ("integers", [0, 2**63 - 1]),
}


def tensor(kind: str, values: list[Any], datatype: str = "", shape: tuple[int, ...] = ()) -> Any:
    made = prediction_pb2.Tensor(datatype=datatype, shape=shape)
    content = getattr(made, kind)
    content.SetInParent()
    content.values.extend(values)
    return made


def request_of(model: str, content: Any, **fields: Any) -> Any:
    return prediction_pb2.PredictRequest(model=model, inputs={"IN": content}, **fields)


@pytest.mark.parametrize("datatype", DTYPES)
async def test_lists_of_every_datatype_arrive_and_come_back(predictor: Any, datatype: str) -> None:
    kind, values = LISTS[datatype]
    answer = await predictor.Predict(request_of(public_name(datatype), tensor(kind, values, datatype, (1, 2))))
    out = answer.outputs["OUT"]
    assert (out.datatype, list(out.shape)) == (datatype, [1, 2])
    if datatype == "UINT64":  # whose upper half no list can hold
        assert out.raw == np.array(values, np.uint64).tobytes()
    else:
        assert list(getattr(out, kind).values) == values


@pytest.mark.parametrize("datatype", DTYPES)
async def test_raw_contents_of_every_datatype_arrive(predictor: Any, datatype: str) -> None:
    kind, values = LISTS[datatype]
    array = np.array(values, dtype_of(datatype))
    content = prediction_pb2.Tensor(datatype=datatype, shape=[1, 2], raw=to_raw(datatype, array))
    out = (await predictor.Predict(request_of(public_name(datatype), content))).outputs["OUT"]
    if datatype == "UINT64":
        assert out.raw == content.raw
    else:
        assert list(getattr(out, kind).values) == values


@pytest.mark.parametrize(("kind", "datatype"), [("floats", "FP32"), ("integers", "INT64"), ("strings", "BYTES")])
async def test_a_list_without_a_datatype_has_a_default_one(predictor: Any, kind: str, datatype: str) -> None:
    values = [b"a"] if kind == "strings" else [1]
    out = (await predictor.Predict(request_of(public_name(datatype), tensor(kind, values, "", (1, 1))))).outputs["OUT"]
    assert (out.datatype, list(getattr(out, kind).values)) == (datatype, values)


async def test_an_output_without_elements_is_still_a_list(predictor: Any) -> None:
    out = (await predictor.Predict(request_of("same-fp32", tensor("floats", [], "FP32", (1, 0))))).outputs["OUT"]
    assert (out.WhichOneof("content"), list(out.shape)) == ("floats", [1, 0])


async def test_a_prediction_tells_who_answered(predictor: Any) -> None:
    served = (await predictor.Predict(request_of("adder", ONE_ROW), metadata=[("x-variant", "b")])).served
    assert (served.model, served.variant, served.model_version, served.attempts) == ("adder", "b", "2", 1)
    assert 0 < served.timings.model.ToNanoseconds() <= served.timings.total.ToNanoseconds()
    assert served.timings.preprocess.ToNanoseconds() == 0


async def test_parameters_reach_rules_and_outputs_can_be_chosen(predictor: Any) -> None:
    answer = await predictor.Predict(request_of("same-fp32", ONE_ROW, outputs=["OUT"], parameters={"tenant": "t"}))
    assert list(answer.outputs) == ["OUT"]


async def test_a_pipeline_can_be_predicted_with(predictor: Any) -> None:
    scores = tensor("floats", [0.1, 0.7, 0.2, 0.0], "FP32", (1, 4))
    request = prediction_pb2.PredictRequest(model="best-label", inputs={"scores": scores})
    answer = await predictor.Predict(request)
    assert list(answer.outputs["label"].strings.values) == [b"1"]
    assert answer.served.timings.postprocess.ToNanoseconds() > 0


ONE_ROW = tensor("floats", [1, 2], "FP32", (1, 2))
INVALID, NOT_FOUND = Code.INVALID_ARGUMENT, Code.NOT_FOUND
NOT_PREDICTED = {
    "no model": (request_of("", ONE_ROW), INVALID, "model is empty"),
    "unknown model": (request_of("cats", ONE_ROW), NOT_FOUND, "unknown model: 'cats'"),
    "unknown version": (request_of("same-fp32", ONE_ROW, model_version="9"), NOT_FOUND, "version 9 is not found"),
    "no content": (request_of("same-fp32", prediction_pb2.Tensor()), INVALID, "input 'IN' has no content"),
    "unknown datatype": (request_of("same-fp32", tensor("floats", [1], "FP8")), INVALID, "datatype is 'FP8'; known: "),
    "raw without datatype": (
        request_of("same-fp32", prediction_pb2.Tensor(raw=b"1234", shape=[1, 1])),
        INVALID,
        "datatype is ''",
    ),
    "wrong list": (
        request_of("same-fp32", tensor("integers", [1], "FP32", (1, 1))),
        INVALID,
        "input 'IN': FP32 contents come as floats or raw",
    ),
    "wrong shape": (
        request_of("same-fp32", tensor("floats", [1, 2], "FP32", (1, 3))),
        INVALID,
        "input 'IN': shape [1, 3] does not fit 2 elements",
    ),
    "negative shape": (
        request_of("same-fp32", tensor("floats", [1, 2], "FP32", (-1, -2))),
        INVALID,
        "input 'IN': shape [-1, -2] is not possible",
    ),
    "too large a number": (
        request_of("same-int8", tensor("integers", [128], "INT8", (1, 1))),
        INVALID,
        "input 'IN': a value does not fit INT8",
    ),
    "raw of another size": (
        request_of("same-fp32", prediction_pb2.Tensor(datatype="FP32", shape=[1, 2], raw=b"1234")),
        INVALID,
        "input 'IN': FP32 [1, 2] takes 8 bytes, got 4",
    ),
    "no such output": (request_of("same-fp32", ONE_ROW, outputs=["X"]), INVALID, "unexpected inference output 'X'"),
    "other datatype": (request_of("same-int32", ONE_ROW), INVALID, "FP32"),
    "no such input": (
        prediction_pb2.PredictRequest(model="same-fp32", inputs={"X": ONE_ROW}),
        INVALID,
        "X",
    ),
}


@pytest.mark.parametrize(("request_", "code", "text"), NOT_PREDICTED.values(), ids=NOT_PREDICTED)
async def test_what_cannot_be_predicted_is_refused(
    predictor: Any, request_: Any, code: grpc.StatusCode, text: str
) -> None:
    got, details = await refused(predictor.Predict(request_))
    assert got is code
    assert text in details


async def test_a_stream_of_predictions_keeps_order_and_tells_errors_in_their_place(predictor: Any) -> None:
    requests = [request_of("same-fp32", tensor("floats", [n], "FP32", (1, 1))) for n in range(20)]
    requests[7] = request_of("cats", ONE_ROW)
    answers = await stream(predictor.StreamPredict, prediction_pb2.StreamPredictRequest, requests)
    assert answers.pop(7).error.code == NOT_FOUND.value[0]
    got = [list(answer.response.outputs["OUT"].floats.values) for answer in answers]
    assert got == [[float(n)] for n in range(20) if n != 7]
