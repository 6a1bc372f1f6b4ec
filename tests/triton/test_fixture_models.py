"""The models that other tests rely on do what they promise, on the real Triton."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from triton_fixture import DTYPES
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

NUMPY = {"BOOL": np.bool_, "FP16": np.float16, "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64}


@pytest.fixture
async def client(triton: LocalTriton) -> AsyncIterator[grpcclient.InferenceServerClient]:
    async with grpcclient.InferenceServerClient(triton.grpc_address) as client:
        yield client


def tensor(values: np.ndarray, datatype: str | None = None, name: str = "IN") -> grpcclient.InferInput:
    made = grpcclient.InferInput(name, values.shape, datatype or np_to_triton_dtype(values.dtype))
    made.set_data_from_numpy(values)
    return made


def sample(dtype: str) -> np.ndarray:
    if dtype == "BYTES":
        return np.array([[b"", b"\x00\xff", "größe".encode()]], np.object_)
    return np.array([[0, 1, 2]]).astype(NUMPY.get(dtype) or np.dtype(dtype.lower()))


@pytest.mark.parametrize("dtype", DTYPES)
async def test_identity_answers_its_input(client: grpcclient.InferenceServerClient, dtype: str) -> None:
    result = await client.infer(f"identity_{dtype.lower()}", [tensor(sample(dtype), dtype)])
    np.testing.assert_array_equal(result.as_numpy("OUT"), sample(dtype))


@pytest.mark.parametrize(("model", "summand"), [("add_one_a", 1), ("add_one_b", 1), ("add_two", 2)])
async def test_add_adds(client: grpcclient.InferenceServerClient, model: str, summand: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = await client.infer(model, [tensor(values)])
    np.testing.assert_array_equal(result.as_numpy("OUT"), values + summand)


async def test_two_variants_differ_in_their_version(client: grpcclient.InferenceServerClient) -> None:
    versions = [(await client.get_model_metadata(model)).versions[0] for model in ("add_one_a", "add_one_b")]
    assert versions == ["1", "2"]


async def test_classifier_answers_labels(client: grpcclient.InferenceServerClient) -> None:
    scores = np.array([[0.1, 0.2, 0.9, 0.3]], np.float32)
    asked = [grpcclient.InferRequestedOutput("OUT", class_count=2)]
    result = await client.infer("classifier", [tensor(scores)], outputs=asked)
    assert [text.split(b":")[1:] for text in result.as_numpy("OUT")[0]] == [[b"2", b"cat"], [b"3", b"dog"]]


@pytest.mark.parametrize("times", [0, 1, 3])
async def test_repeat_answers_as_often_as_asked(client: grpcclient.InferenceServerClient, times: int) -> None:
    async def requests() -> AsyncIterator[dict[str, object]]:
        values = tensor(np.array([times], np.int32))
        yield {"model_name": "repeat", "inputs": [values], "enable_empty_final_response": True}

    got = []
    async for result, error in client.stream_infer(requests()):
        assert error is None
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        got.append(int(result.as_numpy("OUT")[0]))
    assert got == list(range(times))


async def test_slow_refuses_the_sixth_that_waits(client: grpcclient.InferenceServerClient) -> None:
    """One is worked on and four wait; the scheduler may hold one more in its hand, or have taken none out yet.

    On a busy machine all may have come before it takes any out, or only after it has been through with some.
    """
    calls = [client.infer("slow", [tensor(np.array([[300]], np.int32))]) for _ in range(12)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [str(answer) for answer in answers if isinstance(answer, InferenceServerException)]
    assert 5 <= len(refused) <= 9
    assert all("Exceeds maximum queue size" in text for text in refused)


@pytest.mark.parametrize(("model", "ids"), [("accumulate", (7, 8)), ("accumulate_text", ("left", "right"))])
async def test_accumulate_sums_each_sequence(
    client: grpcclient.InferenceServerClient, model: str, ids: tuple[int | str, int | str]
) -> None:
    sums: dict[int | str, list[int]] = {sequence: [] for sequence in ids}
    for step in range(3):
        for factor, sequence in enumerate(ids, 1):
            values = tensor(np.array([[factor * (step + 1)]], np.int32))
            border = {"sequence_start": step == 0, "sequence_end": step == 2}
            result = await client.infer(model, [values], sequence_id=sequence, **border)
            sums[sequence].append(int(result.as_numpy("OUT")[0, 0]))
    assert sums == {ids[0]: [1, 3, 6], ids[1]: [2, 6, 12]}


async def test_params_echo_tells_what_reached_it(client: grpcclient.InferenceServerClient) -> None:
    values = tensor(np.zeros(1, np.int32))
    result = await client.infer("params_echo", [values], request_id="r1", parameters={"who": "me", "n": 3, "ok": True})
    told = json.loads(result.as_numpy("OUT")[0])
    assert told["parameters"] == {"who": "me", "n": 3, "ok": True}
    assert told["request_id"] == "r1"


async def test_fails_fails_as_told(client: grpcclient.InferenceServerClient) -> None:
    texts = [np.array([text], np.object_) for text in (b"no such thing", b"NOT_FOUND")]
    with pytest.raises(InferenceServerException, match="no such thing") as caught:
        await client.infer("fails", [tensor(texts[0]), tensor(texts[1], name="CODE")])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
