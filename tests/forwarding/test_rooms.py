"""Servers are asked how long their queues are, before anybody has filled them."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.admission import AdmissionSettings, Gates
from gateway.forwarding.admission.rooms import Rooms
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Route, Routes, Split
from gateway.status import Code
from gateway.types import Variant
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

KEY = ("gpu", "net")


class Triton:
    """Says what its queue is; or fails, as told."""

    def __init__(self, queued: int) -> None:
        self.queued = queued
        self.fails = False
        self.asked = 0

    async def unary(self, path: str, body: bytes, metadata: Any, timeout: float | None) -> Answer:
        self.asked += 1
        if self.fails:
            raise CallFailed(Code.UNAVAILABLE, "gone")
        told = pb.ModelConfigResponse()
        told.config.dynamic_batching.default_queue_policy.max_queue_size = self.queued
        told.config.instance_group.add(count=1)
        return Answer(told.SerializeToString(), (), ())


class World:
    """The model `net`, at one upstream."""

    def __init__(self, *tritons: Triton) -> None:
        self.endpoints = [Endpoint("gpu", f"t:{n}", triton) for n, triton in enumerate(tritons)]
        for endpoint in self.endpoints:
            endpoint.state = State.READY
        variants = (Variant("v", "gpu", "net"),)
        routes = Routes([Route("m", variants, Split((("v", 1),)))])
        self.gates = Gates(lambda seconds, act: None)
        self.current = CurrentTopology(Topology(routes, {"gpu": Pool("gpu", self.endpoints)}))
        self.rooms = Rooms(self.current, self.gates)

    async def limit(self) -> int | None:
        await self.rooms.ask()
        gate = self.gates.table.get(KEY)
        return None if gate is None else gate.limit


async def test_a_limit_is_what_all_endpoints_can_do_together_and_follows_them() -> None:
    world = World(Triton(8), Triton(8))
    assert await world.limit() == 2
    world.endpoints[0].state = State.DOWN
    assert await world.limit() == 1
    world.endpoints[1].state = State.DOWN
    assert await world.limit() == 1  # nobody can be asked


async def test_there_is_none_where_one_queue_has_no_bound_or_one_server_does_not_say() -> None:
    assert await World(Triton(8), Triton(0)).limit() is None
    silent = Triton(8)
    silent.fails = True
    assert await World(Triton(8), silent).limit() is None


async def test_nobody_is_asked_where_the_config_has_a_limit() -> None:
    triton = Triton(8)
    world = World(triton)
    world.gates.apply(AdmissionSettings({KEY: 5}), 0.0)
    assert await world.limit() == 5
    assert triton.asked == 0


async def test_a_model_that_the_config_no_longer_has_is_forgotten() -> None:
    world = World(Triton(8))
    assert await world.limit() == 1
    world.current.now = Topology(Routes([]), world.current.now.pools)
    assert await world.limit() is None


async def test_a_model_whose_queue_has_no_bound_is_not_limited_for_what_it_says_of_itself() -> None:
    world = World(Triton(0))
    world.gates.overloaded(*KEY, 4, 0.0)  # before it was asked
    assert KEY in world.gates.table
    assert await world.limit() is None
    world.gates.overloaded(*KEY, 4, 0.0)
    assert KEY not in world.gates.table
    bounded = World(Triton(8), Triton(0))
    await bounded.limit()
    bounded.gates.overloaded(*KEY, 4, 0.0)
    assert KEY in bounded.gates.table
