"""How a config comes into force."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Config, Loaded
from gateway.entrance import Entrance
from gateway.event_log import EventLog
from gateway.forwarding.admission import Gates
from gateway.forwarding.checks import Checks
from gateway.forwarding.hedging import Hedges
from gateway.forwarding.shadowing import Shadows
from gateway.forwarding.sharing import Shares
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import ConfigChanged, NoHooks
from gateway.quotas import Quotas
from gateway.routing import Routes
from gateway.rpc.budget import Budget
from gateway.takeover import Takeover
from gateway.telemetry.capture import Captures
from gateway.telemetry.disagreements import Disagreements
from gateway.upstream.discovery import Discovery
from gateway.upstream.fleet import Fleet

UNUSED: Any = None
NOBODY = "127.0.0.1:9"


def config(*models: str, ca: str = "") -> Loaded:
    upstream: dict[str, Any] = {"endpoints": [NOBODY]}
    if ca:
        upstream["tls"] = {"ca": ca}
    variants = {"only": {"upstream": "u", "model": "net"}}
    values = {"upstreams": {"u": upstream}, "models": {name: {"variants": variants} for name in models}}
    return Loaded(Config.model_validate(values), "gateway.yaml", "0123456789abcdef")


class World(NoHooks):
    """What a takeover needs, without a server and a Triton."""

    def __init__(self, fleet: Fleet, discovery: Discovery) -> None:
        self.topology = CurrentTopology(Topology(Routes(), {}))
        self.changes = 0
        self.in_force: list[ConfigChanged] = []
        self.takeover = Takeover(
            self.topology,
            fleet,
            discovery,
            threads=Threads(1, 1),
            captures=Captures("0"),
            gates=Gates(),
            quotas=Quotas(),
            shared_quotas=None,
            shares=Shares(),
            hedges=Hedges(),
            checks=Checks(),
            shadows=Shadows(self.topology, Gates()),
            disagreements=Disagreements("0"),
            events=EventLog(self),
            pipeline=UNUSED,
            collected=Budget(1 << 20, "answers"),
            entrance=Entrance(lambda why: None),
            changed=self.changed,
        )

    def changed(self) -> None:
        self.changes += 1

    def config_changed(self, event: ConfigChanged) -> None:
        self.in_force.append(event)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with Fleet(lambda endpoint: None) as fleet, Discovery(lambda: None) as discovery:
        yield World(fleet, discovery)


async def test_a_config_takes_the_place_of_another_in_one_step(world: World) -> None:
    await world.takeover.begin(config("a"))
    before = world.topology.now
    await world.takeover.follow(config("a", "b"), ())
    after = world.topology.now
    assert (list(before.routes.public), list(after.routes.public)) == (["a"], ["a", "b"])
    assert after.pools["u"].endpoints == before.pools["u"].endpoints  # with what is known of them
    assert (len(world.in_force), world.changes) == (2, 2)


async def test_a_config_that_cannot_be_taken_over_leaves_everything_as_it_was(world: World, tmp_path: Path) -> None:
    await world.takeover.begin(config("a"))
    before = world.topology.now
    with pytest.raises(OSError, match="gone"):
        await world.takeover.follow(config("b", ca=str(tmp_path / "gone.pem")), ())
    assert world.topology.now is before
    assert (len(world.in_force), world.changes) == (1, 1)


async def test_new_addresses_make_new_pools_and_leave_all_else(world: World) -> None:
    await world.takeover.begin(config("a"))
    before = world.topology.now
    world.takeover.addresses_changed()
    assert world.topology.now.routes is before.routes
    assert world.topology.now.pools["u"] is not before.pools["u"]
    await asyncio.sleep(0)
    assert world.changes == 2
