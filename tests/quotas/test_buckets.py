"""GCRA: the rate holds, the burst may come at once, and waits are exact."""

from __future__ import annotations

import random

import pytest

from gateway.quotas import Bucket, Lease, SharedBuckets


def used(bucket: Bucket, times: list[float], units: float = 1.0) -> float:
    """Units that were let in of requests at these instants."""
    total = 0.0
    for now in times:
        if not bucket.wait(units, now):
            bucket.take(units, now)
            total += units
    return total


def test_a_burst_may_come_at_once_and_then_the_rate_holds() -> None:
    bucket = Bucket(10.0, 2.0)
    assert used(bucket, [5.0] * 100) == 20
    assert used(bucket, [5.0 + n / 1000 for n in range(1, 3001)]) == 30


@pytest.mark.parametrize("seed", range(5))
def test_no_window_has_more_than_the_rate_and_a_burst(seed: int) -> None:
    chance, bucket, now = random.Random(seed), Bucket(50.0, 0.5), 0.0
    let_in: list[tuple[float, float]] = []
    for _ in range(3000):
        now += chance.expovariate(100.0)
        units = chance.choice((1.0, 2.0, 5.0))
        if not bucket.wait(units, now):
            bucket.take(units, now)
            let_in.append((now, units))
    for first in range(0, len(let_in), 37):
        begin = let_in[first][0]
        for length in (0.1, 1.0, 5.0):
            units = sum(u for at, u in let_in if begin <= at < begin + length)
            assert units <= 50.0 * (length + 0.5) + 1e-6


def test_whoever_waits_as_long_as_he_is_told_is_let_in_and_not_before() -> None:
    bucket = Bucket(7.0, 1.0)
    bucket.take(7.0, 100.0)
    wait = bucket.wait(3.0, 100.0)
    assert wait == pytest.approx(3 / 7)
    assert bucket.wait(3.0, 100.0 + wait - 1e-4) > 0
    assert bucket.wait(3.0, 100.0 + wait) == 0


def test_what_is_larger_than_the_bucket_comes_when_it_is_full_and_is_paid_for() -> None:
    bucket = Bucket(10.0, 1.0)
    assert bucket.wait(100.0, 0.0) == 0
    bucket.take(100.0, 0.0)
    assert bucket.left(0.0) == pytest.approx(-90)
    assert bucket.wait(1.0, 9.0) > 0
    assert bucket.wait(1.0, 9.2) == 0
    assert bucket.wait(100.0, 9.2) == pytest.approx(0.8)  # when it is full again


def test_one_unit_can_always_come_however_short_the_burst() -> None:
    bucket = Bucket(0.1, 0.001)
    assert bucket.wait(1.0, 0.0) == 0
    bucket.take(1.0, 0.0)
    assert bucket.wait(1.0, 0.0) == pytest.approx(10.0)


class Store:
    """A store as the script makes it, in this process, with the time of its own."""

    def __init__(self, rate: float, burst: float) -> None:
        self.bucket = Bucket(rate, burst)

    def charge(self, units: float, now: float) -> float:
        self.bucket.take(units, now)
        return self.bucket.tolerance - self.bucket.left(now) / self.bucket.rate


