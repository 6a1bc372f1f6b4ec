"""Endpoints follow the config: what stays is kept as it is, what goes is let go of gently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from patience import wait_until
from scripted import ScriptedConnection

from gateway.upstream import fleet as fleet_module
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.fleet import Fleet, UpstreamSettings
from gateway.upstream.health import ProbeSettings
from gateway.upstream.pool import Pool

SELDOM = ProbeSettings(interval=3600)


class Network:
    """Remembers every connection that was dialled."""

    def __init__(self) -> None:
        self.dialled: list[ScriptedConnection] = []
        self.broken = {"unusable"}

    def dial(self, address: str) -> ScriptedConnection:
        if address in self.broken:
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
    await fleet.wait_first_probes(60)
    assert {name: [e.address for e in pool.endpoints] for name, pool in pools.items()} == {
        "main": ["a", "b"],
        "other": ["c"],
    }
    assert {endpoint.address for endpoint in changed} == {"a", "b", "c"}
    assert all(endpoint.state is State.READY for endpoint in changed)


async def test_an_endpoint_that_stays_keeps_its_connection_state_and_calls(fleet: Fleet, network: Network) -> None:
    before = fleet.apply({"main": network.upstream("a", "b")})["main"]
    await fleet.wait_first_probes(60)
    before.endpoints[0].in_flight += 1
    after = fleet.apply({"main": network.upstream("c", "a", models=("m", "n"))})["main"]
    assert after.endpoints[1] is before.endpoints[0]
    assert (after.endpoints[1].state, after.endpoints[1].in_flight) == (State.READY, 1)
    assert network.addresses == ["a", "b", "c"]
    after.endpoints[1].in_flight -= 1


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
        await fleet.wait_first_probes(60)
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
    endpoint.in_flight += 1
    fleet.apply({"main": network.upstream("b")})
    await asyncio.sleep(0.01)
    assert network.open == ["a", "b"]
    endpoint.in_flight -= 1
    await wait_until(lambda: network.open == ["b"])
    assert not endpoint.can_serve("m", "")


async def test_leaving_closes_everything_at_once_even_what_lingers(network: Network) -> None:
    async with Fleet(lambda _: None) as fleet:
        endpoint = fleet.apply({"main": network.upstream("a", "b")})["main"].endpoints[0]
        endpoint.in_flight += 1
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
    await fleet.wait_first_probes(60)
    (connection,) = network.dialled
    asked = len(connection.asked)
    connection.fault("too many small frames")
    assert (endpoint.state, endpoint.reason) == (State.SUSPECT, "too many small frames")
    await wait_until(lambda: endpoint.state is State.READY)
    assert len(connection.asked) > asked


# A subset of an upstream's endpoints

ALL = tuple(f"{letter}:1" for letter in "abcdefgh")


def some_of(network: Network, *addresses: str) -> UpstreamSettings:
    return replace(network.upstream(*addresses), subset=2)


@pytest.fixture
async def frugal(changed: list[Endpoint]) -> AsyncIterator[Fleet]:
    async with Fleet(changed.append, place=0.5, keep=10.0) as running:
        yield running


def reached(pool: Pool, address: str) -> Endpoint:
    found = pool.in_order([address]).maybe_pick("m", "")
    assert found is not None
    return found


async def test_only_the_subset_is_dialled_and_probed(frugal: Fleet, network: Network, changed: list[Endpoint]) -> None:
    pool = frugal.apply({"main": some_of(network, *ALL)})["main"]
    await frugal.wait_first_probes(60)
    inside = [endpoint.address for endpoint in pool.endpoints]
    assert len(inside) == 2
    assert sorted(network.addresses) == sorted(inside) == sorted(endpoint.address for endpoint in changed)
    assert tuple(pool.addresses) == ALL


async def test_what_a_sequence_needs_is_dialled_once_and_kept_until_it_is_not_needed(
    network: Network, changed: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_LINGER_SECONDS", 0.0)
    left: list[str] = []
    async with Fleet(changed.append, lambda endpoint: left.append(endpoint.address), place=0.5, keep=10.0) as fleet:
        pool = fleet.apply({"main": some_of(network, *ALL)})["main"]
        address = next(each for each in ALL if each not in network.addresses)
        endpoint = reached(pool, address)
        assert reached(pool, address) is endpoint
        assert network.addresses.count(address) == 1
        assert fleet.outside("main") == [endpoint]
        await fleet.wait_first_probes(60)
        assert endpoint.state is State.READY
        now = endpoint.needed_at
        fleet._release(now + 9)
        endpoint.in_flight += 1
        fleet._release(now + 11)
        endpoint.in_flight -= 1
        assert fleet.outside("main") == [endpoint]
        fleet._release(now + 11)
        assert (fleet.outside("main"), left) == ([], [address])
        await wait_until(lambda: address not in network.open)
        assert reached(pool, address) is not endpoint


async def test_who_leaves_the_subset_stays_as_long_as_a_sequence_needs_it(frugal: Fleet, network: Network) -> None:
    """And is the same endpoint still when it is in it again."""
    before = frugal.apply({"main": some_of(network, *ALL)})["main"].endpoints
    for endpoint in before:
        endpoint.needed_at = 100.0
    others = [address for address in ALL if address not in {endpoint.address for endpoint in before}]
    few = frugal.apply({"main": replace(some_of(network, *ALL), endpoints=(*others, before[0].address))})["main"]
    assert before[0] in (*few.endpoints, *frugal.outside("main"))
    assert before[1] not in (*few.endpoints, *frugal.outside("main"))  # it is no longer listed
    assert set(frugal.apply({"main": network.upstream(*ALL)})["main"].endpoints) > {before[0]}
    assert frugal.outside("main") == []


async def test_an_endpoint_that_can_not_be_dialled_is_passed_over(frugal: Fleet, network: Network) -> None:
    settings = some_of(network, *ALL)
    pool = frugal.apply({"main": settings})["main"]
    outside = [address for address in ALL if address not in network.addresses]
    network.broken.add(outside[0])
    found = pool.in_order(outside).maybe_pick("m", "")
    assert found is not None
    assert found.address == outside[1]


async def test_a_sequence_is_looked_for_in_few_places_whatever_is_only_in_doubt(
    frugal: Fleet, network: Network
) -> None:
    pool = frugal.apply({"main": some_of(network, *ALL)})["main"]
    first = reached(pool, ALL[0])
    first.suspect("a call failed")
    places = pool.in_order(ALL)
    tried: list[Endpoint] = []
    while (found := places.maybe_pick("m", "", tried)) is not None:
        tried.append(found)
    assert [endpoint.address for endpoint in tried] == list(ALL[:3])
    first.state = State.DOWN
    assert places.maybe_pick("m", "") is tried[1]


async def test_a_subset_of_all_is_an_upstream_like_any(frugal: Fleet, network: Network) -> None:
    pool = frugal.apply({"main": some_of(network, "a", "b")})["main"]
    assert type(pool) is Pool
    assert [endpoint.address for endpoint in pool.endpoints] == ["a", "b"]


async def test_what_nobody_needs_is_let_go_without_being_asked_to(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_RELEASE_SECONDS", 0.01)
    let_go = asyncio.Event()
    async with Fleet(lambda _: None, lambda _: let_go.set(), keep=0.0) as fleet:
        pool = fleet.apply({"main": some_of(network, *ALL)})["main"]
        reached(pool, next(each for each in ALL if each not in network.addresses))
        await asyncio.wait_for(let_go.wait(), 30)
        assert fleet.outside("main") == []
        assert len(pool.endpoints) == 2
