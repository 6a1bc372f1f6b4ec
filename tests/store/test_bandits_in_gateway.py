"""A bandit in running gateways: reported rewards move the shares, units stay where they are, the report weighs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from command_line import Command, command, free_address
from played_triton import played
from test_in_gateway import SPRING, VARIANTS, ask, bought, tell
from traffic import config, gateway, http, write
from v2_calls import channel_to

from gateway.app import Gateway
from gateway.cli import main
from gateway.store.epochs import EpochStore

KEY = "a key that nobody guesses"
RATES = {"a": 0.2, "b": 0.8}  # at which units are rewarded: no luck turns that around


def plan(address: str, url: str, *, epoch: str = "1s", epochs: int = 4) -> dict[str, Any]:
    bandit = {"epoch": epoch, "epochs": epochs}
    outcomes = {"bought": SPRING["outcomes"]["bought"]}
    spring = {**SPRING, "outcomes": outcomes, "secondary": [], "window": "1s", "bandit": bandit}
    models = {"net": {"variants": VARIANTS, "sticky": {"metadata": "x-user"}}}
    return config({"main": address}, models, experiments={"spring": spring}, store={"url": url, "unit_key": KEY})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bandits.db"


async def bandit_of(admin: str) -> dict[str, Any]:
    found = (await http(admin, "/state"))[1]["experiments"]
    return dict(found[0]["bandit"]) if found else {"epoch": 0, "shares": {}, "trouble": "", "decides": False}


async def until_epoch(admin: str, wanted: Callable[[dict[str, Any]], bool], within: float = 60.0) -> dict[str, Any]:
    end = time.monotonic() + within
    while not wanted(found := await bandit_of(admin)):
        assert time.monotonic() < end, found
        await asyncio.sleep(0.1)
    return found


class Users:
    """They call, and some of them are glad of the answer."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._draw = random.Random(5)
        self._calls = 0
        self.arms: dict[str, str] = {}

    async def come(self, count: int) -> None:
        """So many new ones."""
        reports = []
        for _ in range(count):
            user = f"user {self._calls}"
            self._calls += 1
            self.arms[user] = await ask(self._channel, user)
            reports.append(bought(user, unit=user, value=self._draw.random() < RATES[self.arms[user]]))
        assert await tell(self._channel, *reports)


@contextlib.asynccontextmanager
async def serving(folder: Path, url: str, **more: Any) -> AsyncIterator[tuple[Gateway, Path]]:
    async with played() as triton:
        file = write(folder / "gateway.yaml", plan(triton.address, url, **more))
        async with gateway(file) as running:
            yield running, file


async def test_reported_rewards_move_the_shares_and_no_unit_that_takes_part(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path, url, epoch="2s") as (running, file), channel_to(running.listen) as channel:
        first = await until_epoch(running.admin_address, lambda found: found["epoch"] >= 1)
        assert first["history"][0]["shares"] == {"a": 0.5, "b": 0.5}
        users = Users(channel)
        await users.come(900)
        taking_part = {user: await ask(channel, user) for user in users.arms}
        last = await until_epoch(running.admin_address, lambda found: found["epoch"] == 4)
        assert last["shares"]["b"] == pytest.approx(0.95, abs=0.01), last
        await users.come(300)
        assert {await ask(channel, user) for user, arm in taking_part.items() if arm == "b"} == {"b"}
