"""Input that fails at one variant only, at a real Triton: that is its sender's affair alone, however quiet it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from traffic import OK, config, gateway, write
from v2_calls import Metadata, call, channel_to, infer

from gateway.access.api_keys import hash_of
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

VARIANTS = {"new": {"upstream": "main", "model": "faulty"}, "old": {"upstream": "main", "model": "add_one_a"}}
KEYS = {name: f"igk_{name}-{'0' * 40}" for name in ("eve", "ann")}
ACCESS: dict[str, Any] = {
    "api_keys": [{"caller": name, "sha256": hash_of(key).hex()} for name, key in KEYS.items()],
    "grants": [{"callers": list(KEYS), "models": ["*"]}],
}
BAD = [[]]  # a row without numbers, on which `faulty` throws; `add_one_a` adds one to none of them


def by_name(name: str) -> Metadata:
    return [("authorization", f"Bearer {KEYS[name]}")]


def by_user(name: str) -> Metadata:
    return [("x-user", name)]


@pytest.mark.parametrize("who", [by_name, by_user])
async def test_the_variant_stays_with_those_whose_calls_go_well_there(
    triton: LocalTriton, tmp_path: Path, who: Any
) -> None:
    """Who sends it gets his answers from the fallback after some seconds, and others come when they like."""
    adder: dict[str, Any] = {"variants": VARIANTS}
    more: dict[str, Any] = {"access": ACCESS}
    if who is by_user:
        adder.update({"split": {"new": 100, "old": 0}, "sticky": {"metadata": "x-user"}})
        more = {}
    bad, good = infer("adder", BAD), infer("adder", [[1.0, 2.0]])
    file = write(tmp_path / "g.yaml", config({"main": triton.grpc_address}, {"adder": adder}, **more))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        assert (await call(channel, good, metadata=who("ann"))).trailers["gateway-variant"] == "new"
        await asyncio.sleep(1.1)  # it is quiet: nothing has gone well for a second
        outcomes = [await call(channel, bad, metadata=who("eve")) for _ in range(60)]
        assert outcomes[0].code is grpc.StatusCode.INTERNAL
        assert [each.code for each in outcomes[-20:]] == [OK] * 20
        assert {each.trailers["gateway-variant"] for each in outcomes[-20:]} == {"old"}

        endpoint = running._topology.now.pools["main"].endpoints[0]
        assert endpoint.has_ejections  # for her
        for _ in range(10):
            outcome = await call(channel, good, metadata=who("ann"))
            assert (outcome.code, outcome.trailers.get("gateway-variant")) == (OK, "new"), outcome
