"""The overlay `local`, as kustomize builds it, played on processes (rehearsal.py): it starts and rolls unnoticed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from deployment_files import KUBERNETES, ROOT, Object, kustomize
from rehearsal import Cluster, Pod, calling
from tritonclient.grpc import service_pb2 as pb

from gateway.models.catalogue import build

INFER = "/inference.GRPCInferenceService/ModelInfer"
OVERLAY = KUBERNETES / "overlays" / "local"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder /models of the image `models`, built as its Dockerfile does."""
    repository = tmp_path_factory.mktemp("image") / "models"
    shutil.copytree(ROOT / "model_repository", repository)
    build(["efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8"], repository)
    return repository


def image() -> bytes:
    message = pb.ModelInferRequest(model_name="imagenet")
    message.inputs.add(name="image", datatype="FP32", shape=[1, 3, 224, 224])
    message.raw_input_contents.append(np.zeros((1, 3, 224, 224), np.float32).tobytes())
    return bytes(message.SerializeToString())


class Callers:
    """Calls through the Service's one address, and among the pods that its headless twin lists."""

    def __init__(self, cluster: Cluster, channels: AsyncExitStack) -> None:
        self.ended: Counter[str] = Counter()
        self._cluster = cluster
        self._channels = channels
        self._open: dict[str, grpc.aio.Channel] = {}
        self._image = image()

    async def _call(self, key: str, address: str) -> None:
        if key not in self._open:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
            channel = grpc.aio.insecure_channel(address, options=options)
            self._open[key] = await self._channels.enter_async_context(channel)
        try:
            answer = await self._open[key].unary_unary(INFER)(self._image, timeout=20)
            self.ended["OK" if pb.ModelInferResponse.FromString(answer).raw_output_contents else "empty"] += 1
        except grpc.aio.AioRpcError as error:
            self.ended[f"{error.code().name}: {error.details()}"] += 1

    async def by_service(self) -> None:
        await self._call("service", self._cluster.services["inference-gateway"].address)

    async def among_pods(self) -> None:
        address = self._cluster.services["inference-gateway-headless"].pick()
        await self._call(address, address)


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, models: Path) -> AsyncIterator[Cluster]:
    """The overlay's two Deployments, ready."""
    folder = tmp_path_factory.mktemp("cluster")
    images = {"inference-gateway-models": {"/models": models}}
    async with Cluster(kustomize(OVERLAY), folder, images) as cluster, AsyncExitStack() as stack:
        for name in ("inference-gateway",):
            await stack.enter_async_context(cluster.services[name].listening())
        await asyncio.gather(cluster.deploy("triton-cpu"), cluster.deploy("inference-gateway"))
        await cluster.settled()
        yield cluster


def next_release(image: str) -> Sequence[Object]:
    """The overlay with a newer tag of an image, as `kubectl apply -k` would bring it."""
    text = yaml.safe_dump_all(kustomize(OVERLAY))
    assert f"image: {image}:" in text
    newer = yaml.safe_load_all(text.replace(f"image: {image}:", f"image: {image}:next-"))
    return tuple(newer)


@asynccontextmanager
async def under_load(cluster: Cluster) -> AsyncIterator[None]:
    """Calls all the while, of which none may fail; and no pod that lives may be restarted for it."""
    async with AsyncExitStack() as channels:
        callers = Callers(cluster, channels)
        async with calling([callers.by_service, callers.among_pods], pause=0.05):
            await asyncio.sleep(1)
            yield
            await asyncio.sleep(1)
    assert callers.ended.keys() == {"OK"}, callers.ended
    assert callers.ended["OK"] > 30
    assert not [pod.name for pods in cluster.pods.values() for pod in pods if pod.restarts]


def assert_all_replaced(cluster: Cluster, deployment: str, before: set[Pod], old: Sequence[Pod]) -> None:
    assert before == set(old)
    assert not before & set(cluster.pods[deployment])
    assert [pod.exit_code for pod in old] == [0] * len(old), old[0].log[-3000:]


@pytest.mark.parametrize(
    ("deployment", "image"),
    [("inference-gateway", "inference-gateway"), ("triton-cpu", "nvcr.io/nvidia/tritonserver")],
    ids=["gateway", "triton"],
)
async def test_no_call_fails_while_a_deployment_rolls(cluster: Cluster, deployment: str, image: str) -> None:
    before = set(cluster.pods[deployment])
    async with under_load(cluster):
        old = await cluster.roll(deployment, next_release(image))
    assert_all_replaced(cluster, deployment, before, old)


async def test_no_call_fails_while_the_node_of_all_gateways_is_drained(cluster: Cluster) -> None:
    """The budget lets one go at a time, and the next when another is ready in its place."""
    before = set(cluster.pods["inference-gateway"])
    async with under_load(cluster):
        old = await cluster.drain("inference-gateway")
    assert_all_replaced(cluster, "inference-gateway", before, old)


async def test_a_changed_configmap_reaches_every_gateway_without_a_restart(cluster: Cluster) -> None:
    gateways = cluster.pods["inference-gateway"]
    config = (OVERLAY / "config" / "gateway.yaml").read_text()
    async with under_load(cluster):
        cluster.apply("inference-gateway", {"gateway.yaml": config.replace("{onnx: 90, int8: 10}", "{int8: 1}")})
        end = time.monotonic() + 10
        while not all(pod.log.count("is in force") >= 2 for pod in gateways):
            assert time.monotonic() < end, gateways[0].log[-3000:]
            await asyncio.sleep(0.1)
    assert cluster.pods["inference-gateway"] == gateways
