"""The repository as it is, served by a real Triton."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_client
from tritonclient.utils import np_to_triton_dtype

from gateway.artifacts import fetch
from gateway.models.measure import scores
from gateway.models.pictures import picture, to_input
from gateway.models.sources import PICTURES
from gateway.triton import LocalTriton, StartFailed

pytestmark = pytest.mark.integration
IMAGE_MODELS = ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8")
ON_CPU = (*IMAGE_MODELS, "magika", "langid")
ON_GPU = ("efficientnet_lite0_onnx_cuda", "efficientnet_lite0_onnx_trt", "efficientnet_lite0_tensorrt")


@pytest.fixture(scope="module")
async def client(repository: Path) -> AsyncIterator[triton_client.InferenceServerClient]:
    server = LocalTriton(repository)
    await server.start()
    async with triton_client.InferenceServerClient(server.grpc_address) as client:
        yield client
    await server.kill()
    await server.aclose()


async def _infer(client: Any, model: str, inputs: dict[str, np.ndarray[Any, Any]], output: str, **asked: int) -> Any:
    tensors = []
    for name, array in inputs.items():
        tensor = triton_client.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    answer = await client.infer(model, tensors, outputs=[triton_client.InferRequestedOutput(output, **asked)])
    return answer.as_numpy(output)


async def test_every_model_for_this_host_is_ready_and_the_others_are_listed(client: Any) -> None:
    index = await client.get_model_repository_index(as_json=True)
    states = {model["name"]: model.get("state", "") for model in index["models"]}
    assert {name for name, state in states.items() if state == "READY"} >= set(ON_CPU)
    for model in ON_GPU:
        assert model in states
        assert states[model] != "READY", "the local server computes on CPUs"


@pytest.mark.parametrize("model", IMAGE_MODELS)
async def test_a_batch_of_pictures_gets_the_scores_of_the_graph(client: Any, repository: Path, model: str) -> None:
    images = np.stack([to_input(picture(fetch(PICTURES), name)) for name in ("coffee.png", "chelsea.png")])
    answer = await _infer(client, model, {"image": images}, "scores")
    np.testing.assert_allclose(answer, scores(repository / model / "1/model.onnx", images), atol=0.05)


@pytest.mark.parametrize("model", IMAGE_MODELS)
async def test_the_classification_extension_names_the_classes(client: Any, model: str) -> None:
    image = to_input(picture(fetch(PICTURES), "coffee.png"))[None]
    ((best, *_),) = await _infer(client, model, {"image": image}, "scores", class_count=3)
    assert best.decode().split(":")[1:] == ["967", "espresso"]


async def test_a_file_gets_its_type(client: Any, golden: dict[str, list[dict[str, Any]]]) -> None:
    (case,) = [case for case in golden["magika"] if case["name"] == "python"]
    data = base64.b64decode(case["data"])
    padding = [256] * (1024 - len(data.strip()))
    tokens = np.array([[*data.strip(), *padding, *padding, *data.strip()]], np.int32)
    ((best,),) = await _infer(client, "magika", {"bytes": tokens}, "target_label", class_count=1)
    score, _, label = best.decode().split(":")
    assert label == "python"
    assert float(score) == pytest.approx(case["score"], abs=1e-3)


async def test_a_text_without_features_has_equal_probabilities(client: Any) -> None:
    inputs: dict[str, np.ndarray[Any, Any]] = {
        "features": np.zeros((1, 64), np.int32),
        "counts": np.zeros((1, 64), np.float32),
        "length": np.zeros((1, 1), np.int32),
    }
    (probabilities,) = await _infer(client, "langid", inputs, "probabilities")
    assert probabilities.max() < 0.05


GPU_GRAPHS = ("efficientnet_lite0_onnx_cuda", "efficientnet_lite0_onnx_trt")
README = Path(__file__).parents[2] / "model_repository" / "README.md"
START_WITH_WHAT_LOADS = re.findall(
    r"^tritonserver --model-repository=/models (--exit-on-error.*)$", README.read_text(), re.M
)


@pytest.fixture
def with_an_unbuilt_plan(repository: Path, tmp_path: Path) -> Path:
    """A repository that Triton's default mode can't load as a whole."""
    for model in ("magika", "efficientnet_lite0_tensorrt", "efficientnet_lite0_onnx_cuda"):
        (tmp_path / model).symlink_to(repository / model)
    return tmp_path


async def test_in_its_default_mode_triton_ends_over_a_model_that_is_not_built(with_an_unbuilt_plan: Path) -> None:
    server = LocalTriton(with_an_unbuilt_plan, models=(), extra=["--model-control-mode=none"])
    with pytest.raises(StartFailed, match="status 1"):
        await server.start()


async def test_with_the_flags_of_the_readme_triton_serves_what_it_can_load(with_an_unbuilt_plan: Path) -> None:
    (flags,) = START_WITH_WHAT_LOADS
    extra = ["--model-control-mode=none", *flags.split()]
    async with (
        LocalTriton(with_an_unbuilt_plan, models=(), extra=extra) as server,
        triton_client.InferenceServerClient(server.grpc_address) as client,
    ):
        assert await client.is_server_ready()
        assert await client.is_model_ready("magika")
        assert not await client.is_model_ready("efficientnet_lite0_tensorrt")


@pytest.fixture
async def on_cpu(repository: Path, tmp_path: Path) -> AsyncIterator[triton_client.InferenceServerClient]:
    """The ONNX models for GPUs as they are, but for the kind of their instances."""
    for model in GPU_GRAPHS:
        (tmp_path / model).mkdir()
        config = (repository / model / "config.pbtxt").read_text()
        (tmp_path / model / "config.pbtxt").write_text(config.replace("KIND_GPU", "KIND_CPU"))
        for name in ("labels.txt", "1"):
            (tmp_path / model / name).symlink_to(repository / model / name)
    async with (
        LocalTriton(tmp_path, models=GPU_GRAPHS) as server,
        triton_client.InferenceServerClient(server.grpc_address) as client,
    ):
        yield client


async def test_triton_takes_the_configs_for_gpus_and_warms_up_with_the_half_graph(on_cpu: Any) -> None:
    """A model is ready only when it has answered every request of its `model_warmup`; the class is FP32's."""
    image = to_input(picture(fetch(PICTURES), "coffee.png"))[None]
    for model in GPU_GRAPHS:
        assert await on_cpu.is_model_ready(model)
        ((best,),) = await _infer(on_cpu, model, {"image": image}, "scores", class_count=1)
        assert best.decode().split(":")[1:] == ["967", "espresso"]
        config = (await on_cpu.get_model_config(model, as_json=True))["config"]
        assert len(config["model_warmup"]) >= 3
