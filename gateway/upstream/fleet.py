"""I/O: every endpoint of every upstream, connected and probed. Follows the config and drops nothing in flight."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from gateway.upstream.connection import Connection
from gateway.upstream.endpoint import Endpoint, ModelKey
from gateway.upstream.health import Prober, ProbeSettings
from gateway.upstream.pool import Pool

_LINGER_SECONDS = 30.0  # a removed endpoint's connection stays for retries and sequences that began with it
_RETIRE_SECONDS = 300.0  # and its calls may go on for so long before the connection is closed under them


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream as it should be. Endpoints that differ in nothing but models and probes are kept over a reload."""

    endpoints: tuple[str, ...]
    models: tuple[ModelKey, ...]  # those that variants use, to be watched
    probe: ProbeSettings
    dial: Callable[[str], Connection]
    identity: Hashable = None  # what `dial` depends on beside the address, to tell whether it has changed


@dataclass(slots=True)
class _Member:
    endpoint: Endpoint
    prober: Prober
    task: asyncio.Task[None]
    identity: Hashable


class Fleet:
    """Owns the endpoints between enter and exit."""

    def __init__(
        self, changed: Callable[[Endpoint], None], left: Callable[[Endpoint], None] = lambda endpoint: None
    ) -> None:
        """changed: hears of every change of what an endpoint can do; left: of each that is no longer wanted."""
        self._changed = changed
        self._left = left
        self._members: dict[tuple[str, str], _Member] = {}
        self._retiring: dict[asyncio.Task[None], _Member] = {}

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        retiring, self._retiring = self._retiring, {}
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        members = [*retiring.values(), *self._members.values()]
        self._members.clear()
        for member in members:
            await self._close(member)

    def apply(self, upstreams: Mapping[str, UpstreamSettings]) -> dict[str, Pool]:
        """Make the endpoints what the settings say and return the pools; retire the others once they are idle.

        Raises what `dial` raises; then nothing has changed.
        """
        wanted = {(name, address): settings for name, settings in upstreams.items() for address in settings.endpoints}
        kept = {key: m for key, m in self._members.items() if key in wanted and m.identity == wanted[key].identity}
        new = {key: Endpoint(*key, wanted[key].dial(key[1])) for key in wanted if key not in kept}
        for key, member in kept.items():
            member.prober.follow(wanted[key].models, wanted[key].probe)
        gone = {key: member for key, member in self._members.items() if key not in kept}
        self._members = {key: kept.get(key) or self._begin(new[key], wanted[key]) for key in wanted}
        for key, member in gone.items():
            member.task.cancel()  # now, so that nothing more is heard of it
            if key not in wanted:
                self._left(member.endpoint)
            task = asyncio.ensure_future(self._retire(member))
            self._retiring[task] = member
            task.add_done_callback(lambda done: self._retiring.pop(done, None))
        return {
            name: Pool(name, [self._members[name, address].endpoint for address in settings.endpoints])
            for name, settings in upstreams.items()
        }

    async def wait_first_probes(self, timeout: float) -> None:
        """Return when every endpoint has been probed once, or after `timeout` seconds."""
        waits = [asyncio.ensure_future(member.prober.wait_first()) for member in self._members.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()

    def _begin(self, endpoint: Endpoint, settings: UpstreamSettings) -> _Member:
        endpoint.connection.tell_faults(endpoint.suspect)
        prober = Prober(endpoint, settings.models, settings.probe, self._changed)
        return _Member(endpoint, prober, asyncio.ensure_future(prober.run()), settings.identity)

    async def _retire(self, member: _Member) -> None:
        """Close a removed endpoint once nobody can need it any more."""
        await self._stop_probing(member)
        await asyncio.sleep(_LINGER_SECONDS)
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(member.endpoint.wait_idle(), _RETIRE_SECONDS)
        await self._close(member)

    async def _close(self, member: _Member) -> None:
        await self._stop_probing(member)
        member.endpoint.close()
        await member.endpoint.connection.aclose()

    @staticmethod
    async def _stop_probing(member: _Member) -> None:
        member.task.cancel()
        await asyncio.gather(member.task, return_exceptions=True)
        member.prober.close()
