"""Simulated callers of a model with a fallback: whom a broken variant is taken from, how soon, and whom it is not."""

from __future__ import annotations

import heapq
import logging
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import GatewayError
from gateway.forwarding.caller import metadata_of
from gateway.forwarding.inference import Inference
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import NoHooks, NoObserver
from gateway.routing import Direct, Key, Route, Routes, Split, Sticky
from gateway.rpc.requests import RequestHead
from gateway.status import Code, Origin
from gateway.types import Variant
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool

BODY = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()
UNUSED: Any = None
CUDA_ERROR = CallFailed(Code.INTERNAL, "CUDA error", origin=Origin.SERVER)

Fails = Callable[[str], bool]
"""Does a call fail at this variant?"""


def never(variant: str) -> bool:
    return False


def at_first(variant: str) -> bool:
    return variant == "gpu"


def anywhere(variant: str) -> bool:
    return True


@dataclass
class Caller:
    """One who calls at random instants."""

    host: str
    rate: float  # calls a second
    fails: Fails = never
    user: str = ""


class World:
    """A model with two variants of one server each, and callers who wait for no answer longer than an instant."""

    def __init__(self, seed: int) -> None:
        self.chance, self.now = random.Random(seed), 1000.0
        clock = lambda: self.now  # noqa: E731
        variants = tuple(Variant(name, name, "net") for name in ("gpu", "cpu"))
        self.endpoints = {name: Endpoint(name, f"{name}:1", UNUSED) for name in ("gpu", "cpu")}
        for endpoint in self.endpoints.values():
            endpoint.state = State.READY
        pools = {name: Pool(name, [endpoint], clock=clock) for name, endpoint in self.endpoints.items()}
        route = Route("m", variants, Split.all_to("gpu"), sticky=Sticky((Key("metadata", "x-user"),), "s"))
        current = CurrentTopology(Topology(Routes([route]), pools))
        sequences = Sequences(idle=1, most=1)
        self.inference = Inference(current, NoHooks(), sequences, clock=clock, draw=self.chance.random)
        self.known = {}  # type: ignore[var-annotated]

    def call(self, caller: Caller) -> str:
        """The variant that answered; "" if it failed."""
        fields = ((b"x-user", caller.user.encode()),) if caller.user else ()
        metadata = self.known.setdefault(fields, metadata_of(RequestHead(b"/", fields, b"", b"", None)))
        inference = self.inference
        decision = inference.decision(metadata, inference.requests.peek(BODY))
        work = inference.begin(decision, NoObserver(), f"ipv4:{caller.host}:50000")
        while (attempt := inference.maybe_next(work)) is not None:
            inference.attempt_started(work, attempt)
            if not caller.fails(attempt.variant.name):
                inference.attempt_answered(work)
                return attempt.variant.name
            try:
                inference.attempt_failed(work, attempt, CUDA_ERROR)
            except GatewayError:
                break
        return ""

    def run(self, callers: list[Caller], seconds: float) -> Iterator[tuple[float, Caller, str]]:
        """For each call, when it was made, whose it was, and who answered."""
        began, end = self.now, self.now + seconds
        queue = [(self.now + self.chance.expovariate(each.rate), number) for number, each in enumerate(callers)]
        heapq.heapify(queue)
        while queue[0][0] < end:
            self.now, number = queue[0]
            caller = callers[number]
            heapq.heapreplace(queue, (self.now + self.chance.expovariate(caller.rate), number))
            yield self.now - began, caller, self.call(caller)
        self.now = end


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of ejections are told in the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def elsewhere(seed: int, bad: list[Caller], good: Caller, seconds: float = 600.0) -> float:
    """The share of a good caller's calls that the first variant does not answer, beside bad ones."""
    world = World(seed)
    for _ in world.run([good], 30.0):
        pass
    ended = [variant for _, caller, variant in world.run([*bad, good], seconds) if caller is good]
    assert len(ended) > 5
    return sum(variant != "gpu" for variant in ended) / len(ended)


def test_names_that_callers_make_up_take_no_room_among_what_is_known_of_models() -> None:
    """There is room for some thousands, and what is known longest goes for them: an ejection among it."""
    world = World(1)
    routes, pools = Routes(direct=Direct.ALL, default_upstream="gpu"), {"gpu": Pool("gpu", [world.endpoints["gpu"]])}
    world.inference.current.now = Topology(routes, pools)
    inference, metadata = world.inference, metadata_of(RequestHead(b"/", (), b"", b"", None))
    for number in range(10):
        body = pb.ModelInferRequest(model_name=f"no {number}").SerializeToString()
        work = inference.begin(
            inference.decision(metadata, inference.requests.peek(body)), NoObserver(), "ipv4:10.0.0.1:50000"
        )
        attempt = inference.maybe_next(work)
        assert attempt is not None
        inference.attempt_started(work, attempt)
        text = f"Request for unknown model: 'no {number}' is not found"
        with suppress(GatewayError):
            inference.attempt_failed(work, attempt, CallFailed(Code.NOT_FOUND, text, origin=Origin.SERVER))
    assert not world.endpoints["gpu"].records


