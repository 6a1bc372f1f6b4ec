"""Endpoints follow the config: what stays is kept as it is, what goes is let go of gently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from scripted import ScriptedConnection

from gateway.upstream import fleet as fleet_module
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.fleet import Fleet, UpstreamSettings
from gateway.upstream.health import ProbeSettings

SELDOM = ProbeSettings(interval=3600)


class Network:
    """Remembers every connection that was dialled."""

    def __init__(self) -> None:
        self.dialled: list[ScriptedConnection] = []

    def dial(self, address: str) -> ScriptedConnection:
        if address == "unusable":
            raise OSError("no such certificate")
        connection = ScriptedConnection(address)
        self.dialled.append(connection)
        return connection

    def upstream(self, *addresses: str, models: tuple[str, ...] = ("m",), identity: object = None) -> UpstreamSettings:
        watched = tuple((model, "") for model in models)
        return UpstreamSettings(addresses, watched, SELDOM, self.dial, identity)

    @property
    def addresses(self) -> list[str]:
        return [connection.address for connection in self.dialled]

    @property
    def open(self) -> list[str]:
        return [connection.address for connection in self.dialled if not connection.closed]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def changed() -> list[Endpoint]:
    return []


@pytest.fixture
async def fleet(changed: list[Endpoint]) -> AsyncIterator[Fleet]:
    async with Fleet(changed.append) as running:
        yield running


async def test_every_endpoint_is_probed_and_its_change_told(
    fleet: Fleet, network: Network, changed: list[Endpoint]
) -> None:
    pools = fleet.apply({"main": network.upstream("a", "b"), "other": network.upstream("c")})
    await fleet.wait_first_probes(5)
    assert {name: [e.address for e in pool.endpoints] for name, pool in pools.items()} == {
        "main": ["a", "b"],
        "other": ["c"],
    }
    assert {endpoint.address for endpoint in changed} == {"a", "b", "c"}
    assert all(endpoint.state is State.READY for endpoint in changed)


async def test_an_endpoint_that_stays_keeps_its_connection_state_and_calls(fleet: Fleet, network: Network) -> None:
    before = fleet.apply({"main": network.upstream("a", "b")})["main"]
    await fleet.wait_first_probes(5)
    before.endpoints[0].begin()
    after = fleet.apply({"main": network.upstream("c", "a", models=("m", "n"))})["main"]
    assert after.endpoints[1] is before.endpoints[0]
    assert (after.endpoints[1].state, after.endpoints[1].in_flight) == (State.READY, 1)
    assert network.addresses == ["a", "b", "c"]
    after.endpoints[1].end()


async def test_an_endpoint_whose_certificate_changed_is_dialled_anew(fleet: Fleet, network: Network) -> None:
    before = fleet.apply({"main": network.upstream("a", identity="old")})["main"]
    after = fleet.apply({"main": network.upstream("a", identity="new")})["main"]
    assert after.endpoints[0] is not before.endpoints[0]
    assert network.addresses == ["a", "a"]


async def test_one_address_in_two_upstreams_is_two_endpoints(fleet: Fleet, network: Network) -> None:
    pools = fleet.apply({"main": network.upstream("a"), "other": network.upstream("a")})
    assert pools["main"].endpoints[0] is not pools["other"].endpoints[0]


async def test_an_endpoint_that_is_no_longer_wanted_is_told_once_and_one_that_is_dialled_anew_is_not(
    network: Network, changed: list[Endpoint]
) -> None:
    left: list[str] = []
    async with Fleet(changed.append, lambda endpoint: left.append(endpoint.address)) as fleet:
        fleet.apply({"main": network.upstream("a", "b", identity="old")})
        fleet.apply({"main": network.upstream("b", identity="new")})
        fleet.apply({"main": network.upstream("b", identity="new")})
        assert left == ["a"]
        await fleet.wait_first_probes(5)
        assert {endpoint.address for endpoint in changed} == {"b"}  # nothing more is heard of the other


async def test_a_dial_that_fails_changes_nothing(fleet: Fleet, network: Network) -> None:
    before = fleet.apply({"main": network.upstream("a")})["main"]
    with pytest.raises(OSError, match="no such certificate"):
        fleet.apply({"main": network.upstream("b", "unusable")})
    assert fleet.apply({"main": network.upstream("a")})["main"].endpoints[0] is before.endpoints[0]
    assert "a" in network.open


async def test_a_removed_endpoint_is_closed_once_its_calls_have_ended(
    fleet: Fleet, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_LINGER_SECONDS", 0.0)
    endpoint = fleet.apply({"main": network.upstream("a", "b")})["main"].endpoints[0]
    endpoint.begin()
    fleet.apply({"main": network.upstream("b")})
    await asyncio.sleep(0.01)
    assert network.open == ["a", "b"]
    endpoint.end()
    await asyncio.sleep(0.01)
    assert network.open == ["b"]
    assert not endpoint.can_serve("m", "")


async def test_leaving_closes_everything_at_once_even_what_lingers(network: Network) -> None:
    async with Fleet(lambda _: None) as fleet:
        endpoint = fleet.apply({"main": network.upstream("a", "b")})["main"].endpoints[0]
        endpoint.begin()
        fleet.apply({"main": network.upstream("b")})
    assert network.open == []


async def test_waiting_for_first_probes_gives_up_in_time(fleet: Fleet, network: Network) -> None:
    pools = fleet.apply({"main": network.upstream("a")})
    await fleet.wait_first_probes(0)
    assert pools["main"].endpoints[0].state is State.UNPROBED


async def test_an_endpoint_whose_connection_is_cut_for_its_faults_is_in_doubt_and_asked_soon(
    fleet: Fleet, network: Network
) -> None:
    """Whoever's call it was, and even if it was nobody's any more."""
    (endpoint,) = fleet.apply({"u": network.upstream("a:1")})["u"].endpoints
    await fleet.wait_first_probes(5)
    (connection,) = network.dialled
    asked = len(connection.asked)
    connection.fault("too many small frames")
    assert (endpoint.state, endpoint.reason) == (State.SUSPECT, "too many small frames")
    for _ in range(500):
        if endpoint.state is State.READY:
            break
        await asyncio.sleep(0.01)
    assert endpoint.state is State.READY
    assert len(connection.asked) > asked