@pytest.mark.parametrize("demands", [(250,) * 4, (2000,) * 4, (5000, 10, 0, 300), (4000, 0, 0, 0)], ids=str)
def test_four_processes_share_a_rate(demands: tuple[int, ...]) -> None:
    """Simulated: 1000 a second together, each reports every 50 ms at a time of its own, and at once if it must."""
    rate, burst, seconds = 1000.0, 1.0, 10.0
    store = Store(rate, burst)
    shares = [SharedBuckets(1 / len(demands), 0.05) for _ in demands]
    leases = [Lease("k", rate, burst, shared) for shared in shares]
    for shared in shares:
        shared.came_back()
    chance, let_in = random.Random(3), 0
    due = [chance.random() * 0.05 for _ in demands]
    for millisecond in range(int(seconds * 1000)):
        now = millisecond / 1000
        for n, lease in enumerate(leases):
            if now >= due[n] or (shares[n].leases and lease.left(now) < 1 and now >= due[n] - 0.045):
                lease.heard(store.charge(lease.reported(), now), now)
                shares[n].leases.clear()
                due[n] = now + 0.05
            for _ in range(demands[n] // 1000 + (chance.random() < demands[n] % 1000 / 1000)):
                if not lease.wait(1.0, now):
                    lease.take(1.0, now)
                    let_in += 1
    wanted = min(sum(demands) * seconds, rate * (seconds + burst))
    assert let_in == pytest.approx(wanted, rel=0.05)


def test_while_the_store_is_away_each_has_its_share_and_afterwards_it_begins_anew() -> None:
    shared = SharedBuckets(0.25, 0.05)
    lease = Lease("k", 100.0, 1.0, shared)
    assert used(lease, [0.0] * 1000) == 25
    assert used(lease, [n / 1000 for n in range(1, 4001)]) == 100
    assert lease.used == 0  # of which the store need not hear
    shared.came_back()
    assert used(lease, [10.0] * 1000) == 25
    assert lease.reported() == 25
    lease.heard(0.25, 10.0)
    assert lease.left(10.0) == pytest.approx(0.25 * 75)


@pytest.mark.parametrize("burst", [1.0, 60.0])
def test_a_store_that_goes_and_comes_back_again_and_again_gives_no_burst_each_time(burst: float) -> None:
    """Twice the rate at most: what is used while it is away it does not hear of."""
    shared, store, let_in = SharedBuckets(0.5, 0.1), Store(10.0, burst), 0.0
    lease = Lease("k", 10.0, burst, shared)
    for second in range(100):
        shared.came_back()
        for now in (second + 0.0, second + 0.1):
            let_in += used(lease, [now] * 1000)
            lease.heard(store.charge(lease.reported(), now), now)
        shared.went_away()
        let_in += used(lease, [second + 0.2] * 1000)
        shared.went_away()
    assert let_in <= 10.0 * (burst + 2 * 100)


def test_what_is_owed_is_owed_when_the_store_goes_and_when_it_comes_back() -> None:
    shared = SharedBuckets(0.5, 0.1)
    lease = Lease("k", 10.0, 1.0, shared)
    lease.take(55.0, 0.0)
    shared.came_back()
    assert lease.wait(1.0, 0.0) > 0
    assert lease.left(0.0) == pytest.approx(-50)
    shared.went_away()
    assert lease.wait(1.0, 10.0) > 0
    assert lease.wait(1.0, 10.3) == 0


def test_what_is_used_after_a_pause_is_not_there_once_more_when_the_store_goes() -> None:
    shared = SharedBuckets(0.5, 0.1)
    shared.came_back()
    lease = Lease("k", 10.0, 10.0, shared)
    lease.heard(0.0, 0.0)
    assert used(lease, [20.0] * 50) == 50
    shared.went_away()
    assert used(lease, [20.0] * 50) == 0


def test_a_caller_whose_share_is_below_one_request_is_let_in_as_the_store_goes() -> None:
    shared = SharedBuckets(0.25, 0.1)
    shared.came_back()
    lease = Lease("k", 1.0, 1.0, shared)
    assert lease.wait(1.0, 100.0) == 0
    shared.went_away()
    assert lease.wait(1.0, 100.0) == 0


def test_a_lease_that_is_used_up_asks_at_once() -> None:
    asked: list[bool] = []
    shared = SharedBuckets(0.5, 0.05)
    shared.came_back()
    shared.on_hungry = lambda: asked.append(True)
    lease = Lease("k", 10.0, 1.0, shared)
    assert used(lease, [0.0] * 5) == 5
    assert asked == []
    assert lease.wait(1.0, 0.0) > 0
    assert asked == [True]


def test_after_a_pause_a_caller_need_not_wait_for_the_store() -> None:
    shared = SharedBuckets(0.5, 0.05)
    shared.came_back()
    lease = Lease("k", 10.0, 1.0, shared)
    assert used(lease, [0.0] * 10) == 5
    lease.reported()
    lease.heard(1.0, 0.0)  # others have used the rest
    assert lease.wait(1.0, 0.01) > 0
    assert lease.wait(1.0, 5.0) == 0
