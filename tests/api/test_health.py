"""`grpc.health.v1` as clients see it, over a real server and channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateways import running
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.api.catalogue import Catalogue
from gateway.api.health import HealthService
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.process.notifier import Changes
from gateway.routing import Route, Routes, Split
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

UNUSED: Any = None
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@dataclass
class World:
    """One public model, `adder`, on one endpoint; everything that can change."""

    changes: Changes = field(default_factory=Changes)
    endpoint: Endpoint = field(default_factory=lambda: Endpoint("main", "a:1", UNUSED))
    is_ready: bool = True

    def __post_init__(self) -> None:
        self.endpoint.state = State.READY
        self.current = CurrentTopology(self.topology("adder"))
        self.service = HealthService(
            Catalogue(self.current), self.changes, lambda: self.is_ready, ["inference.GRPCInferenceService"]
        )

    def topology(self, *models: str) -> Topology:
        variant = Variant("v", "main", "add_one")
        routes = [Route(model, (variant,), Split.all_to("v")) for model in models]
        return Topology(Routes(routes), {"main": Pool("main", [self.endpoint])})

    def set(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)
        self.changes.notify()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def stub(world: World) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(world.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


def asked(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def check(stub: Any, service: str) -> int:
    return int((await stub.Check(asked(service))).status)


async def read(watch: Any) -> int:
    return int((await asyncio.wait_for(watch.read(), 60)).status)


@pytest.mark.parametrize("name", ["", "inference.GRPCInferenceService", "adder", "add_one"])
async def test_the_server_its_services_and_models_can_be_asked_for(stub: Any, name: str) -> None:
    assert await check(stub, name) == SERVING


async def test_an_unknown_name_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="'other' is no service and no public model") as caught:
        await check(stub, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_without_an_endpoint_is_not_serving_and_the_server_is(stub: Any, world: World) -> None:
    world.endpoint.state = State.DOWN
    assert (await check(stub, ""), await check(stub, "adder")) == (SERVING, NOT_SERVING)


async def test_nothing_serves_while_the_server_is_not_ready(stub: Any, world: World) -> None:
    world.is_ready = False
    assert (await check(stub, ""), await check(stub, "adder")) == (NOT_SERVING, NOT_SERVING)


async def test_a_watch_tells_the_state_at_once_and_then_each_change(stub: Any, world: World) -> None:
    watch = stub.Watch(asked("adder"))
    assert await read(watch) == SERVING
    world.endpoint.state = State.DOWN
    world.changes.notify()
    assert await read(watch) == NOT_SERVING
    world.endpoint.state = State.READY
    world.changes.notify()
    assert await read(watch) == SERVING
    watch.cancel()


async def test_a_watch_repeats_nothing_when_something_else_changed(stub: Any, world: World) -> None:
    watch = stub.Watch(asked("adder"))
    assert await read(watch) == SERVING
    for _ in range(3):
        world.changes.notify()
        await asyncio.sleep(0.005)
    world.set(is_ready=False)
    assert await read(watch) == NOT_SERVING
    watch.cancel()


@pytest.mark.parametrize(("size", "extra"), [(1025, b""), (60_000, b""), (1, b"\x12\x80\x08" + bytes(1024))])
async def test_a_watch_keeps_no_large_request(stub: Any, size: int, extra: bytes) -> None:
    large = health_pb2.HealthCheckRequest.FromString(asked("x" * size).SerializeToString() + extra)
    for call in (stub.Check(large), stub.Watch(large).read()):
        with pytest.raises(grpc.aio.AioRpcError, match="A name has at most 1024 bytes") as caught:
            await asyncio.wait_for(call, 60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    watch = stub.Watch(asked("x" * 1024))
    assert await read(watch) == SERVICE_UNKNOWN
    watch.cancel()


async def test_an_unknown_name_can_be_watched_until_a_config_has_it(stub: Any, world: World) -> None:
    watch = stub.Watch(asked("later"))
    assert await read(watch) == SERVICE_UNKNOWN
    world.current.now = world.topology("adder", "later")
    world.changes.notify()
    assert await read(watch) == SERVING
    world.current.now = world.topology("adder")
    world.changes.notify()
    assert await read(watch) == SERVICE_UNKNOWN
    watch.cancel()


async def test_closing_tells_each_watch_the_last_state_and_ends_it(stub: Any, world: World) -> None:
    """Else every open Watch would hold up a drain to its very end."""
    watches = [stub.Watch(asked(name)) for name in ("", "adder")]
    assert [await read(watch) for watch in watches] == [SERVING, SERVING]
    world.set(is_ready=False)
    world.service.close()
    for watch in watches:
        assert await read(watch) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(watch.read(), 60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_open_watch_hears_of_a_drain_and_does_not_hold_it_up(tmp_path: Path) -> None:
    settings = "server: {drain: 200s}"
    async with running(tmp_path, settings) as gateway, grpc.aio.insecure_channel(gateway.listen) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(asked("adder"))
        assert await read(watch) == NOT_SERVING
        await asyncio.wait_for(gateway.drain(), 60)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(watch.read(), 60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
