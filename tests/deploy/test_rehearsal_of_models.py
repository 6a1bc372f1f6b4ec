"""The overlay `gpu`, played on processes (rehearsal.py) where no GPU is free: its models' volume changes and is lost.

The pool `triton-gpu` has no pods, as when no node has room for them, so all calls live on the CPU pool. Gateways speak
TLS with the Secret that cert-manager would make, and send their spans to a collector in another namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp
import pytest
from aiohttp import web
from callers import under_load
from certificates import Authority, read
from deployment_files import KUBERNETES, kustomize
from rehearsal import Cluster, Folders, Pod, models_image

INT8 = "efficientnet_lite0_onnx_int8"
COLLECTOR = "otel-collector.observability.svc"

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class Site:
    cluster: Cluster
    image: Folders
    authority: bytes


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """The volume filled by the overlay's Job, then its gateways and its CPU pool, ready."""
    files = Authority(tmp_path_factory.mktemp("authority")).issue("inference-gateway")
    pair = {"tls.crt": read(files.certificate).decode(), "tls.key": read(files.key).decode()}
    image = models_image(tmp_path_factory.mktemp("image"))
    cluster = Cluster(
        kustomize(KUBERNETES / "overlays" / "gpu"),
        tmp_path_factory.mktemp("cluster"),
        {"inference-gateway-models": image},
        {"inference-gateway-tls": pair},
    )
    async with cluster, AsyncExitStack() as stack:
        cluster.elsewhere[COLLECTOR] = cluster.next_ip()
        await stack.enter_async_context(collector(cluster.elsewhere[COLLECTOR]))
        await stack.enter_async_context(cluster.services["inference-gateway"].listening())
        await cluster.run_job("publish-models")
        await asyncio.gather(cluster.deploy("triton-cpu"), cluster.deploy("inference-gateway"))
        await cluster.settled()
        yield Site(cluster, image, read(files.ca))


@contextlib.asynccontextmanager
async def collector(ip: str) -> AsyncIterator[None]:
    """Takes whatever comes by OTLP over HTTP."""

    async def take(_: web.Request) -> web.Response:
        return web.Response()

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, ip, 4318).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def versions(pod: Pod) -> set[str]:
    """Which versions of a model its Triton has ready."""
    async with aiohttp.ClientSession() as session:
        found = set()
        for version in ("1", "2"):
            async with session.get(f"http://{pod.ip}:8000/v2/models/{INT8}/versions/{version}/ready") as answer:
                if answer.status == 200:
                    found.add(version)
        return found


async def test_a_lost_volume_fails_no_call_and_is_filled_again_by_the_job(site: Site) -> None:
    """Running servers hold what they have loaded. One that restarts meanwhile waits for the models, not for a hand."""
    cluster = site.cluster
    volume = cluster.claim("model-repository")
    async with under_load(cluster, site.authority):
        shutil.rmtree(volume)
        volume.mkdir()
        new, going = await cluster.evict("triton-cpu")
        await new.until_crashed(within=120)
        assert not new.is_ready
        await cluster.run_job("publish-models")
        await new.until_ready(60, may_crash=True)
        await going
    assert await versions(new) == {"1"}


async def test_a_new_version_is_published_and_taken_in_without_a_failed_call(site: Site) -> None:
    """The image's next tag has it: its Job puts it beside the old one, and a restart takes it in, pod by pod."""
    cluster, model = site.cluster, site.image["/models"] / INT8
    shutil.copytree(model / "1", model / "2")
    before = [*cluster.pods["triton-cpu"]]
    async with under_load(cluster, site.authority):
        job = await cluster.run_job("publish-models")
        assert job.log.splitlines() == [f"published {INT8}/2"]
        assert [await versions(pod) for pod in before] == [{"1"}] * len(before), "they hold what they loaded"
        old = await cluster.roll("triton-cpu", cluster.objects)
    assert old == before
    assert [pod.exit_code for pod in old] == [0] * len(old)
    assert [await versions(pod) for pod in cluster.pods["triton-cpu"]] == [{"2"}] * len(before)
