"""Which endpoint of a pool gets a call."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest
from scripted import ScriptedConnection

from gateway.status import Code, Verdict, classify
from gateway.upstream.endpoint import Endpoint, FailedCall, State
from gateway.upstream.outlier import Elsewhere
from gateway.upstream.pool import Pool


def pool(*states: State) -> Pool:
    """Endpoints a, b, c … in these states."""
    endpoints = []
    for address, state in zip("abcdef", states, strict=False):
        endpoint = Endpoint("main", address, ScriptedConnection())
        endpoint.state = state
        endpoints.append(endpoint)
    return Pool("main", endpoints)


def picks(of: Pool, times: int) -> list[str]:
    return [endpoint.address if (endpoint := of.maybe_pick("m", "")) else "-" for _ in range(times)]


INTERNAL = classify(Code.INTERNAL, "CUDA error: an illegal memory access was encountered")
OVERLOADED = classify(Code.UNAVAILABLE, "Exceeds maximum queue size")
READY, UNPROBED, SUSPECT, DOWN = State.READY, State.UNPROBED, State.SUSPECT, State.DOWN


def test_an_idle_pool_is_used_evenly() -> None:
    assert all(850 < times < 1150 for times in Counter(picks(pool(READY, READY, READY), 3000)).values())


def test_no_caller_can_tell_whose_turn_is_next() -> None:
    """Else one who sends a bad request between two good ones could make one endpoint look worse than the others."""
    of = pool(READY, READY)
    assert 800 < Counter(picks(of, 4000)[::2])["a"] < 1200


def failed(of: Pool, number: int, times: int, now: float, verdict: Verdict = INTERNAL) -> float:
    """Answers for how long that ejects it."""
    return max(of.failed(of.endpoints[number], FailedCall("m", "", verdict, now)) for _ in range(times))


def test_an_endpoint_that_fails_what_its_peer_answers_is_left_alone_and_then_tried() -> None:
    now = 100.0
    of = Pool("main", pool(READY, READY).endpoints, clock=lambda: now)
    good, bad = of.endpoints
    for _ in range(50):
        good.succeeded("m", "", now)
    assert failed(of, 1, 20, now) == 5.0
    assert set(picks(of, 100)) == {"a"}
    assert of.maybe_pick("m", "", desperate=True) in of.endpoints
    now += 5.1
    assert picks(of, 50).count("b") == 1  # a trial, and the next one not at once
    for _ in range(3):
        bad.succeeded("m", "", now)
    now += 10
    assert 10 < picks(of, 100).count("b") < 90


def test_at_most_half_of_a_pool_is_ejected_and_never_the_last_that_can_serve() -> None:
    of = pool(READY, READY, READY, READY)
    for number in (0, 1, 2, 3):
        for endpoint in of.endpoints[number + 1 :]:
            for _ in range(100):
                endpoint.succeeded("m", "", 1.0)
        failed(of, number, 300, 1.0)
    assert [e.is_ejected("m", "") for e in of.endpoints] == [True, True, False, False]
    two = pool(READY, DOWN)
    assert failed(two, 0, 1000, 1.0) == 0.0


def test_a_fast_failure_weighs_like_a_call_in_flight() -> None:
    now = 10.0
    of = Pool("main", pool(READY, READY).endpoints, clock=lambda: now)
    of.endpoints[0].in_flight += 1
    failed(of, 1, 3, now, OVERLOADED)
    assert set(picks(of, 30)) == {"a"}
    assert not of.endpoints[1].is_ejected("m", "")
    now += 3
    assert set(picks(of, 30)) == {"b"}


@pytest.mark.parametrize("verdict", [classify(Code.INVALID_ARGUMENT, ""), classify(Code.CANCELLED, ""), OVERLOADED])
def test_what_callers_do_wrong_and_what_is_full_ejects_nobody(verdict: Verdict) -> None:
    of = pool(READY, READY)
    for _ in range(100):
        of.endpoints[0].succeeded("m", "", 1.0)
    assert failed(of, 1, 1000, 1.0, verdict) == 0.0


def test_what_a_model_does_wrong_on_all_endpoints_ejects_none() -> None:
    """Whoever sends input that a model can't stand harms no server, however much he sends and whatever his share is."""
    chance = random.Random(4)
    for share in (0.05, 0.3, 0.6, 0.95, 1.0):
        of = pool(READY, READY, READY)
        ejected = 0.0
        for number in range(20_000):
            now = number / 2000
            endpoint = chance.choice(of.endpoints)
            if chance.random() < share:
                ejected += of.failed(endpoint, FailedCall("m", "", INTERNAL, now))
            else:
                endpoint.succeeded("m", "", now)
        assert not ejected, share


