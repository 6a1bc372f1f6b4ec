"""A rolling update played on processes: callers notice nothing, whichever way they find the pods.

What Kubernetes does is played as it does it: a new pod is listed once it is ready; an old one gets SIGTERM at once, and
those who list it hear of its end only a while later; established connections stay where they are. Callers are
grpcio's own channels, which reconnect by themselves and repeat nothing that a server has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from balancing import Service
from command_line import free_address
from tritonclient.grpc import service_pb2 as pb

from gateway.triton import LocalTriton

INFER = "/inference.GRPCInferenceService/ModelInfer"
REMOVAL_DELAY = 0.6  # seconds from SIGTERM until callers have heard of it; a second or two in a cluster
DRAIN_DELAY = 4.0  # of the config: much more than that, as a machine may stand still for some seconds
MILLISECONDS = 300  # that the slow calls take, so that some are in flight at every end

CONFIG = """
listen: 127.0.0.1:1
admin: {{listen: "127.0.0.1:2"}}
server: {{drain_delay: {drain_delay}s, drain: 200s}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{triton: {{endpoints: [{endpoints}]}}}}
models:
  adder: {{variants: {{only: {{upstream: triton, model: add_one_a}}}}}}
  slow: {{variants: {{only: {{upstream: triton, model: slow}}}}}}
"""


def request(model: str) -> bytes:
    message = pb.ModelInferRequest(model_name=model)
    value = np.array([[MILLISECONDS]], np.int32 if model == "slow" else np.float32)
    message.inputs.add(name="IN", datatype="INT32" if model == "slow" else "FP32", shape=[1, 1])
    message.raw_input_contents.append(value.tobytes())
    return bytes(message.SerializeToString())


@dataclass
class Pod:
    """One gateway process."""

    address: str
    admin: str
    process: asyncio.subprocess.Process
    errors: Path

    async def is_ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"http://{self.admin}/readyz") as answer:
                return answer.status == 200
        return False

    async def until(self, ready: bool) -> None:
        end = time.monotonic() + 120
        while await self.is_ready() is not ready:
            assert time.monotonic() < end, self.errors.read_text()
            await asyncio.sleep(0.05)


@dataclass
class Callers:
    """Calls that go on until told otherwise, and how they ended."""

    ended: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    going: bool = True

    async def call(self, channel: grpc.aio.Channel, model: str) -> None:
        try:
            answer = pb.ModelInferResponse.FromString(await channel.unary_unary(INFER)(request(model), timeout=60))
            assert answer.model_name == model
        except grpc.aio.AioRpcError as error:
            self.failures[f"{model}: {error.code().name}: {error.details()}"] += 1
        self.ended += 1

    async def through(self, address: str, model: str) -> None:
        """A caller that knows one address."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            while self.going:
                await self.call(channel, model)
                await asyncio.sleep(0.015)

    async def among(self, service: Service, model: str) -> None:
        """A caller that balances its calls over what it was told of the pods, as gRPC's round_robin does."""
        async with contextlib.AsyncExitStack() as exits:
            channels: dict[str, grpc.aio.Channel] = {}
            while self.going:
                address = service.pick()
                if address not in channels:
                    channels[address] = await exits.enter_async_context(grpc.aio.insecure_channel(address))
                await self.call(channels[address], model)
                await asyncio.sleep(0.015)


@contextlib.asynccontextmanager
async def callers(service: Service) -> AsyncIterator[Callers]:
    made = Callers()
    tasks = [
        *(asyncio.ensure_future(made.through(service.address, "adder")) for _ in range(3)),
        *(asyncio.ensure_future(made.among(service, "adder")) for _ in range(2)),
        asyncio.ensure_future(made.through(service.address, "slow")),
    ]
    try:
        yield made
    finally:
        made.going = False
        await asyncio.gather(*tasks)


Start = Callable[[], Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[[Sequence[str]], Any]]:
    """Starts gateways in front of these Tritons; they are killed at the end if they still run."""
    pods: list[Pod] = []

    async def begin(endpoints: Sequence[str]) -> Pod:
        config, errors = tmp_path / "gateway.yaml", tmp_path / f"{len(pods)}.err"
        config.write_text(CONFIG.format(drain_delay=DRAIN_DELAY, endpoints=", ".join(endpoints)))
        address, admin = free_address(), free_address()
        command = ["serve", "--config", str(config), "--listen", address, "--admin-listen", admin]
        with errors.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", *command, stderr=stderr)
        pods.append(Pod(address, admin, process, errors))
        return pods[-1]

    yield begin
    for pod in pods:
        if pod.process.returncode is None:
            pod.process.kill()
        await pod.process.wait()


async def retire(pod: Pod, service: Service) -> float:
    """End a pod as Kubernetes does: SIGTERM and removal begin together, the latter takes its time. Answers how long."""
    began = time.monotonic()
    pod.process.send_signal(signal.SIGTERM)
    await pod.until(ready=False)
    await asyncio.sleep(REMOVAL_DELAY - (time.monotonic() - began))
    service.listed.remove(pod.address)
    assert await asyncio.wait_for(pod.process.wait(), DRAIN_DELAY + 100) == 0, pod.errors.read_text()
    return time.monotonic() - began


async def test_no_call_fails_while_every_gateway_is_replaced(
    triton: LocalTriton, start: Callable[[Sequence[str]], Any]
) -> None:
    old = [await start([triton.grpc_address]) for _ in range(3)]
    for pod in old:
        await pod.until(ready=True)
    service = Service([pod.address for pod in old])
    async with service.listening(), callers(service) as made:
        retiring = []
        for pod in old:  # maxSurge 1, maxUnavailable 0
            new = await start([triton.grpc_address])
            await new.until(ready=True)
            service.listed.append(new.address)
            before = made.ended
            retiring.append(asyncio.ensure_future(retire(pod, service)))
        took = await asyncio.gather(*retiring)
        assert not set(service.listed) & {pod.address for pod in old}
        assert made.ended > before
    assert not made.failures, made.failures
    assert made.ended > 200
    assert all(each >= DRAIN_DELAY for each in took), took


async def test_no_call_fails_while_a_triton_drains_and_comes_back(
    triton: LocalTriton, triton_factory: Any, start: Callable[[Sequence[str]], Any]
) -> None:
    """The worst case: SIGTERM comes while gateways still send, so Triton's own refusals are met and taken elsewhere."""
    other = await triton_factory(["add_one_a", "slow"])
    pod = await start([triton.grpc_address, other.grpc_address])
    await pod.until(ready=True)
    service = Service([pod.address])
    async with service.listening(), callers(service) as made:
        await asyncio.sleep(1)
        os.kill(other.pid, signal.SIGTERM)
        await asyncio.wait_for(other.wait_closed(), 120)
        await other.start()
        at_the_end, end = made.ended, time.monotonic() + 60
        while made.ended <= at_the_end + 20:
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
    assert not made.failures, made.failures
