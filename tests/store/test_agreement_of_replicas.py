"""Two and four gateways on one PostgreSQL agree about a rollout and a bandit, whatever becomes of them and of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from played_triton import PlayedTriton, fails_at_once, played
from postgres import Postgres
from replicas import Replica, replicas
from test_rollouts_in_gateway import plan, post
from traffic import http, until, write
from v2_calls import call, infer

from gateway.cli import main
from gateway.store.database import Store
from gateway.v1 import outcomes_pb2 as pb
from gateway.v1.outcomes_pb2_grpc import OutcomeServiceStub

IS_SOAK = "SOAK_SECONDS" in os.environ
COUNTS = (2, 4) if IS_SOAK else (2,)
KEY = "a key that nobody guesses"  # as the rollouts' config has it
WAITED_SECONDS = 120.0  # at most, for what must come
UNITS = 1000
CALLERS = 3  # at each replica
RATES = {"a": 0.2, "b": 0.6}  # at which users of the bandit are rewarded


def told(old: PlayedTriton, new: PlayedTriton, url: str) -> dict[str, Any]:
    """A rollout that people move, and a bandit with an epoch each three seconds."""
    retry = {"retry": {"on": ["server"]}}  # so that a caller never sees that the new variant fails
    steps = [{"share": share, "soak": "1h", "units": 0} for share in ("25%", "50%", "75%")]
    made = plan(old.address, new.address, url, model=retry, steps=steps)
    arms = {name: {"upstream": "a", "model": name} for name in RATES}
    made["models"]["talk"] = {"variants": arms, "sticky": {"metadata": "x-user"}}
    made["experiments"] = {
        "greeting": {
            "model": "talk",
            "arms": {"a": 1, "b": 1},
            "outcomes": {"bought": {"kind": "binary", "better": "higher"}},
            "primary": "bought",
            "smallest_effect": "5%",
            "window": "1s",
            "bandit": {"epoch": "3s", "epochs": 30},
        }
    }
    return made


@dataclass
class Follower:
    """What one replica says that is decided, from the moment on that it is asked."""

    replica: Replica
    woken: float = 0.0  # when it could say so again, in Unix time
    said: dict[str, tuple[float, ...]] = field(default_factory=dict)  # when each was decided, as Unix time
    lags: list[float] = field(default_factory=list)  # seconds until it said so, of what was decided meanwhile
    state: dict[str, Any] = field(default_factory=dict)

    async def follow(self) -> None:
        while True:
            self.state = dict((await http(self.replica.admin, "/state"))[1])
            now = time.time()
            for what, shown in (("spring", self.rollout), ("greeting", self.bandit)):
                decided = tuple(each["at"] for each in shown["history"]) if shown else ()
                before = self.said.get(what)
                if before is not None:
                    assert decided[: len(before)] == before, (what, before, decided)  # nothing is undone
                    self.lags += [now - max(at, self.woken) for at in decided[len(before) :]]
                self.said[what] = decided
            await asyncio.sleep(0.1)

    @property
    def rollout(self) -> dict[str, Any]:
        return dict((self.state.get("rollouts") or [{}])[0])

    @property
    def bandit(self) -> dict[str, Any]:
        return dict((self.state.get("experiments") or [{"bandit": {}}])[0]["bandit"])

    def decides(self, what: str) -> bool:
        return bool((self.rollout if what == "spring" else self.bandit).get("decides"))


class Users:
    """They come back, now to one replica and now to another, and some are glad of an answer."""

    def __init__(self, found: Sequence[Replica]) -> None:
        self._channels = [grpc.aio.insecure_channel(each.listen) for each in found]
        self._reports: list[list[pb.Outcome]] = [[] for _ in found]  # that wait to be sent
        self._numbers = itertools.count()
        self._draw = random.Random(7)
        self.calls: Counter[str] = Counter()  # by model and variant
        self.failed: list[str] = []
        self.longest = 0.0  # seconds

    async def call(self, replica: int) -> None:
        """On until it is cancelled."""
        while True:
            number = next(self._numbers)
            model, user = ("net", "talk")[number % 2], f"user {number // 2 % UNITS}"
            began = time.monotonic()
            answer = await call(self._channels[replica], infer(model), metadata=[("x-user", user)], timeout=120)
            self.longest = max(self.longest, time.monotonic() - began)
            if answer.code is not grpc.StatusCode.OK:
                self.failed.append(f"{model}: {answer.code.name}: {answer.text}")
                continue
            variant = answer.trailers["gateway-variant"]
            self.calls[f"{model} {variant}"] += 1
            if variant in RATES:
                glad = self._draw.random() < RATES[variant]
                self._reports[replica].append(pb.Outcome(unit=user, name="bought", binary=glad, report_id=user))
            await asyncio.sleep(0.02)

    async def report(self, replica: int) -> None:
        """Likewise."""
        stub = OutcomeServiceStub(self._channels[replica])
        while True:
            outcomes, self._reports[replica] = self._reports[replica], []
            await stub.Report(pb.ReportRequest(outcomes=outcomes), timeout=120)
            await asyncio.sleep(0.3)

    async def aclose(self) -> None:
        for each in self._channels:
            await each.close()


class Group:
    """All replicas, what each says, and users who call throughout."""

    def __init__(self, found: Sequence[Replica], users: Users) -> None:
        self.followers = [Follower(each) for each in found]
        self.users = users
        self.tasks = [asyncio.ensure_future(each.follow()) for each in self.followers]
        for number in range(len(found)):
            self.tasks += [asyncio.ensure_future(users.call(number)) for _ in range(CALLERS)]
            self.tasks.append(asyncio.ensure_future(users.report(number)))

    def holds(self, wanted: Callable[[Follower], bool], of: Sequence[Follower] = ()) -> bool:
        for task in self.tasks:
            if task.done():
                task.result()
        return all(each.state and wanted(each) for each in of or self.followers)

    async def until(self, what: str, wanted: Callable[[Follower], bool], of: Sequence[Follower] = ()) -> None:
        tell = lambda: [(each.rollout, each.bandit, each.replica.process.errors[-500:]) for each in self.followers]  # noqa: E731
        await until(lambda: self.holds(wanted, of), WAITED_SECONDS, what, tell)

    @contextlib.contextmanager
    def stopped(self, follower: Follower) -> Iterator[list[Follower]]:
        """It makes no step until the block ends. The others."""
        process = follower.replica.process
        process.signal(signal.SIGSTOP)
        try:
            yield [each for each in self.followers if each is not follower]
        finally:
            follower.woken = time.time()
            process.signal(signal.SIGCONT)

    async def leader(self, what: str) -> Follower:
        """Once there is one."""
        leaders = lambda: [each for each in self.followers if each.decides(what)]  # noqa: E731
        await until(lambda: len(leaders()) == 1, WAITED_SECONDS, "one leads")
        return leaders()[0]


@contextlib.asynccontextmanager
async def group(folder: Path, config: dict[str, Any], count: int) -> AsyncIterator[Group]:
    async with replicas(folder, config, [1] * count) as found:
        users = Users(found)
        made = Group(found, users)
        try:
            yield made
        finally:
            for task in made.tasks:
                task.cancel()
            await asyncio.wait(made.tasks)
            await users.aclose()


def at(share: float, state: str) -> Callable[[Follower], bool]:
    return lambda each: (each.rollout.get("share"), each.rollout.get("state")) == (share, state)


def after_epoch(number: int) -> Callable[[Follower], bool]:
    return lambda each: int(each.bandit.get("epoch", 0)) > number


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
async def test_replicas_agree_while_leaders_are_stopped_and_the_database_restarts(
    tmp_path: Path, postgres: Postgres, count: int
) -> None:
    postgres.empty()
    async with played() as old, played() as new:
        config = told(old, new, postgres.url)
        file = write(tmp_path / "gateway.yaml", config)

        async def do(*words: str) -> None:
            assert await asyncio.to_thread(main, ["rollout", *words, "spring", "--config", str(file)]) == 0

        async with group(tmp_path, config, count) as them:
            await them.until("both have begun", lambda each: at(0.25, "running")(each) and after_epoch(0)(each))
            await a_leader_is_stopped(them, "spring", 0.5, do)
            await a_leader_is_stopped(them, "greeting", 0.75, do)
            await the_database_restarts(them, postgres, do)
            await a_broken_variant_is_taken_back_while_its_leader_is_stopped(them, new)
            await asyncio.sleep(2.0)  # in which a leader that woke up could undo it
            await them.until("it stays back", at(0.0, "rolled back"))
            assert len({tuple(each.said["spring"]) for each in them.followers}) == 1
            lags, users = [lag for each in them.followers for lag in each.lags], them.users
        assert users.failed == []
        assert {"net old", "net new", "talk a", "talk b"} <= set(users.calls)
        print(
            f"{count} replicas, {users.calls.total()} calls, none failed, the longest took {users.longest:.1f} s; "
            f"{len(lags)} times a replica followed a decision, after {statistics.median(lags):.2f} s in the median, "
            f"{max(lags):.2f} s at most"
        )
        units = await asyncio.to_thread(arms_of_units, postgres.url)
        assert len(units) > 20
        assert {len(arms) for arms in units.values()} == {1}  # nobody was moved, whichever replica he came to
        async with group(tmp_path, config, count) as them:  # after a restart of everything
            await them.until("it is as it was", at(0.0, "rolled back"))
            assert not them.users.calls["net new"]


async def a_leader_is_stopped(them: Group, what: str, share: float, do: Callable[..., Awaitable[None]]) -> None:
    """Meanwhile others decide, and follow what people decide."""
    leader = await them.leader(what)
    with them.stopped(leader) as others:
        epoch = max(int(each.bandit["epoch"]) for each in others)
        await do("promote")
        await them.until("people are followed", at(share, "running"), others)
        await them.until("an epoch has begun", after_epoch(epoch), others)
        await until(lambda: any(each.decides(what) for each in others), WAITED_SECONDS, "another one leads")
    await them.until("it has followed", lambda each: at(share, "running")(each) and after_epoch(epoch)(each))


async def the_database_restarts(them: Group, postgres: Postgres, do: Callable[..., Awaitable[None]]) -> None:
    epoch = max(int(each.bandit["epoch"]) for each in them.followers)
    await asyncio.to_thread(postgres.stop)
    try:
        await them.until("it is away", lambda each: "store is away" in each.rollout["trouble"])
        await them.until("all stays", at(0.75, "running"))
        assert not [each for each in them.followers if each.decides("spring") or each.decides("greeting")]
    finally:
        await asyncio.to_thread(postgres.start)
    await them.until("it is back", lambda each: not each.rollout["trouble"])
    assert (await post(them.followers[-1].replica.admin, "/rollouts/spring/pause"))[0] == 200
    await them.until("it is paused", at(0.75, "paused"))
    await do("resume")
    await them.until("it goes on", lambda each: at(0.75, "running")(each) and after_epoch(epoch)(each))


async def a_broken_variant_is_taken_back_while_its_leader_is_stopped(them: Group, new: PlayedTriton) -> None:
    """No caller sees that it is broken. When its leader goes on, nothing bad is in what that has seen."""
    with them.stopped(await them.leader("spring")) as others:
        new.behaviour = fails_at_once
        await them.until("it is taken back", at(0.0, "rolled back"), others)
    await them.until("all have taken it back", at(0.0, "rolled back"))


def arms_of_units(url: str) -> dict[str, set[str]]:
    store = Store(url, KEY)
    try:
        found: dict[str, set[str]] = {}
        for each in store.exposures("greeting"):
            found.setdefault(each.unit, set()).add(each.arm)
        return found
    finally:
        store.close()
