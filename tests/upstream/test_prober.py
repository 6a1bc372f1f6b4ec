"""What probes make of an endpoint. A real Triton is in tests/integration; here is what none can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from scripted import REFUSED, TIMED_OUT, ScriptedConnection

from gateway.status import Code, Origin, classify
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.health import Prober, ProbeSettings

OFTEN = ProbeSettings(interval=0.001, timeout=0.5, slow_probes_to_fail=2)
SELDOM = ProbeSettings(interval=3600)
STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
DRAINING = classify(Code.UNAVAILABLE, STOPPING)


@dataclass
class Probed:
    """One endpoint under a prober, and what was told of it: its state and the models that are not ready."""

    connection: ScriptedConnection
    endpoint: Endpoint
    prober: Prober | None = None
    told: list[tuple[State, tuple[str, ...]]] = field(default_factory=list)

    def note(self, endpoint: Endpoint) -> None:
        missing = tuple(name for (name, _), ready in endpoint.models.items() if not ready)
        self.told.append((endpoint.state, missing))

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with _within(60):
            while not is_so():  # noqa: ASYNC110  (no event tells of it: the point is what nobody is told)
                await asyncio.sleep(0.001)

    async def probes(self, number: int) -> None:
        """Return after so many more probes have begun, and all but the last have ended."""
        target = self.connection.asked.count("ServerLive") + number
        await self.until(lambda: self.connection.asked.count("ServerLive") >= target)


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    task = asyncio.current_task()
    assert task is not None
    timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
    try:
        yield
    finally:
        timer.cancel()


@contextlib.asynccontextmanager
async def probing(settings: ProbeSettings = OFTEN) -> AsyncIterator[Probed]:
    """Probes an endpoint for the models m and n:3."""
    connection = ScriptedConnection()
    probed = Probed(connection, Endpoint("main", "a:1", connection))
    probed.prober = Prober(probed.endpoint, [("m", ""), ("n", "3")], settings, probed.note)
    task = asyncio.ensure_future(probed.prober.run())
    try:
        yield probed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_probe_asks_for_the_server_and_each_watched_model() -> None:
    async with probing(SELDOM) as probed:
        assert probed.prober is not None
        await probed.prober.wait_first()
        assert sorted(probed.connection.asked) == ["ServerLive", "m:", "n:3"]
        assert probed.endpoint.state is State.READY
        assert probed.endpoint.models == {("m", ""): True, ("n", "3"): True}


async def test_only_changes_are_told() -> None:
    async with probing() as probed:
        await probed.probes(4)
        probed.connection.not_ready.add("m")
        await probed.probes(4)
        probed.connection.not_ready.clear()
        await probed.probes(4)
        probed.connection.live = False
        await probed.probes(4)
    assert probed.told == [
        (State.READY, ()),
        (State.READY, ("m",)),
        (State.READY, ()),
        (State.DOWN, ()),
    ]


async def test_what_a_failed_call_changed_is_told_too() -> None:
    async with probing() as probed:
        await probed.probes(2)
        probed.connection.failure = REFUSED
        probed.endpoint.failed(("m", ""), DRAINING, "Server is stopping")
        await probed.probes(2)
    assert [state for state, _ in probed.told] == [State.READY, State.DOWN]


async def test_a_refused_probe_takes_the_endpoint_down_and_the_next_good_one_brings_it_back() -> None:
    async with probing() as probed:
        await probed.probes(2)
        probed.connection.failure = REFUSED
        await probed.until(lambda: probed.endpoint.state is State.DOWN)
        assert probed.endpoint.reason == "connection refused"
        probed.connection.failure = None
        await probed.until(lambda: probed.endpoint.state is State.READY)
        assert probed.endpoint.reason == ""


async def test_one_slow_probe_is_forgiven_and_two_in_a_row_are_not() -> None:
    async with probing() as probed:
        await probed.probes(2)
        for _ in range(3):
            probed.connection.failure = TIMED_OUT
            await probed.probes(1)
            probed.connection.failure = None
            await probed.probes(2)
        assert probed.told == [(State.READY, ())]
        probed.connection.failure = TIMED_OUT
        await probed.until(lambda: probed.endpoint.state is State.DOWN)
        assert probed.endpoint.reason == "no answer to a probe in 0.5 s"


async def test_an_answer_that_is_no_message_takes_the_endpoint_down_and_probing_goes_on() -> None:
    async with probing() as probed:
        await probed.probes(2)
        probed.connection.garbage = b"\xff\xff\xff"
        await probed.until(lambda: probed.endpoint.state is State.DOWN)
        assert "no message of Triton's protocol" in probed.endpoint.reason
        probed.connection.garbage = None
        await probed.until(lambda: probed.endpoint.state is State.READY)


async def test_a_failed_call_brings_the_next_probe_forward() -> None:
    async with probing(SELDOM) as probed:
        assert probed.prober is not None
        await probed.prober.wait_first()
        probed.connection.failure = REFUSED
        probed.endpoint.failed(("m", ""), classify(Code.UNAVAILABLE, "", Origin.CONNECTION), "broken pipe")
        assert probed.endpoint.state is State.SUSPECT
        await probed.until(lambda: probed.endpoint.state is State.DOWN)


async def test_reasons_to_probe_are_no_storm() -> None:
    """A caller can give one with each of its calls."""
    async with probing(SELDOM) as probed:
        assert probed.prober is not None
        await probed.prober.wait_first()
        unclear = classify(Code.UNAVAILABLE, "the feature store is gone")
        began, seconds, asked = time.monotonic(), 0.0, 0
        while seconds < 0.5 or asked < 2:
            probed.endpoint.failed(("m", ""), unclear, "the feature store is gone")
            await asyncio.sleep(0.001)
            seconds, asked = time.monotonic() - began, probed.connection.asked.count("ServerLive")
        assert asked <= 2 + 10 * seconds
        assert probed.endpoint.state is State.READY


async def test_models_that_are_no_longer_watched_are_forgotten_and_new_ones_asked_for_at_once() -> None:
    async with probing(SELDOM) as probed:
        assert probed.prober is not None
        await probed.prober.wait_first()
        probed.prober.follow([("n", "3"), ("o", "")], SELDOM)
        assert probed.endpoint.models == {("n", "3"): True}
        await probed.until(lambda: probed.endpoint.models == {("n", "3"): True, ("o", ""): True})