@pytest.mark.parametrize("well_for", [0, 4, 20])
@pytest.mark.parametrize("takes", [0.01, 0.1])
def test_of_two_servers_of_which_one_fails_every_call_at_once_hardly_any_call_fails(
    takes: float, well_for: float
) -> None:
    """Eight callers, failures of 0.5 ms: after 2 s hardly one fails, however long both went well before."""
    now = 0.0
    of = Pool("main", pool(READY, READY).endpoints, clock=lambda: now)
    good = of.endpoints[0]
    ends: list[tuple[float, int, bool]] = [(0.0, caller, True) for caller in range(8)]
    doing: dict[int, Endpoint] = {}
    late, failures = 0, 0
    while now < well_for + 5:
        now, caller, well = heapq.heappop(ends)
        endpoint = doing.pop(caller, None)
        if endpoint is not None:
            endpoint.in_flight -= 1
            late += now > well_for + 2
            if well:
                endpoint.succeeded("m", "", now)
            else:
                failures += now > well_for + 2
                of.failed(endpoint, FailedCall("m", "", INTERNAL, now))
        endpoint = doing[caller] = of.maybe_pick("m", "") or good
        endpoint.in_flight += 1
        well = endpoint is good or now < well_for
        heapq.heappush(ends, (now + (takes if well else 0.0005), caller, well))
    assert late > 23 / takes
    assert failures <= late / 1000


def test_a_burst_of_what_a_model_does_wrong_ejects_none_however_well_all_went_before() -> None:
    chance = random.Random(5)
    for share in (0.3, 0.6, 0.9, 1.0):
        of = pool(READY, READY, READY)
        now, ejected = 0.0, 0.0
        for number in range(100_000):
            now += 1 / 2000
            endpoint = chance.choice(of.endpoints)
            if number % 2000 < 300 and chance.random() < share:
                ejected += of.failed(endpoint, FailedCall("m", "", INTERNAL, now))
            else:
                endpoint.succeeded("m", "", now)
        assert not ejected, share