@pytest.mark.parametrize("good", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("bad", [0.2, 1.0, 10.0])
def test_one_caller_s_bad_input_takes_the_variant_from_nobody_else(bad: float, good: float) -> None:
    assert elsewhere(1, [Caller("10.0.0.9", bad, at_first)], Caller("10.0.0.1", good)) == 0.0


@pytest.mark.parametrize("good", [0.05, 1.0])
def test_nor_does_one_user_s_from_other_users_of_his_caller(good: float) -> None:
    proxy = "10.0.0.5"
    assert elsewhere(1, [Caller(proxy, 10.0, at_first, "bad")], Caller(proxy, good, never, "good")) == 0.0
    assert elsewhere(1, [Caller(proxy, 10.0, anywhere, "bad")], Caller(proxy, good, never, "good")) == 0.0


@pytest.mark.parametrize("rate", [0.2, 1.0, 10.0])
def test_two_callers_bad_input_takes_it_for_seconds_at_most(rate: float) -> None:
    bad = [Caller(f"10.0.0.{number}", rate / 2, at_first) for number in (8, 9)]
    found = [elsewhere(seed, bad, Caller("10.0.0.1", 0.2), 1800.0) for seed in range(3)]
    assert statistics.median(found) < 0.05, found


@pytest.mark.parametrize("callers", [1, 2, 10])
@pytest.mark.parametrize(("rate", "within", "share"), [(0.2, 150.0, 0.25), (1.0, 25.0, 0.17), (10.0, 3.0, 0.02)])
def test_a_broken_variant_is_found_however_few_its_callers_are(
    callers: int, rate: float, within: float, share: float
) -> None:
    """rate: of all together. within: seconds. share: of the calls after that time which fail, those for trials."""
    times, shares = [], []
    for seed in range(5):
        world = World(seed)
        everybody = [Caller(f"10.0.0.{number}", rate / callers) for number in range(callers)]
        for _ in world.run(everybody, 60.0):
            pass
        for each in everybody:
            each.fails = at_first
        found, ended = 0.0, []
        for at, _, variant in world.run(everybody, 600.0):
            if not found and world.endpoints["gpu"].has_ejections:
                found = at
            if at > within:
                ended.append(variant)
        times.append(found or 600.0)
        shares.append(ended.count("") / len(ended))
    assert statistics.median(times) < within, times
    assert statistics.median(shares) < share, shares


@pytest.mark.parametrize("callers", [1, 10])
def test_a_variant_that_is_well_again_gets_its_calls_back(callers: int) -> None:
    world = World(3)
    everybody = [Caller(f"10.0.0.{number}", 10.0 / callers, at_first) for number in range(callers)]
    for _ in world.run(everybody, 4.0):
        pass
    assert world.endpoints["gpu"].has_ejections
    for each in everybody:
        each.fails = never
    ended = [variant for at, _, variant in world.run(everybody, 90.0) if at > 60.0]
    assert ended.count("gpu") == len(ended)


def test_what_became_of_a_caller_who_has_gone_does_not_look_like_a_variant_without_calls() -> None:
    world = World(5)
    good = Caller("10.0.0.1", 0.5)
    for _ in world.run([Caller("10.0.0.9", 10.0, at_first), good], 30.0):
        pass
    assert world.inference.circuits.breaker_state("m", "gpu") != "admitting"
    for _ in world.run([good], 120.0):
        pass
    assert world.inference.circuits.breaker_state("m", "gpu") == "admitting"
    for _ in world.run([good], 900.0):
        pass
    assert not world.endpoints["gpu"].has_ejections


def test_input_that_is_bad_at_every_variant_ejects_none() -> None:
    world = World(4)
    bad = [Caller(f"10.0.0.{number}", 3.0, anywhere) for number in range(3)]
    assert all(variant != "cpu" for _, _, variant in world.run(bad, 600.0))
    assert not world.endpoints["gpu"].has_ejections


def test_input_that_fails_half_of_the_time_at_every_variant_hardly_ejects_any() -> None:
    world = World(4)
    flaky = Caller("10.0.0.1", 10.0, lambda variant: world.chance.random() < 0.5)
    ended = [variant for _, _, variant in world.run([flaky], 600.0)]
    assert ended.count("cpu") < 0.1 * len(ended)
