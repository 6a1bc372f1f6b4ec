"""A rollout's variant that fails its calls behind a fallback is soon known to be broken, though it is left alone."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from test_call import ANSWER, Asking
from test_fallback_reasons import TwoVariants
from tritonclient.grpc import service_pb2 as pb

from gateway.experiments.crowd import Crowd
from gateway.experiments.fast_lane import FastLane
from gateway.experiments.rollout import Calls
from gateway.forwarding.call import Call
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.rolled import VariantCounts, Whose, Witnesses
from gateway.routing import Key, Route, Routes, Split, Sticky
from gateway.status import OK, Code, Meaning, Origin
from gateway.types import Retry, Variant
from gateway.upstream.pool import Pool

REQUEST = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()
OLD = pb.ModelInferRequest(model_name="n", raw_input_contents=[b"x"]).SerializeToString()
USER = "x-user"
WELL = 0.01  # the share of calls that fail where nothing is broken
MOST_SECONDS = 100


class Rollout(TwoVariants):
    """Calls of `m` are meant for its new variant, those of `n` for the old one, which stands in for it."""

    def __init__(self, seed: int, hosts: Sequence[float], is_broken: Callable[[int], bool]) -> None:
        """hosts: how much each of them calls, beside each other. is_broken: for callers of this host."""
        self.now, self._draw = 1000.0, random.Random(seed)
        super().__init__(lambda: self.now, self._draw.random)
        self._hosts, self._is_broken = hosts, is_broken
        variants = (Variant("new", "u", "net"), Variant("old", "v", "net"))
        kept = {"sticky": Sticky((Key("metadata", USER),), "m"), "retry": Retry(frozenset({Meaning.SERVER}))}
        routes = [
            Route(name, variants, Split.all_to(each.name), **kept) for name, each in zip("mn", variants, strict=True)
        ]
        ends = {"u": self.endpoint, "v": self.other}
        pools = {name: Pool(name, [each], clock=self.inference.clock) for name, each in ends.items()}
        self.inference.current.now = replace(self.inference.current.now, routes=Routes(routes), pools=pools)
        self.inference.rolled.apply({"m": ("old", "new"), "n": ("old", "new")})
        self.asked = 0  # calls that the new variant got

    def call(self, body: bytes) -> None:
        (host,) = self._draw.choices(range(len(self._hosts)), self._hosts)
        self.caller = Asking("")
        self.caller.peer = f"ipv4:10.0.0.{host}:5"
        self.caller.metadata = metadata_from_pairs([(USER, f"user {self._draw.randrange(10_000)}")])
        call = Call(self.inference, self.caller, "ModelInfer", body, self.inference.requests.peek(body))
        sent = len(self.connection.sent)
        call.begin()
        while len(self.connection.sent) > sent:
            sent += 1
            client, attempt = self.connection.sent[-1], call._work.attempts.last
            assert attempt is not None
            self.asked += attempt.variant.name == "new"
            fails = self._draw.random() < WELL or (attempt.variant.name == "new" and self._is_broken(host))
            client.body = b"" if fails else ANSWER
            client.end(Code.INTERNAL if fails else OK, "broken" if fails else "", Origin.SERVER)
        self.connection.sent.clear()

    def seconds(self, rate: float, old: float) -> float:
        """Until it is known to be broken, with so many calls of each in a second."""
        lane, last = FastLane(), (Crowd(Calls()), Crowd(Calls()))
        for second in range(MOST_SECONDS):
            calls = [REQUEST] * self._poisson(rate) + [OLD] * self._poisson(old)
            self._draw.shuffle(calls)
            for body in calls:
                self.now += 1.0 / len(calls)
                self.call(body)
            counts = [self.inference.rolled.table[model][name] for model, name in (("n", "old"), ("m", "new"))]
            looks = [crowd(each) for each in counts]
            lane.add(*map(since, looks, last))
            last = (looks[0], looks[1])
            if lane.is_believed:
                return second + 1
        return MOST_SECONDS

    def _poisson(self, rate: float) -> int:
        made, left = 0, self._draw.expovariate(rate)
        while left < 1.0:
            made, left = made + 1, left + self._draw.expovariate(rate)
        return made


def crowd(counts: VariantCounts) -> Crowd:
    calls = Calls(counts.good, counts.errors, counts.unanswered, wrong=counts.wrong, left_alone=counts.left_alone)
    return Crowd(calls, [*counts.ended_by.good], [*counts.ended_by.bad])


def since(now: Crowd, then: Crowd) -> Crowd:
    def less(more: Sequence[int], fewer: Sequence[int]) -> list[int]:
        return [a - b for a, b in zip(more, fewer or [0] * len(more), strict=True)]

    calls = Calls(*less([now.calls.good, now.calls.errors], [then.calls.good, then.calls.errors]))
    left = now.calls.left_alone - then.calls.left_alone
    return Crowd(replace(calls, left_alone=left), less(now.good, then.good), less(now.bad, then.bad))


ONE, TWO, MANY = [1.0], [19.0, 1.0], [1.0] * 30


@pytest.mark.parametrize(
    ("hosts", "rate"),
    [
        pytest.param(ONE, 3.0, id="one host, three calls a second"),
        pytest.param(MANY, 3.0, id="many hosts"),
        pytest.param(TWO, 20.0, id="of two hosts one calls most"),
    ],
)
def test_a_variant_that_fails_every_call_is_known_within_seconds(hosts: Sequence[float], rate: float) -> None:
    """It is left alone after a few calls, from when on others' answers would hide it for minutes."""
    found = []
    for seed in range(20):
        world = Rollout(seed, hosts, lambda _: True)
        found.append(world.seconds(rate, 50.0))
        assert world.asked <= 30
    assert statistics.median(found) <= 8, found
    assert max(found) <= 20, found


def test_one_host_whose_calls_fail_costs_the_others_no_variant() -> None:
    for seed in range(2):
        world = Rollout(seed, TWO, lambda host: host == 0)
        assert world.seconds(20.0, 20.0) == MOST_SECONDS


def test_witnesses_are_few_and_of_different_callers() -> None:
    """Where nobody decides, since the store is away, a minute brings eight of them."""
    witnesses = Witnesses()
    chosen = [
        (whose, second)
        for second in range(600)
        for whose in (Whose(f"user {number}", f"ipv4:10.0.0.{number % 50}") for number in range(50))
        if witnesses.maybe_one(whose, float(second))
    ]
    assert len(chosen) == 8 * 10
    first = [whose for whose, second in chosen if second < 60]
    assert len({each.unit for each in first}) == 8
    alone = Witnesses()
    assert sum(alone.maybe_one(Whose(f"user {second}", "ipv4:10.0.0.1"), float(second)) for second in range(60)) == 3
