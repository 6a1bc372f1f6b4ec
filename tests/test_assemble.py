"""From a config to the rooms' own values."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.assemble import collected_of, memory_of, shared_of, upstreams_of
from gateway.config import Config
from gateway.upstream.channel import MOST_WITH_TWO, ChannelConnection


def test_a_renewed_certificate_makes_new_connections_and_nothing_else_does(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"

    def identity(interval: str = "1s") -> object:
        upstream = {"endpoints": ["triton:8001"], "tls": {"ca": str(authority)}, "probe_interval": interval}
        config = Config.model_validate({"upstreams": {"one": upstream}, "direct": {"models": "all"}})
        return upstreams_of(config)["one"].identity

    authority.write_text("old")
    before = identity()
    assert identity("2s") == before
    authority.write_text("new")
    assert identity() != before


@pytest.mark.parametrize(
    ("memory", "workers", "collected"),
    [(32, 1, 16), (1024, 1, 256), (1024, 2, 128), (2048, 1, 512), (4096, 1, 512)],
    ids=["little", "a container", "two workers", "more", "much"],
)
def test_budgets_follow_the_memory_and_leave_some(memory: int, workers: int, collected: int) -> None:
    config = Config.model_validate({"upstreams": {"u": {"endpoints": ["t:1"]}}, "direct": {"models": "all"}})
    config = config.model_copy(update={"workers": workers})
    assert collected_of(config, lambda: memory << 20) == collected << 20
    pictures = memory_of(config, lambda: memory << 20)
    if memory >= 512:
        assert workers * (pictures + pictures // 2 + (collected << 20)) <= (memory << 20) * 0.8


@pytest.mark.parametrize(
    ("shared", "mib"),
    [("off", 0), ("auto", 32), ({}, 64), ({"bytes": "16MiB"}, 32)],
    ids=["off", "auto", "all", "less"],
)
def test_memory_that_is_shared_with_servers_is_nobody_elses(shared: object, mib: int) -> None:
    upstream = {"endpoints": ["127.0.0.1:8001", "triton-1:8001"], "shared_memory": shared}
    config = Config.model_validate({"upstreams": {"u": upstream}, "direct": {"models": "all"}})
    plain = Config.model_validate({"upstreams": {"u": {"endpoints": ["t:1"]}}, "direct": {"models": "all"}})
    for budget in (collected_of, memory_of):
        assert budget(config, lambda: 1 << 30) == budget(plain, lambda: (1 << 30) - (mib << 20))
        assert budget(config, lambda: 32 << 20) >= budget(plain, lambda: 16 << 20)


@pytest.mark.parametrize("shared", ["auto", {}], ids=["auto", "all"])
def test_a_name_has_memory_for_one_endpoint_however_many_it_stands_for(shared: object) -> None:
    upstream = {"endpoints": ["dns:///localhost:8001", "127.0.0.1:8002"], "shared_memory": shared}
    content = {"upstreams": {"u": upstream}, "direct": {"models": "all"}, "workers": 2}
    config = Config.model_validate(content)
    assert shared_of(config) == 64 << 20
    found = upstreams_of(config, lambda name: [f"127.0.0.{number}:8001" for number in range(1, 9)])["u"]
    assert len(found.endpoints) == 9
    assert found.memory is not None
    assert (found.memory.size, found.memory.most) == (16 << 20, 32 << 20)


@pytest.mark.parametrize(("endpoints", "connections"), [(1, 2), (MOST_WITH_TWO, 2), (MOST_WITH_TWO + 1, 1)])
async def test_an_endpoint_of_a_large_pool_gets_one_connection(endpoints: int, connections: int) -> None:
    upstream = {"endpoints": [f"triton-{number}:8001" for number in range(endpoints)]}
    config = Config.model_validate({"upstreams": {"u": upstream}, "direct": {"models": "all"}})
    dialled = upstreams_of(config)["u"].dial("triton-0:8001")
    assert isinstance(dialled, ChannelConnection)
    assert dialled.options.connections == connections
    await dialled.aclose()
