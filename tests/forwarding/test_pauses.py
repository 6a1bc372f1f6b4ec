"""What a server says of when to ask it again, and how often its variant failed, delays that variant and no other."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from test_call import World
from test_fallback_reasons import TwoVariants, trailers

from gateway.forwarding.admission import AdmissionSettings
from gateway.rpc.client import ClientCall
from gateway.status import Code, Origin
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


def refuse(world: World, pushback: bytes) -> None:
    """By the server that was asked last."""
    client = world.connection.sent[-1]
    client.trailing = ((b"grpc-retry-pushback-ms", pushback),)
    client.end(Code.RESOURCE_EXHAUSTED, "full", Origin.SERVER)


def with_peer(world: World) -> Endpoint:
    """Its first upstream gets another endpoint."""
    peer = Endpoint("u", "t:9", world.connection)
    peer.state = State.READY
    now = world.inference.current.now
    world.inference.current.now = replace(now, pools={**now.pools, "u": Pool("u", [world.endpoint, peer])})
    return peer


def sent(world: World) -> list[ClientCall]:
    return world.connection.sent


@pytest.mark.parametrize("pushback", [b"50000", b"-1", b"never"])
async def test_a_fallback_waits_for_nothing_that_another_variant_says(pushback: bytes) -> None:
    world = TwoVariants()
    world.begin()
    refuse(world, pushback)
    assert len(sent(world)) == 2
    world.answer_last()
    assert trailers(world) == (b"cpu", b"gpu", b"overloaded")


async def test_a_server_that_wants_no_other_attempt_leaves_its_peers_alone_too() -> None:
    """What it says is of its service, as in gRFC A6."""
    world = TwoVariants()
    with_peer(world)
    world.begin()
    refuse(world, b"-1")
    world.answer_last()
    assert trailers(world)[0] == b"cpu"


async def test_without_a_fallback_a_pause_that_is_too_long_ends_the_call() -> None:
    world = World()
    with_peer(world)
    world.caller.deadline = world.inference.clock() + 10.0
    world.begin()
    refuse(world, b"20000")
    assert world.caller.ends == [Code.RESOURCE_EXHAUSTED]
    assert len(sent(world)) == 1


async def test_a_retry_waits_and_goes_to_the_endpoint_that_is_best_by_then() -> None:
    world = World()
    peer, third = with_peer(world), Endpoint("u", "t:10", world.connection)
    third.state = State.READY
    now = world.inference.current.now
    world.inference.current.now = replace(now, pools={"u": Pool("u", [world.endpoint, peer, third])})
    world.begin()
    first = next(each for each in (world.endpoint, peer, third) if each.in_flight)
    refuse(world, b"30")
    assert len(sent(world)) == 1
    others = [each for each in (world.endpoint, peer, third) if each is not first]
    others[0].state = State.DOWN
    await asyncio.sleep(0.1)
    assert len(sent(world)) == 2
    assert others[1].in_flight == 1
    world.end()
    assert world.caller.ends == [Code.OK]
    assert world.caller.trailing[b"gateway-attempts"] == b"2"


async def test_a_retry_whose_endpoints_go_down_in_its_pause_goes_to_the_fallback() -> None:
    world = TwoVariants()
    peer = with_peer(world)
    world.begin()
    refuse(world, b"30")
    world.endpoint.state = peer.state = State.DOWN
    await asyncio.sleep(0.1)
    world.answer_last()
    assert trailers(world) == (b"cpu", b"gpu", b"overloaded")
    assert world.caller.trailing[b"gateway-attempts"] == b"2"


async def test_a_retry_takes_its_turn_after_its_pause() -> None:
    world = World()
    with_peer(world)
    world.inference.gates.apply(AdmissionSettings({("u", "net"): 1}), world.inference.clock())
    gate = world.inference.gates.table["u", "net"]
    world.begin()
    refuse(world, b"30")
    assert gate.in_flight == 0  # a pause keeps no place from others
    world.begin()
    await asyncio.sleep(0.1)
    assert len(sent(world)) == 2  # the other one has the place
    sent(world)[1].end(Code.INTERNAL, "", Origin.SERVER)
    assert len(sent(world)) == 3
    world.end()
    assert gate.in_flight == 0
    assert world.caller.ends == [Code.INTERNAL, Code.OK]


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
async def test_a_call_that_is_given_up_in_its_pause_is_not_sent_again(code: Code) -> None:
    world = World()
    peer = with_peer(world)
    call = world.begin()
    refuse(world, b"30")
    call.cancelled(code)
    await asyncio.sleep(0.1)
    assert len(sent(world)) == 1
    assert world.endpoint.in_flight + peer.in_flight == 0
    assert world.hooks.ended == 1
