"""The overlay `local`, as kustomize builds it, played on processes (rehearsal.py): it starts and rolls unnoticed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest
import yaml
from callers import under_load
from deployment_files import KUBERNETES, Object, kustomize
from rehearsal import Cluster, Pod, models_image

OVERLAY = KUBERNETES / "overlays" / "local"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """The overlay's two Deployments, ready."""
    folder = tmp_path_factory.mktemp("cluster")
    images = {"inference-gateway-models": models_image(tmp_path_factory.mktemp("image"))}
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
        end = time.monotonic() + 60
        while not all(pod.log.count("is in force") >= 2 for pod in gateways):
            assert time.monotonic() < end, gateways[0].log[-3000:]
            await asyncio.sleep(0.1)
    assert cluster.pods["inference-gateway"] == gateways
