"""Who is answered by another variant than was chosen is told so, and why; and so is telemetry."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from patience import wait_until
from test_call import ANSWER, World

from gateway.forwarding.admission import AdmissionSettings
from gateway.hooks import AttemptStarted, CallEnded, CallObserver, CallStarted, NoHooks, NoObserver
from gateway.routing import Route, Routes, Split
from gateway.status import Code, Origin
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.pool import Pool


class Telling(NoHooks):
    """Notes attempts and ends."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, str, str]] = []
        self.ends: list[CallEnded] = []

    def call_started(self, event: CallStarted) -> CallObserver:
        hooks = self

        class Observer(NoObserver):
            def attempt_started(self, event: AttemptStarted) -> Any:
                hooks.attempts.append((event.variant, event.instead_of, event.reason))
                return ()

            def ended(self, event: CallEnded) -> None:
                hooks.ends.append(event)

        return Observer()


class TwoVariants(World):
    """`gpu`, and `cpu` in its place."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        super().__init__("", clock, draw)
        self.other = Endpoint("v", "t:2", self.connection)
        self.other.state = State.READY
        route = Route("m", (Variant("gpu", "u", "net"), Variant("cpu", "v", "net")), Split.all_to("gpu"))
        pools = {"u": Pool("u", [self.endpoint]), "v": Pool("v", [self.other])}
        self.inference.current.now = replace(self.inference.current.now, routes=Routes([route]), pools=pools)
        self.told = self.inference.hooks = Telling()

    def answer_last(self, code: Code = Code.OK, text: str = "", origin: Origin = Origin.SERVER) -> None:
        client = self.connection.sent[-1]
        client.body = ANSWER
        client.end(code, text, origin)


def trailers(world: TwoVariants) -> tuple[bytes | None, ...]:
    return tuple(
        world.caller.trailing.get(b"gateway-" + key) for key in (b"variant", b"fallback-from", b"fallback-reason")
    )


def test_the_chosen_variants_answer_tells_of_no_fallback() -> None:
    world = TwoVariants()
    world.begin()
    world.answer_last()
    assert trailers(world) == (b"gpu", None, None)
    assert world.told.attempts == [("gpu", "", "")]


@pytest.mark.parametrize("why", ["unavailable", "limited", "sample"])
def test_a_fallback_tells_in_whose_place_it_answered_and_why(why: str) -> None:
    world = TwoVariants(draw=lambda: 0.0)
    if why == "unavailable":
        world.endpoint.state = State.DOWN
    elif why == "limited":
        world.inference.gates.apply(AdmissionSettings({("u", "net"): 1}), 0.0)
        for _ in range(1000):  # until there is no room to wait either
            if world.begin() and world.connection.sent[-1].request is not None and world.told.attempts[-1][0] == "cpu":
                break
        world.told.attempts.clear()
        world.told.ends.clear()
    else:
        for _ in range(5):
            world.begin()
            world.answer_last(Code.INTERNAL, "CUDA error")
        world.told.attempts.clear()
        world.told.ends.clear()
    world.begin()
    world.answer_last()
    assert trailers(world) == (b"cpu", b"gpu", why.encode())
    assert world.told.attempts == [("cpu", "gpu", why)]
    [end] = world.told.ends
    assert end.served is not None
    assert (end.served.fallback_from, end.served.fallback_reason) == ("gpu", why)


async def test_a_failure_is_told_by_its_meaning() -> None:
    world = TwoVariants()
    world.begin()
    world.answer_last(Code.NOT_FOUND, "Request for unknown model: 'net' has no available versions")
    await wait_until(lambda: len(world.connection.sent) == 2)
    world.answer_last()
    assert trailers(world) == (b"cpu", b"gpu", b"model_gone")
    assert world.told.attempts == [("gpu", "", ""), ("cpu", "gpu", "model_gone")]
