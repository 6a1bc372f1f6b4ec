"""A bandit in running gateways: reported rewards move the shares, units stay where they are, the report weighs them."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from played_triton import played
from replicas import replicas
from test_in_gateway import KEY, SPRING, VARIANTS, ask, bought, serving, tell
from traffic import config, http, write
from v2_calls import channel_to

from gateway.app import Gateway
from gateway.cli import main
from gateway.experiments.records import Exposure
from gateway.store.epochs import EpochStore

RATES = {"a": 0.2, "b": 0.8}  # at which units are rewarded: no luck turns that around


def plan(address: str, url: str, *, epoch: str = "1s", epochs: int = 4) -> dict[str, Any]:
    bandit = {"epoch": epoch, "epochs": epochs}
    outcomes = {"bought": SPRING["outcomes"]["bought"]}
    spring = {**SPRING, "outcomes": outcomes, "secondary": [], "window": "2s", "bandit": bandit}
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
        """So many new ones, who report within the window."""
        users = [f"user {self._calls + number}" for number in range(count)]
        self._calls += count
        for some in (users[begin : begin + 50] for begin in range(0, count, 50)):
            arms = await asyncio.gather(*(ask(self._channel, user) for user in some))
            self.arms.update(zip(some, arms, strict=True))
            rewards = [self._draw.random() < RATES[arm] for arm in arms]
            reports = [bought(user, unit=user, value=value) for user, value in zip(some, rewards, strict=True)]
            await tell(self._channel, *reports)


async def test_reported_rewards_move_the_shares_and_no_unit_that_takes_part(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        serving(tmp_path, url, plan, epoch="2s", epochs=3) as (running, file),
        channel_to(running.listen) as channel,
    ):
        first = await until_epoch(running.admin_address, lambda found: found["epoch"] >= 1)
        assert first["history"][0]["shares"] == {"a": 0.5, "b": 0.5}
        users = Users(channel)
        await users.come(750)
        assert set(users.arms.values()) == {"a", "b"}
        while (last := await bandit_of(running.admin_address))["epoch"] < 3:
            await users.come(10)
            await asyncio.sleep(0.2)
        assert last["shares"]["b"] == pytest.approx(0.95, abs=0.01), last
        assert last["history"][-1]["units"] > 200
        users.arms.clear()
        await users.come(300)
        assert await moved(channel, users.arms) == []
        exposures, shares = await asyncio.to_thread(stored, url)
        assert {(each.epoch, each.propensity) for each in exposures} <= {
            (number, share) for number, of in enumerate(shares) for share in of.values()
        }
        await shown(running, file, capsys)


async def shown(running: Gateway, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What people and machines are told of it."""

    async def said(*words: str) -> str:
        assert await asyncio.to_thread(main, [*words, "--config", str(file)]) == 0
        return capsys.readouterr().out

    page = file.parent / "report.html"
    report = await said("experiment", "report", "spring", "--html", str(page))
    assert "spring, after " in report
    assert "'b' is better." in report
    assert "A bandit after 3 epochs" in report
    assert "sample ratio as planned" in report
    assert "Shares of arms by epoch" in page.read_text()
    told = json.loads(await said("experiment", "report", "spring", "--json"))
    assert (told["answer"], len(told["epochs"])) == ("treatment", 3)
    assert told["primary"][0]["low"] < RATES["b"] - RATES["a"] < told["primary"][0]["high"]
    assert "a bandit in epoch 3 of 3: a 0.05" in await said("experiment", "list")
    metrics = (await http(running.admin_address, "/metrics"))[1].splitlines()
    assert any(line.startswith('gateway_experiment_share{arm="b",experiment="spring"} 0.9') for line in metrics)
    assert 'gateway_experiment_epoch{experiment="spring"} 3.0' in metrics
    words = ["explain", str(file), "--model", "net", "--metadata", "x-user=anna", "--admin", running.admin_address]
    assert await asyncio.to_thread(main, words) == 0
    text = capsys.readouterr().out
    assert "experiment spring is a bandit in epoch 3 of 3, by " in text
    assert ", those of epoch " in text or "is to come" in text
    assert "a bandit in epoch 3 of 3, whose units have shares a 0.05" in text


