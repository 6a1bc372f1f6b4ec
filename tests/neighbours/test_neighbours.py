"""Whatever one caller does, its neighbours get every answer, and the right one, and the gateway's memory is bounded.

Neighbours are a process of their own (`neighbours`): unary, streamed and typed calls, to models by their own names, to
public ones and to ones that merge, to the same models as the abuser's (`abuses`) and to others. First each kind of
abuse alone at its fullest, then what hypothesis draws: up to four at a time, of drawn kinds, places, sizes and cuts,
for SOAK_SECONDS in all, beginning with SOAK_SEED.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from abuses import EVERY, PUBLIC_MODELS, Abuse, scripts
from hypothesis import HealthCheck, Phase, given, seed, settings
from playing import Neighbourhood, neighbourhood
from triton_fixture import FAST_START

from gateway.triton import LocalTriton

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
SEED = int(os.environ.get("SOAK_SEED", "0"))

pytestmark = [pytest.mark.integration, pytest.mark.timeout(SECONDS + 240)]


class Outages:
    """Starts a Triton again whenever it has died, and knows when that was."""

    def __init__(self, server: LocalTriton) -> None:
        self._server = server
        self._alive = time.time()
        self.spans: list[tuple[float, float]] = []

    async def watch(self) -> None:
        while True:
            if self._server.is_running:
                self._alive = time.time()
            else:
                self.spans.append((self._alive, float("inf")))
                await self._server.kill()
                await self._server.start()
                self.spans[-1] = (self._alive, time.time())
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def beside(triton_repository: Path) -> AsyncIterator[Neighbourhood]:
    server = LocalTriton(triton_repository, models=[*PUBLIC_MODELS, "größe"], extra=FAST_START)
    await server.start()
    outages = Outages(server)
    watching = asyncio.create_task(outages.watch())
    with neighbourhood(server.grpc_port, lambda: outages.spans) as running:
        yield running
    watching.cancel()
    print(f"Triton died {len(outages.spans)} times")
    await server.kill()
    await server.aclose()


@pytest.mark.parametrize("kind", EVERY)
async def test_nobody_notices_one_kind_of_abuse(beside: Neighbourhood, kind: str) -> None:
    await asyncio.to_thread(beside.play, *EVERY[kind])


# It draws in a thread, beside which others use `random`; it is only to be told what was drawn, not to be repeated.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
async def test_nobody_notices_whatever_one_caller_does(beside: Neighbourhood) -> None:
    until = time.monotonic() + max(20.0, SECONDS - 40)  # the kinds alone have taken the others

    noticed: list[str] = []

    def draw(number: int) -> None:
        """Ten scripts. None is tried a second time, for what it harms may stay harmed."""

        @seed(number)
        @settings(max_examples=10, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
        @given(scripts)
        def play(script: list[Abuse]) -> None:
            if noticed or time.monotonic() > until:
                return
            try:
                beside.play(*script)
            except AssertionError as error:
                noticed.append(f"seed {number}, {script}: {error}")

        play()

    number = SEED
    while time.monotonic() < until and not noticed:
        await asyncio.to_thread(draw, number)
        number += 1
    assert not noticed, noticed[0]
