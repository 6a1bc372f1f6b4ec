"""Changes of servers: which wait for which, for how long, and what is heard of it. Real ones: tests/integration."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.api.control import RPCS, Control, ControlLimits, ControlPolicy
from gateway.errors import DeadlineExceeded, UpstreamFailed
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Routes
from gateway.status import Code, Origin
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool

LOAD, UNLOAD, STATUS = "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus"


@dataclass
class Server:
    """Loads a model only once it may; a caller's time runs out as on a real connection."""

    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[str] = field(default_factory=list)

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        method = path.rpartition("/")[2]
        self.asked.append(method)
        if method == LOAD:
            self.begun.set()
            try:
                await asyncio.wait_for(self.may_load.wait(), timeout)
            except (TimeoutError, asyncio.TimeoutError):
                raise CallFailed(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", origin=Origin.GIVEN_UP) from None
        return Answer(b"", (), ())


class World:
    """Two upstreams of one server each."""

    def __init__(self, limits: ControlLimits | None = None) -> None:
        self.servers = {"a": Server(), "b": Server()}
        untyped: Any = self.servers  # they do only what is asked of them here
        pools = {name: Pool(name, [Endpoint(name, f"{name}:1", server)]) for name, server in untyped.items()}
        topology = CurrentTopology(Topology(Routes([]), pools))
        self.control = Control(topology, ControlPolicy.ALL, limits)

    async def call(self, method: str, upstream: str, remaining: float | None = 20, **fields: Any) -> Any:
        request, metadata = RPCS[method].request(**fields), (("gateway-upstream", upstream),)
        return await self.control.call(method, request, metadata=metadata, peer="unix:", remaining=remaining)

    async def begin_load(self) -> asyncio.Task[Any]:
        """Of `m1` on `a`; it goes on until the server may load."""
        task = asyncio.ensure_future(self.call(LOAD, "a", model_name="m1"))
        await self.servers["a"].begun.wait()
        return task


async def test_a_load_that_does_not_end_stops_neither_reads_nor_other_servers_changes() -> None:
    world = World()
    loading = await world.begin_load()
    loading.cancel()  # its caller goes away, and it goes on
    await asyncio.gather(loading, return_exceptions=True)
    await world.call(STATUS, "a")
    await world.call(STATUS, "b")
    await world.call("LogSettings", "a")  # without settings it only asks
    await world.call(UNLOAD, "b", model_name="m2")
    await world.control.aclose()


async def test_who_waits_in_vain_hears_what_for_and_nothing_is_changed() -> None:
    world = World()
    loading = await world.begin_load()
    with pytest.raises(DeadlineExceeded, match="RepositoryModelLoad of 'm1' on a"):
        await world.call(UNLOAD, "a", remaining=0.05, model_name="m1")
    assert UNLOAD not in world.servers["a"].asked
    world.servers["a"].may_load.set()
    await loading
    await world.call(UNLOAD, "a", model_name="m1")


async def test_changes_of_one_server_keep_their_order_also_if_one_that_waits_gives_up() -> None:
    world = World()
    loading = await world.begin_load()
    gives_up = asyncio.ensure_future(world.call(UNLOAD, "a", model_name="m1"))
    last = asyncio.ensure_future(world.call("LogSettings", "a", settings={"x": pb.LogSettingsRequest.SettingValue()}))
    await asyncio.sleep(0)
    gives_up.cancel()
    await asyncio.gather(gives_up, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert world.servers["a"].asked[-1] == LOAD
    world.servers["a"].may_load.set()
    await asyncio.gather(loading, last)
    asked = world.servers["a"].asked
    assert UNLOAD not in asked
    assert asked.index(LOAD) < asked.index("LogSettings")


async def test_a_change_has_an_upper_bound_and_a_slow_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    world = World(ControlLimits(longest=0.1, slow=0.01))
    with caplog.at_level(logging.WARNING), pytest.raises(UpstreamFailed, match=r"did not end within 0.1 s") as raised:
        await world.call(LOAD, "a", model_name="m1")
    assert raised.value.code is Code.DEADLINE_EXCEEDED
    assert "RepositoryModelLoad of 'm1' on a" in caplog.text
    await world.call(UNLOAD, "a", model_name="m1")


async def test_the_end_waits_for_a_change_a_while_and_then_gives_it_up(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    loading = await world.begin_load()
    await world.control.finish(0.01)
    assert not loading.done()
    await world.control.aclose()
    await asyncio.gather(loading, return_exceptions=True)
    assert "is cancelled, since the gateway stops" in caplog.text
