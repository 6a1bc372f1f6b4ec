"""The GPU overlay's own config, from a pool without a GPU server to one with a plan: one list, first what is fastest.

The pool's Triton here computes on CPUs, so models for GPUs can't load in it, as they are; where a step needs one that
has loaded, the same model with KIND_CPU stands in. What chooses and what loads is all the real thing: the gateway, the
overlay's config, Triton with its two repositories, and the script that runs beside it in the pod.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from real_models import CHECKOUT, REPOSITORY
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.models.releases import DEPLOYED
from gateway.triton import LocalTriton

KUBERNETES = CHECKOUT / "deploy" / "kubernetes"
LOADER = KUBERNETES / "components" / "triton-gpu" / "load_later.py"
CUDA, ENGINE, PLAN = "efficientnet_lite0_onnx_cuda", "efficientnet_lite0_onnx_trt", "efficientnet_lite0_tensorrt"
WANTED = "graph-b1-8-16"
pytestmark = pytest.mark.integration


def lay_out_model(target: Path, name: str, *, on_cpu: bool) -> None:
    """A model of the repository; with `on_cpu` one that the local Triton can run, under the name of the other."""
    target.mkdir(parents=True)
    source = REPOSITORY / ("efficientnet_lite0_onnx" if on_cpu else name)
    config = (source / "config.pbtxt").read_text()
    (target / "config.pbtxt").write_text(config.replace(f'name: "{source.name}"', f'name: "{name}"'))
    shutil.copy(source / "labels.txt", target)
    (target / "1").symlink_to(source / "1")


def overlay_config(folder: Path, gpu: str, cpu: str) -> Path:
    """deploy/kubernetes/overlays/gpu/config/gateway.yaml with this host's addresses and without TLS."""
    config = yaml.safe_load((KUBERNETES / "overlays/gpu/config/gateway.yaml").read_text())
    del config["server"]["tls"]
    config["upstreams"]["gpu"] = {"endpoints": [gpu], "probe_interval": "200ms"}
    config["upstreams"]["cpu"]["endpoints"] = [cpu]
    del config["models"]["photo-labels"]
    config |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}}
    (folder / "gateway.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "gateway.yaml"


async def who_answers(gateway: Gateway) -> str:
    """The variant that answers a call for one picture."""
    request = pb.ModelInferRequest(model_name="imagenet")
    tensor = request.inputs.add(name="image", datatype="FP32", shape=[1, 3, 224, 224])
    assert tensor.name
    request.raw_input_contents.append(np.zeros((1, 3, 224, 224), np.float32).tobytes())
    async with channel_to(gateway.listen) as channel:
        stub = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        answering = stub(request, timeout=20)
        await answering
        told = {**dict(await answering.initial_metadata()), **dict(await answering.trailing_metadata())}
    return str(told["gateway-variant"])


async def until_answered_by(gateway: Gateway, variant: str, seconds: float = 120) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while (answered := await who_answers(gateway)) != variant:
        assert asyncio.get_running_loop().time() < end, f"{answered} answers"
        await asyncio.sleep(0.2)


@asynccontextmanager
async def loader(folder: Path, triton: LocalTriton, **environ: str) -> AsyncIterator[list[str]]:
    """load_later.py beside a Triton, in a container with an L4 and the deployed TensorRT; what it says."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 8.9\n")
    smi.chmod(0o755)
    variables = {
        "PATH": f"{smi.parent}:{os.environ['PATH']}",
        "TRITON_HTTP": triton.http_address,
        "TRT_VERSION": f"{DEPLOYED.tensorrt}.2+cuda13.4",
        "OWN_REPOSITORY": str(folder / "own"),
        **environ,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(LOADER), env=variables, stderr=asyncio.subprocess.PIPE
    )
    said: list[str] = []

    async def listen() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            said.append(line.decode().strip())

    listening = asyncio.create_task(listen())
    try:
        yield said
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await listening


async def test_a_gpu_pod_answers_at_once_and_better_as_what_is_built_appears(
    real_triton: LocalTriton, tmp_path: Path
) -> None:
    for name in ("own", "plans", "models"):
        (tmp_path / name).mkdir()
    lay_out_model(tmp_path / "models" / CUDA, CUDA, on_cpu=True)
    lay_out_model(tmp_path / "models" / ENGINE, ENGINE, on_cpu=False)  # as it is: it can't load where there is no GPU
    pool = LocalTriton(
        tmp_path / "models", models=[CUDA], extra=[f"--model-repository={tmp_path / 'own'}", "--strict-readiness=false"]
    )
    pool._settle_ports()  # its address is known before it runs
    async with gateway_of(load(overlay_config(tmp_path, pool.grpc_address, real_triton.grpc_address), {})) as gateway:
        assert await who_answers(gateway) == "int8", "no GPU server: the CPU pool answers"
        async with (
            pool,
            loader(
                tmp_path, pool, LOAD_LATER=ENGINE, PLANS=str(tmp_path / "plans"), PLANS_WANTED=f"{PLAN}={WANTED}"
            ) as said,
        ):
            await until_answered_by(gateway, "onnx-cuda")
            await wait_for(said, f"{ENGINE}: not loaded: ")
            others = (
                f"{WANTED}-cc8.0-trt{DEPLOYED.tensorrt}",
                f"{WANTED}-cc8.9-trt10.5.0",
                f"old-cc8.9-trt{DEPLOYED.tensorrt}",
            )
            for identity in (*others, f".{WANTED}-cc8.9-trt{DEPLOYED.tensorrt}"):
                lay_out_model(tmp_path / "plans" / PLAN / identity, PLAN, on_cpu=True)
            await asyncio.sleep(5)
            assert await who_answers(gateway) == "onnx-cuda", (
                "plans of other GPUs, releases and graphs are not this pod's"
            )
            assert not list((tmp_path / "own").iterdir())
            half = tmp_path / "plans" / PLAN / f".{WANTED}-cc8.9-trt{DEPLOYED.tensorrt}"
            half.rename(half.with_name(half.name[1:]))
            await until_answered_by(gateway, "tensorrt")
            assert f"load-later: {PLAN}: loaded" in said
        await until_answered_by(gateway, "int8")


async def wait_for(said: list[str], text: str) -> None:
    end = asyncio.get_running_loop().time() + 120
    while not any(text in line for line in said):
        assert asyncio.get_running_loop().time() < end, said
        await asyncio.sleep(0.1)
