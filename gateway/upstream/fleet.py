"""I/O: every endpoint of every upstream, connected and probed. Follows the config and drops nothing in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.upstream.connection import Connection
from gateway.upstream.endpoint import Endpoint, ModelKey
from gateway.upstream.health import Prober, ProbeSettings
from gateway.upstream.pool import Pool

_RETIRE_SECONDS = 300.0  # a removed endpoint's calls may go on for so long before its connection is closed under them


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream as it should be. Endpoints that differ in nothing but their models are kept over a reload."""

    endpoints: tuple[str, ...]
    models: tuple[ModelKey, ...]  # those that variants use, to be watched
    probe: ProbeSettings
    dial: Callable[[str], Connection]
    identity: object = None  # what `dial` depends on beside the address, to tell whether it has changed


@dataclass(slots=True)
class _Member:
    endpoint: Endpoint
    prober: Prober
    task: asyncio.Task[None]
    made_of: tuple[object, ...]


class Fleet:
    """Owns the endpoints between enter and exit."""

    def __init__(self, changed: Callable[[Endpoint], None]) -> None:
        """changed: hears of every change of what an endpoint can do."""
        self._changed = changed
        self._members: dict[tuple[str, str], _Member] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        members = list(self._members.values())
        self._members.clear()
        for member in members:
            await self._close(member)

    def apply(self, upstreams: Mapping[str, UpstreamSettings]) -> dict[str, Pool]:
        """Make the endpoints what the settings say and return the pools; retire the others once they are idle."""
        wanted: dict[tuple[str, str], _Member] = {}
        pools = {}
        for name, settings in upstreams.items():
            members = [self._member(name, address, settings) for address in settings.endpoints]
            wanted.update(zip([(name, address) for address in settings.endpoints], members, strict=True))
            pools[name] = Pool(name, [member.endpoint for member in members])
        gone = [member for key, member in self._members.items() if wanted.get(key) is not member]
        self._members = wanted
        for member in gone:
            task = asyncio.ensure_future(self._retire(member))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return pools

    async def wait_first_probes(self, timeout: float) -> None:
        """Return when every endpoint has been probed once, or after `timeout` seconds."""
        waits = [asyncio.ensure_future(member.prober.wait_first()) for member in self._members.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()

    def _member(self, upstream: str, address: str, settings: UpstreamSettings) -> _Member:
        made_of = (settings.identity, settings.probe)
        known = self._members.get((upstream, address))
        if known is not None and known.made_of == made_of:
            known.prober.watch(settings.models)
            return known
        endpoint = Endpoint(upstream, address, settings.dial(address))
        prober = Prober(endpoint, settings.models, settings.probe, self._changed)
        return _Member(endpoint, prober, asyncio.ensure_future(prober.run()), made_of)

    async def _retire(self, member: _Member) -> None:
        await self._stop_probing(member)
        idle = asyncio.ensure_future(member.endpoint.wait_idle())
        await asyncio.wait({idle}, timeout=_RETIRE_SECONDS)
        idle.cancel()
        await member.endpoint.connection.aclose()

    async def _close(self, member: _Member) -> None:
        await self._stop_probing(member)
        await member.endpoint.connection.aclose()

    @staticmethod
    async def _stop_probing(member: _Member) -> None:
        member.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await member.task