def stored(url: str) -> tuple[list[Exposure], list[Mapping[str, float]]]:
    store = EpochStore(url, KEY)
    try:
        return store.exposures("spring"), [each.shares for each in store.epochs(["spring"])["spring"].so_far]
    finally:
        store.close()


async def moved(channel: grpc.aio.Channel, arms: Mapping[str, str]) -> list[str]:
    """Users who have another arm now."""
    found = await asyncio.gather(*(ask(channel, user) for user in arms))
    return [user for user, arm in zip(arms, found, strict=True) if arms[user] != arm]


async def until_written(url: str) -> None:
    """Until the store has what has come, and has had it for a moment."""
    seen, end = -1, time.monotonic() + 60
    while seen != (seen := len((await asyncio.to_thread(stored, url))[0])) or seen < 200:
        assert time.monotonic() < end, seen
        await asyncio.sleep(1.5)


def later(url: str, seconds: float) -> None:
    """Let so much time pass since all that is in the store."""
    with sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30.0) as database:
        for table, column in (("bandit_epoch", "since"), ("exposure", "at"), ("outcome", "at")):
            database.execute(f"UPDATE {table} SET {column} = {column} - ?", (seconds,))


async def test_two_gateways_agree_on_every_unit_also_when_who_decides_is_stopped_and_after_a_restart(
    tmp_path: Path, url: str
) -> None:
    async with played() as triton:
        told = plan(triton.address, url, epoch="1h", epochs=2)
        async with replicas(tmp_path, told) as found:
            for each in found:
                await until_epoch(each.admin, lambda bandit: bandit["epoch"] >= 1)
            leaders = [each for each in found if (await bandit_of(each.admin))["decides"]]
            assert len(leaders) == 1
            (other,) = [each for each in found if each not in leaders]
            async with channel_to(other.listen) as there:
                users = Users(there)
                await users.come(500)
                await until_written(url)
                leaders[0].process.signal(signal.SIGSTOP)
                try:
                    later(url, 3_600.0)
                    await until_epoch(other.admin, lambda bandit: bandit["epoch"] == 2)
                finally:
                    leaders[0].process.signal(signal.SIGCONT)
                await until_epoch(leaders[0].admin, lambda bandit: bandit["epoch"] == 2)
                states = [await bandit_of(each.admin) for each in found]
                assert states[0]["history"] == states[1]["history"]
                assert states[0]["shares"]["b"] > 0.9
                users.arms.clear()
                await users.come(200)
                async with channel_to(leaders[0].listen) as here:
                    assert await moved(here, users.arms) == []
            history = states[0]["history"]
        async with replicas(tmp_path, told, (1,)) as found, channel_to(found[0].listen) as channel:
            state = await until_epoch(found[0].admin, lambda bandit: bandit["epoch"] == 2)
            assert state["history"] == history
            assert await moved(channel, users.arms) == []


async def test_while_the_store_is_away_from_the_start_all_units_have_the_baseline(tmp_path: Path) -> None:
    async with serving(tmp_path, "postgresql://gateway@127.0.0.1:9/none", plan) as (running, _):
        async with channel_to(running.listen) as channel:
            assert {await ask(channel, f"user {number}") for number in range(20)} == {"a"}
        found = await until_epoch(running.admin_address, lambda bandit: bandit["trouble"])
        assert (found["epoch"], found["trouble"].startswith("the store is away")) == (0, True)
        state = (await http(running.admin_address, "/state"))[1]
        assert state["experiments"][0]["exposures"] == 0


def test_explain_makes_no_store_and_says_what_units_have_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "gateway.yaml", plan("127.0.0.1:9", f"sqlite:///{tmp_path}/none.db"))
    assert main(["explain", str(file), "--model", "net", "--metadata", "x-user=anna"]) == 0
    told = capsys.readouterr().out
    assert f"experiment spring: there is no store at {tmp_path}/none.db" in told
    assert "waiting:spring: variant a, the baseline: the epoch of 'anna' is to come, 0 of 4 have begun" in told
    assert not (tmp_path / "none.db").exists()
