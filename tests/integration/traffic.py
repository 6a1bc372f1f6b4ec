"""A gateway in this process with a config of the test's own, and calls that go on while the test breaks something."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import yaml
from patience import HANG
from v2_calls import Metadata, Outcome, call, channel_to, infer

from gateway.app import Gateway, Place
from gateway.config import load

OK = grpc.StatusCode.OK
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def config(upstreams: dict[str, Any], models: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config that listens on free ports. upstreams: addresses by name, or whole sections."""
    sections = {
        name: value if isinstance(value, dict) else {"endpoints": [value] if isinstance(value, str) else list(value)}
        for name, value in upstreams.items()
    }
    return {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "telemetry": {"access_log": {"destination": "none"}},
        "upstreams": sections,
        "models": models,
        **more,
    }


def patient(*addresses: str) -> dict[str, Any]:
    """An upstream whose servers are not taken for dead, however late a busy machine lets them answer probes."""
    return {"endpoints": list(addresses), "probe_timeout": "30s", "slow_probes_to_fail": 100}


def write(file: Path, content: dict[str, Any]) -> Path:
    """Replace the file in one step, as editors and deployments do."""
    partial = file.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(content, sort_keys=False))
    return partial.rename(file)


@contextlib.asynccontextmanager
async def gateway(file: Path) -> AsyncIterator[Gateway]:
    """A gateway that follows the file."""
    loaded = load(file, {})
    async with Gateway(loaded, lambda: load(file, {}), {}, Place(loaded.config.admin.listen)) as running:
        yield running


@dataclass(frozen=True)
class Ended:
    """How one call went. Instants are of `time.monotonic()`."""

    began: float
    at: float
    outcome: Outcome

    @property
    def code(self) -> grpc.StatusCode:
        return self.outcome.code

    @property
    def variant(self) -> str:
        return str(self.outcome.trailers.get("gateway-variant", ""))

    @property
    def endpoint(self) -> str:
        return str(self.outcome.trailers.get("gateway-endpoint", ""))


@dataclass
class Traffic:
    """Callers that each make one call after another."""

    calls: list[Ended] = field(default_factory=list)

    def since(self, at: float) -> list[Ended]:
        """The calls that began at or after that instant."""
        return [ended for ended in self.calls if ended.began >= at]

    @property
    def failed(self) -> list[Ended]:
        return [ended for ended in self.calls if ended.code is not OK]

    def variants(self, since: float = 0.0) -> Counter[str]:
        return Counter(ended.variant for ended in self.since(since) if ended.code is OK)

    def endpoints(self, since: float = 0.0) -> Counter[str]:
        return Counter(ended.endpoint for ended in self.since(since) if ended.code is OK)

    def latest(self, count: int = 100) -> Counter[str]:
        """How many of the latest calls each variant answered, and each endpoint."""
        ended = [each for each in self.calls[-count:] if each.code is OK]
        return Counter(name for each in ended for name in (each.variant, each.endpoint))

    def why(self) -> Counter[str]:
        """The failures, for an assertion's message."""
        return Counter(f"{ended.code.name}: {ended.outcome.text}" for ended in self.failed)

    async def until(self, holds: Callable[[], bool], within: float, what: str) -> float:
        """Wait for a condition while calls go on; answers how long it took, in seconds."""
        return await until(holds, within, what, lambda: f"{self.variants()} {self.why()}")

    async def more(self, count: int, within: float = 120.0) -> list[Ended]:
        """Wait until so many calls that begin from now on have ended, and answer them."""
        now = time.monotonic()
        await self.until(lambda: len(self.since(now)) >= count, within, f"{count} calls")
        return self.since(now)


@contextlib.asynccontextmanager
async def traffic(
    address: str,
    request: Any = None,
    *,
    callers: int = 4,
    pause: float = 0.004,
    timeout: float = 10,
    metadata: Callable[[int], Metadata] = lambda _: (),
) -> AsyncIterator[Traffic]:
    """Makes calls until the block ends, and then waits for those in flight.

    request:   a message; None asks the model `adder`.
    pause:     seconds between two calls of one caller, so that client, gateway and Triton share two cores.
    metadata:  of a call, by its number.
    """
    body = (request or infer("adder")).SerializeToString()
    made = Traffic()
    going = True

    async def caller(channel: grpc.aio.Channel, first: int) -> None:
        number = first
        while going:
            began = time.monotonic()
            outcome = await call(channel, body, metadata=metadata(number), timeout=timeout)
            made.calls.append(Ended(began, time.monotonic(), outcome))
            number += callers
            await asyncio.sleep(pause)

    async with channel_to(address) as channel:
        tasks = [asyncio.ensure_future(caller(channel, first)) for first in range(callers)]
        try:
            yield made
        finally:
            going = False
            await asyncio.gather(*tasks)


async def until(holds: Callable[[], bool], within: float, what: str, told: Callable[[], object] = lambda: "") -> float:
    """Wait until a condition holds; answers how long it took, in seconds.

    within:  seconds that are enough where nothing else runs. It is given up after HANG, or after this if it is more.
    """
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < max(within, HANG), f"{what}: not within {within} s; {told()}"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def http(address: str, path: str) -> tuple[int, Any]:
    """Status and JSON, or text, of the admin plane."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as answer:
        json = answer.content_type == "application/json"
        return answer.status, await (answer.json() if json else answer.text())


async def until_readyz(address: str, ready: bool, within: float) -> float:
    """Wait for /readyz to say so; answers how long it took, in seconds. within: as for `until`."""
    began = time.monotonic()
    while (await http(address, "/readyz"))[0] != (200 if ready else 503):
        assert time.monotonic() - began < max(within, HANG), f"/readyz is not {ready} within {within} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began