class Simulated:
    """Callers that each make one call after the other on a pool; how long an endpoint takes is given by its number."""

    def __init__(self, takes: dict[int, float], callers: int, refuses: frozenset[int] = frozenset()) -> None:
        self.now = 0.0
        self.pool = Pool("main", pool(*[READY] * len(takes)).endpoints, clock=lambda: self.now)
        self.takes = takes
        self.refuses = refuses
        self.calls: Counter[int] = Counter()
        self.times: list[float] = []
        self._ends: list[tuple[float, int, int, float]] = [(0.0, caller, -1, 0.0) for caller in range(callers)]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        self.calls.clear()
        self.times.clear()
        endpoints = self.pool.endpoints
        while self._ends[0][0] < until:
            self.now, caller, number, took = heapq.heappop(self._ends)
            if number >= 0:
                endpoints[number].in_flight -= 1
                self.times.append(took)
                if number in self.refuses:
                    self.pool.failed(endpoints[number], FailedCall("m", "", OVERLOADED, self.now))
                else:
                    endpoints[number].succeeded("m", "", self.now, took)
            picked = self.pool.maybe_pick("m", "")
            assert picked is not None
            number = endpoints.index(picked)
            picked.in_flight += 1
            self.calls[number] += 1
            took = self.takes[number] * random.uniform(0.8, 1.2)
            heapq.heappush(self._ends, (self.now + took, caller, number, took))

    def share(self, number: int) -> float:
        return self.calls[number] / self.calls.total()

    @property
    def p99(self) -> float:
        return sorted(self.times)[len(self.times) * 99 // 100]


@pytest.mark.parametrize("callers", [1, 2, 8, 16])
@pytest.mark.parametrize("size", [3, 6])
def test_one_that_is_ten_times_slower_gets_hardly_any_calls_until_it_is_well(size: int, callers: int) -> None:
    """Bar 48: at most a tenth of the calls within 10 s, p99 at most 1.5 times that of a pool that is well."""
    every = Simulated(dict.fromkeys(range(size), 0.01), callers)
    every.run(10)
    assert all(each < 1.5 * every.calls.total() / size for each in every.calls.values())
    usual = every.p99
    every.takes[0] = 0.1
    every.run(10)
    assert every.share(0) <= 0.02
    assert every.p99 <= 1.5 * usual
    every.takes[0] = 0.01
    every.run(30)
    every.run(10)
    assert every.share(0) > 0.5 / size


@pytest.mark.parametrize("callers", [1, 2, 8, 16])
def test_one_that_refuses_at_once_attracts_no_calls(callers: int) -> None:
    every = Simulated({0: 0.0005, 1: 0.01, 2: 0.01}, callers, frozenset({0}))
    every.run(10)
    assert every.share(0) < 0.1


def test_a_pool_under_load_uses_a_slower_endpoint_too() -> None:
    every = Simulated({0: 0.03, 1: 0.01}, 40)
    every.run(10)
    assert 0.05 < every.share(0) < 0.2


def test_of_a_large_pool_no_endpoint_gets_much_more_than_its_share_and_none_nothing() -> None:
    every = Simulated(dict.fromkeys(range(100), 0.01), 400)
    every.pool = Pool("main", [Endpoint("main", str(n), ScriptedConnection()) for n in range(100)])
    for endpoint in every.pool.endpoints:
        endpoint.state = READY
    every.run(2)
    assert max(e.in_flight for e in every.pool.endpoints) <= 4 + 4
    assert len(every.calls) == 100
    assert max(every.calls.values()) < 1.3 * every.calls.total() / 100


def test_of_a_large_pool_one_is_found_however_few_are_left() -> None:
    of = Pool("main", [Endpoint("main", str(number), ScriptedConnection()) for number in range(50)])
    for endpoint in of.endpoints:
        endpoint.state = DOWN
    of.endpoints[7].state = SUSPECT
    assert set(picks(of, 50)) == {"7"}
    of.endpoints[9].state = READY
    assert set(picks(of, 50)) == {"9"}


def test_one_that_is_new_gets_its_share_by_and_by() -> None:
    every = Simulated({0: 0.01, 1: 0.01, 2: 0.01}, 3)
    every.run(1)
    every.pool.endpoints[0].warm_up(every.now)
    shares = []
    for _ in range(6):
        every.run(2)
        shares.append(every.share(0))
    assert 0.02 < shares[0] < 0.2
    assert shares[0] < shares[2] < shares[4]
    assert shares[5] > 0.25


def test_a_pool_that_is_all_new_is_least_loaded_as_ever() -> None:
    now = 5.0
    of = Pool("main", pool(READY, READY, READY).endpoints, clock=lambda: now)
    for endpoint, calls in zip(of.endpoints, (2, 1, 3), strict=True):
        endpoint.warm_up(now)
        for _ in range(calls):
            endpoint.in_flight += 1
    assert set(picks(of, 50)) == {"b"}


def test_one_that_is_in_doubt_is_not_taken_for_being_warm() -> None:
    now = 5.0
    of = Pool("main", pool(READY, SUSPECT).endpoints, clock=lambda: now)
    of.endpoints[0].warm_up(now)
    assert set(picks(of, 50)) == {"a"}


def test_the_least_loaded_endpoint_is_picked() -> None:
    loaded = pool(READY, READY, READY)
    for endpoint, calls in zip(loaded.endpoints, (2, 1, 3), strict=True):
        for _ in range(calls):
            endpoint.in_flight += 1
    assert set(picks(loaded, 6)) == {"b"}


PREFERENCE = {
    "ready": ((READY, UNPROBED, SUSPECT, DOWN), "a"),
    "unprobed": ((UNPROBED, SUSPECT, DOWN), "a"),
    "suspect": ((SUSPECT, DOWN), "a"),
    "none": ((DOWN, DOWN), "-"),
    "a single one that is down": ((DOWN,), "-"),
    "a single suspect": ((SUSPECT,), "a"),
}


@pytest.mark.parametrize(("states", "picked"), PREFERENCE.values(), ids=PREFERENCE)
def test_a_better_state_is_preferred_to_less_load(states: tuple[State, ...], picked: str) -> None:
    of = pool(*states)
    for _ in range(9):
        of.endpoints[0].in_flight += 1
    assert set(picks(of, 4)) == {picked}
    assert of.is_available("m", "") is (picked != "-")


def test_an_endpoint_without_the_model_or_already_tried_is_passed_over() -> None:
    of = pool(READY, READY, READY)
    of.endpoints[0].models = {("m", ""): False}
    tried = {of.endpoints[1]}
    assert {of.maybe_pick("m", "", tried) for _ in range(4)} == {of.endpoints[2]}
    assert of.maybe_pick("m", "", {*tried, of.endpoints[2]}) is None
    assert of.maybe_pick("other", "", tried) in (of.endpoints[0], of.endpoints[2])


def test_an_endpoint_is_found_by_its_address() -> None:
    of = pool(READY, DOWN)
    assert of.maybe_find("b") is of.endpoints[1]
    assert of.maybe_find("z") is None


@pytest.mark.parametrize("size", [1, 3])
def test_a_whole_pool_may_be_ejected_where_its_fallback_does_better(size: int) -> None:
    now = 1.0
    of = Pool("main", pool(*[READY] * size).endpoints, clock=lambda: now)
    for endpoint in of.endpoints:
        for _ in range(30):
            of.failed(endpoint, FailedCall("m", "", INTERNAL, now), Elsewhere([(10, 0)]))
    assert of.maybe_pick("m", "") is None
    assert of.maybe_pick("m", "", desperate=True) is not None
    assert of.counts("m", "", now) == []
    now += 6
    assert of.maybe_pick("m", "") is not None  # a trial


def test_a_whole_pool_stays_where_its_fallback_fails_as_much() -> None:
    of = pool(READY)
    for _ in range(1000):
        of.failed(of.endpoints[0], FailedCall("m", "", INTERNAL, 1.0), Elsewhere([(200, 199)]))
    assert of.maybe_pick("m", "") is not None
