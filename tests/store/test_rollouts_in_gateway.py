"""Rollouts in running gateways: steps, rollbacks under load, restarts, several replicas, a database that goes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from played_triton import PlayedTriton, fails_at_once, played
from traffic import OK, Traffic, config, gateway, traffic, until, write
from v2_calls import infer

from gateway.app import Gateway

STEPS = [{"share": "20%", "soak": "1s", "units": 0}, {"share": "50%", "soak": "1s", "units": 0}]
ERRORS = {"kind": "ratio", "better": "lower", "measure": "error", "worse_by": 0.05}


def plan(old: str, new: str, url: str, *, model: dict[str, Any] | None = None, **rollout: Any) -> dict[str, Any]:
    """A config with a rollout from one Triton's model to another's."""
    variants = {"old": {"upstream": "a", "model": "net"}, "new": {"upstream": "b", "model": "net"}}
    moves = {"name": "spring", "from": "old", "to": "new", "steps": STEPS, **rollout}
    net = {"variants": variants, "sticky": {"metadata": "x-user"}, **(model or {}), "rollout": moves}
    return config({"a": old, "b": new}, {"net": net}, store={"url": url, "unit_key": "a key that nobody guesses"})


@contextlib.asynccontextmanager
async def tritons() -> AsyncIterator[tuple[PlayedTriton, PlayedTriton]]:
    async with played() as old, played() as new:
        yield old, new


@contextlib.asynccontextmanager
async def load(running: Gateway, users: int = 400, **more: Any) -> AsyncIterator[Traffic]:
    """Calls of many units, while it lasts."""
    async with traffic(
        running.listen, infer("net"), metadata=lambda number: [("x-user", f"user {number % users}")], **more
    ) as calls:
        yield calls


def state(running: Gateway) -> Any:
    (found,) = running._rollouts.now()
    return found


async def until_it_is(running: Gateway, phase: str, within: float = 30.0) -> Any:
    await until(lambda: state(running).phase == phase, within, phase, lambda: str(state(running)))
    return state(running)


async def test_a_good_variant_goes_through_its_steps_to_all_units_and_stays_there(tmp_path: Path, url: str) -> None:
    async with tritons() as (old, new):
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url))
        async with gateway(file) as running, load(running) as calls:
            found = await until_it_is(running, "promoted")
            assert [share for _, _, share, _ in found.history] == [0.2, 0.5, 1.0]
            await asyncio.sleep(0.1)
            assert {each.variant for each in await calls.more(50)} == {"new"}
        async with gateway(file) as running, load(running) as again:
            assert {each.variant for each in await again.more(50)} == {"new"}  # from the first call on
        assert not calls.failed, calls.why()


async def test_a_variant_that_fails_every_call_is_taken_back_and_nobody_fails_after_that(
    tmp_path: Path, url: str
) -> None:
    async with tritons() as (old, new):
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url))
        new.behaviour = fails_at_once
        async with gateway(file) as running, load(running) as calls:
            found = await until_it_is(running, "rolled back")
            decided = time.monotonic()
            assert "'new' is broken" in found.reason
            assert await calls.more(100)
            late = [each for each in calls.since(decided + 0.5) if each.code is not OK]
            assert not late, late
        assert {each.code for each in calls.failed} == {grpc.StatusCode.INTERNAL}
        async with gateway(file) as running, load(running) as again:
            assert {each.variant for each in await again.more(50)} == {"old"}  # it stays ended
            assert state(running).phase == "rolled back"
