"""Quotas that gateways share by a real Valkey or Redis: the rate holds for all of them, and a store may be away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from patience import ask_until, wait_until
from quota_server import needs_store, running_store
from slowness import slowness

from gateway.errors import QuotaExceeded
from gateway.quota_store import QuotaStore, StoreSettings
from gateway.quotas import CallerQuota, Limits, Quotas, QuotaSettings, SharedBuckets

pytestmark = needs_store

RATE, BURST = 2000.0, 0.5


class CountedStore(QuotaStore):
    """Counts its answers."""

    answers = 0

    async def exchange(self) -> bool:
        is_well = await super().exchange()
        self.answers += is_well
        return is_well


class OneGateway:
    """What a gateway has of quotas, with a store."""

    def __init__(
        self,
        url: str,
        number: int,
        gateways: int,
        password_file: str | None = None,
        *,
        timeout: float = 0.3,
        period: float = 0.1,
    ) -> None:
        self.shared = SharedBuckets(1 / gateways, period)
        settings = StoreSettings(url, password_file, timeout, "tests", f"gateway-{number}")
        self.store = CountedStore(settings, self.shared)
        self.quotas = Quotas()
        self.quotas.apply(QuotaSettings("caller", default=CallerQuota(Limits(RATE, burst=BURST))), self.shared)
        self.let_in = 0

    def ask(self, times: int, caller: str = "a") -> None:
        quota = self.quotas.of({"caller": caller}, "net")
        for _ in range(times):
            with contextlib.suppress(QuotaExceeded):
                quota.enter(0, 1, time.monotonic())
                self.let_in += 1


@contextlib.asynccontextmanager
async def gateways(
    url: str, count: int, password_file: str | None = None, **more: float
) -> AsyncIterator[list[OneGateway]]:
    made = [OneGateway(url, number, count, password_file, **more) for number in range(count)]
    running = [asyncio.ensure_future(each.store.run()) for each in made]
    try:
        yield made
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def until_well(made: Sequence[OneGateway], away: bool = False) -> None:
    def is_so(each: OneGateway) -> bool:
        return each.shared.is_away is away and (away or each.shared.share == 1 / len(made))

    await wait_until(lambda: all(map(is_so, made)))


async def let_in_for(made: Sequence[OneGateway], demands: Sequence[float], seconds: float) -> tuple[int, float]:
    """Calls that were let in, and how long it took. demands: calls a second at each gateway, at an even pace."""
    before, began, asked = sum(each.let_in for each in made), time.monotonic(), [0] * len(made)
    while (now := time.monotonic() - began) < seconds:
        for number, each in enumerate(made):
            due = int(now * demands[number])
            each.ask(due - asked[number])
            asked[number] = due
        await asyncio.sleep(0.004)
    return sum(each.let_in for each in made) - before, time.monotonic() - began


async def assert_let_in(made: Sequence[OneGateway], demands: Sequence[float], rate: float, within: float) -> None:
    """They let in what a rate says, and its burst at first: never more, and as much where the machine lets them ask."""
    shortest = 1.0
    for burst in (BURST, *(0.0 for _ in range(10))):
        calls, took = await let_in_for(made, demands, 2.0)
        assert calls <= rate * (took + BURST) * (1.0 + within)
        shortest = min(shortest, 1.0 - calls / (rate * (took + burst)))
        if shortest <= within:
            return
    raise AssertionError(f"{shortest:.0%} too few")


@pytest.mark.parametrize("demands", [(1200,) * 4, (4000, 200, 0, 900)], ids=["even", "uneven"])
async def test_four_gateways_let_in_what_the_quota_says_within_a_twentieth(demands: tuple[float, ...]) -> None:
    with running_store() as store:
        async with gateways(store.url, 4, timeout=30.0) as made:
            await until_well(made)
            await assert_let_in(made, demands, RATE, within=0.05)


async def test_a_quota_that_is_not_reached_refuses_nobody() -> None:
    """However busy the machine is: nobody calls more often for having been held up, nor for the store's being late."""
    demands, least = (1500, 50, 50, 50), RATE * BURST / 4  # what a gateway may let in before the store answers next
    with running_store() as store:
        async with gateways(store.url, 4, timeout=30.0, period=0.05) as made:
            await until_well(made)
            asked, due, answers, since = [0] * 4, [0.0] * 4, [0] * 4, [0] * 4
            last = time.monotonic()
            while sum(asked) < 2500:
                await asyncio.sleep(0.004)
                passed, last = min(time.monotonic() - last, 0.02), time.monotonic()
                for number, each in enumerate(made):
                    if each.store.answers != answers[number]:
                        answers[number], since[number] = each.store.answers, 0
                    due[number] += passed * demands[number]
                    # The other half may be on its way.
                    times = min(int(due[number]), int(least / 2) - 1 - since[number])
                    each.ask(times)
                    due[number] -= times
                    asked[number] += times
                    since[number] += times
            assert [each.let_in for each in made] == asked


async def test_callers_do_not_share_with_each_other() -> None:
    with running_store() as store:
        async with gateways(store.url, 2) as made:
            await until_well(made)
            for each in made:
                each.ask(5000, "greedy")
            await asyncio.sleep(0.1)
            before = made[1].let_in
            made[1].ask(100, "modest")
    assert made[1].let_in - before == 100


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
async def test_while_the_store_is_away_each_has_its_share_and_then_it_is_shared_again(hangs: bool) -> None:
    with running_store() as store:
        async with gateways(store.url, 4) as made:
            await until_well(made)
            store.pause() if hangs else store.stop()
            made[0].ask(1)  # there is something to report
            await until_well(made, away=True)
            await assert_let_in(made, (3000, 0, 0, 0), RATE / 4, within=0.1)
            store.resume() if hangs else store.start()
            await until_well(made)
            await assert_let_in(made, (4000, 0, 0, 0), RATE, within=0.1)  # nobody has used it meanwhile


async def test_a_gateway_without_a_store_serves_with_its_share() -> None:
    async with gateways("redis://127.0.0.1:1/0", 2) as made:
        await wait_until(lambda: made[0].shared.is_away)
        began = time.monotonic()
        made[0].ask(10_000)
        took = time.monotonic() - began
    assert RATE / 2 * BURST <= made[0].let_in <= RATE / 2 * (BURST + took) + 1


async def test_no_call_waits_for_the_store() -> None:
    with running_store() as store:
        async with gateways(store.url, 1) as made:
            await until_well(made)
            store.pause()
            began = time.thread_time()
            made[0].ask(500)
            assert made[0].let_in == 500
            assert time.thread_time() - began < 0.5 * slowness()


async def test_what_is_left_of_a_quota_does_not_stay_in_the_store() -> None:
    with running_store() as store:
        async with gateways(store.url, 1) as made:
            await until_well(made)
            made[0].ask(100)
            # 100 calls are 50 ms of the rate.
            await ask_until(lambda: made[0].store._client.keys("*"), lambda keys: keys == [b"{tests}:workers"])


async def test_the_password_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret\n")
    with running_store("--requirepass", "secret") as store:
        async with gateways(store.url, 1, str(file)) as made:
            await until_well(made)
        async with gateways(store.url, 1) as made:
            await wait_until(lambda: made[0].shared.is_away)
