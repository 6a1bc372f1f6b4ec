"""Pipelines over the real models, as tritonclient sees them: one more model each."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton_client
from patience import ask_until
from real_models import CHECKOUT, TO_INT8, encoded
from tritonclient.utils import InferenceServerException
from v2_calls import channel_to

from gateway.app import Gateway
from gateway.triton import LocalTriton
from gateway.v1 import classification_pb2, classification_pb2_grpc

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
async def client(real_models: Gateway) -> AsyncIterator[triton_client.InferenceServerClient]:
    async with triton_client.InferenceServerClient(real_models.listen) as client:
        yield client


@pytest.fixture(scope="session")
async def direct(real_triton: LocalTriton) -> AsyncIterator[triton_client.InferenceServerClient]:
    """To the Triton itself."""
    async with triton_client.InferenceServerClient(real_triton.grpc_address) as client:
        yield client


def column(name: str, *items: bytes) -> triton_client.InferInput:
    """BYTES [rows, 1]."""
    made = triton_client.InferInput(name, [len(items), 1], "BYTES")
    made.set_data_from_numpy(np.array(items, np.object_).reshape(-1, 1))
    return made


async def labels_of(client: Any, model: str, name: str, *items: bytes, **options: Any) -> list[list[str]]:
    result = await client.infer(model, [column(name, *items)], **options)
    return [[label.decode() for label in row] for row in result.as_numpy("label")]


def golden(model: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((CHECKOUT / f"tests/data/golden_{model}.json").read_text("utf-8"))
    return cases


def data_of(case: dict[str, Any]) -> bytes:
    return base64.b64decode(case["data"]) * int(case["repeat"])


async def test_bytes_in_labels_and_scores_out(client: Any, coffee: bytes) -> None:
    result = await client.infer("photo-labels", [column("image", coffee)], request_id="r-1")
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("photo-labels", "1", "r-1")
    assert result.as_numpy("label").shape == result.as_numpy("score").shape == (1, 5)
    assert result.as_numpy("label")[0, 0] == b"espresso"
    assert result.as_numpy("score")[0, 0] == pytest.approx(0.95, abs=0.05)


async def test_variants_of_one_pipeline_keep_its_contract(client: Any, coffee: bytes) -> None:
    exact, quantized = [
        await client.infer("photo-labels", [column("image", coffee)], headers=headers)
        for headers in ({}, dict([TO_INT8]))
    ]
    assert [output.name for output in exact.get_response().outputs] == ["label", "score"]
    assert exact.get_response().outputs == quantized.get_response().outputs
    assert exact.as_numpy("label")[0, 0] == quantized.as_numpy("label")[0, 0]


async def test_a_batch_is_one_request_to_the_model_and_keeps_its_rows(client: Any, direct: Any, coffee: bytes) -> None:
    async def counts() -> tuple[int, int]:
        answer = await direct.get_inference_statistics("efficientnet_lite0_onnx")
        (statistics,) = answer.model_stats
        return statistics.inference_stats.success.count, statistics.inference_count

    other = encoded(300, 200, "PNG")
    before = await counts()
    both = await labels_of(client, "photo-labels", "image", coffee, other, coffee)
    after = await ask_until(counts, lambda now: now[0] > before[0])  # Triton counts a moment after it has answered
    assert np.subtract(after, before).tolist() == [1, 3]
    assert both[0] == both[2]
    assert both[0][0] == "espresso"
    assert both[1] == (await labels_of(client, "photo-labels", "image", other))[0]


async def test_one_bad_row_names_itself(client: Any, coffee: bytes) -> None:
    with pytest.raises(InferenceServerException, match="input 'image', row 1: not a JPEG") as caught:
        await client.infer("photo-labels", [column("image", coffee, b"no picture", coffee)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(("rows", "text"), [(0, "0 rows"), (17, "17 rows; 'photo-labels' takes 1 to 16")])
async def test_more_rows_than_declared_are_refused(client: Any, rows: int, text: str) -> None:
    with pytest.raises(InferenceServerException, match=text):
        await client.infer("photo-labels", [column("image", *[b""] * rows)])


async def test_a_batch_of_texts_gets_what_the_original_package_says(client: Any) -> None:
    cases = golden("langid")[:64]
    got = await labels_of(client, "language", "text", *map(data_of, cases))
    assert [row[0] for row in got] == [case["label"] for case in cases]


async def test_a_batch_of_files_gets_what_the_original_package_says(client: Any) -> None:
    cases = golden("magika")[:64]
    got = await labels_of(client, "file-type", "file", *map(data_of, cases))
    assert [row[0] for row in got] == [case["label"] for case in cases]


async def test_outputs_of_a_pipeline_can_be_chosen(client: Any) -> None:
    outputs = [triton_client.InferRequestedOutput("mime_type")]
    result = await client.infer("file-type", [column("file", b"%PDF-1.7\n")], outputs=outputs)
    assert [output.name for output in result.get_response().outputs] == ["mime_type"]


async def test_a_pipeline_describes_itself_as_a_model(client: Any) -> None:
    assert await client.is_model_ready("photo-labels")
    assert await client.is_model_ready("photo-labels", "1")
    assert not await client.is_model_ready("photo-labels", "2")
    metadata = await client.get_model_metadata("photo-labels")
    assert list(metadata.versions) == ["1"]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("image", "BYTES", [-1, 1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("label", "BYTES", [-1, -1]),
        ("score", "FP32", [-1, -1]),
    ]
    config = (await client.get_model_config("photo-labels")).config
    assert (config.name, config.max_batch_size, list(config.input[0].dims)) == ("photo-labels", 16, [1])


async def test_a_version_that_a_pipeline_has_not_is_not_found(client: Any, coffee: bytes) -> None:
    for call in (
        client.infer("photo-labels", [column("image", coffee)], model_version="2"),
        client.get_model_metadata("photo-labels", "2"),
    ):
        with pytest.raises(InferenceServerException, match="unknown model: 'photo-labels' version 2") as caught:
            await call
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="version is not available for model 'photo-labels'") as caught:
        await client.get_inference_statistics("photo-labels", "2")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"  # as Triton's


async def test_statistics_count_a_pipelines_requests_and_rows(client: Any, coffee: bytes) -> None:
    async def statistics() -> Any:
        return (await client.get_inference_statistics("photo-labels")).model_stats[0]

    before = await statistics()
    await client.infer("photo-labels", [column("image", coffee, coffee)])
    with pytest.raises(InferenceServerException):
        await client.infer("photo-labels", [column("image", b"")])
    after = await statistics()
    assert (after.name, after.version) == ("photo-labels", "1")
    assert after.inference_count - before.inference_count == 2
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.last_inference / 1000 == pytest.approx(time.time(), abs=60)


async def test_statistics_of_everything_have_each_model_once(client: Any) -> None:
    entries = [(s.name, s.version) for s in (await client.get_inference_statistics()).model_stats]
    assert len(entries) == len(set(entries))
    assert {name for name, _ in entries} >= {"photo-labels", "imagenet", "efficientnet_lite0_onnx", "magika"}


async def test_the_index_lists_public_models_with_the_versions_that_can_be_called(client: Any) -> None:
    index = await client.get_model_repository_index()
    entries = {(model.name, model.version): model.state for model in index.models}
    for name in ("imagenet", "languages", "photo-labels", "language", "file-type", "magika"):
        assert entries[name, "1"] == "READY"
    assert {name for name, _ in entries} >= {"efficientnet_lite0_tensorrt"}
    assert all(count == 1 for count in (sum(key == other for other in entries) for key in entries))


# Threads and their bound


async def test_requests_beyond_the_queue_are_refused_at_once_and_the_others_answered(
    changed_gateway: Callable[..., Gateway],
) -> None:
    large = encoded(2400, 1800)
    limited = changed_gateway(pipelines={"threads": 1, "queue": 2})
    async with limited as running, channel_to(running.listen) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        request = classification_pb2.ClassifyRequest(model="photo-labels", image=large)
        answers = await asyncio.gather(*(stub.Classify(request) for _ in range(12)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert refused
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "pipelines.threads is 1 and pipelines.queue 2" in (refused[0].details() or "")
        assert len(answers) - len(refused) >= 3
        assert len((await stub.Classify(request)).labels) == 5


async def test_calls_go_on_while_pictures_are_decoded(real_models: Gateway) -> None:
    """Decoding takes some hundred milliseconds a picture here; on the event loop each would hold up every call."""
    large = await asyncio.to_thread(encoded, 5000, 4000)
    async with channel_to(real_models.listen) as channel, channel_to(real_models.listen) as other:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        request = classification_pb2.ClassifyRequest(model="photo-labels", image=large)
        began = time.perf_counter()
        pictures = asyncio.gather(*(stub.Classify(request) for _ in range(4)))
        live = other.unary_unary("/inference.GRPCInferenceService/ServerLive")
        during = []
        while not pictures.done():
            asked = time.perf_counter()
            await live(b"")
            during.append(time.perf_counter() - asked)
        answers = await pictures
        took = time.perf_counter() - began
    decoding = [answer.served.timings.preprocess.ToNanoseconds() / 1e9 for answer in answers]
    assert len(during) > 10
    assert sorted(during)[len(during) // 2] < min(decoding) / 4, (decoding, took)
