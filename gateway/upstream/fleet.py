"""I/O: every endpoint of every upstream, connected and probed. Follows the config and drops nothing in flight."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

from gateway.hooks import SharedMemoryNow
from gateway.upstream.connection import Connection
from gateway.upstream.endpoint import Endpoint, ModelKey
from gateway.upstream.health import Prober, ProbeSettings
from gateway.upstream.pool import Pool, SubsetPool
from gateway.upstream.room import Room, SharedMemorySettings
from gateway.upstream.shared_memory import SharedMemory
from gateway.upstream.subset import subset_of

_log = logging.getLogger(__name__)

_LINGER_SECONDS = 30.0  # a removed endpoint's connection stays for retries and sequences that began with it
_RELEASE_SECONDS = 10.0  # between two looks for endpoints outside of a subset that nobody needs any more
_RETIRE_SECONDS = 300.0  # and its calls may go on for so long before the connection is closed under them


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream as it should be. Endpoints that differ in nothing but models and probes are kept over a reload."""

    endpoints: tuple[str, ...]
    models: tuple[ModelKey, ...]  # those that variants use, to be watched
    probe: ProbeSettings
    dial: Callable[[str], Connection]
    identity: Hashable = None  # what `dial` depends on beside the address, to tell whether it has changed
    subset: int = 0  # how many of the endpoints to keep in touch with; 0: all
    memory: SharedMemorySettings | None = None  # what each endpoint shares with this worker; a part of the identity


@dataclass(slots=True)
class _Member:
    endpoint: Endpoint
    prober: Prober
    task: asyncio.Task[None]
    identity: Hashable


class Fleet:
    """Owns the endpoints between enter and exit: those that the settings want, and of an upstream with a subset also
    those outside of it that a sequence needs."""

    def __init__(
        self,
        changed: Callable[[Endpoint], None],
        left: Callable[[Endpoint], None] = lambda endpoint: None,
        *,
        place: float = 0.0,
        keep: float = math.inf,
    ) -> None:
        """changed: hears of every change of what an endpoint can do; left: of each that is no longer wanted.

        place: of this gateway among all, in [0, 1), which chooses its subsets; keep: seconds that an endpoint outside
        of them stays when no sequence needs it any more.
        """
        self._changed = changed
        self._left = left
        self._place = place
        self._keep = keep
        self._outside: set[tuple[str, str]] = set()  # members that are not in the subset of their upstream
        self._releasing: asyncio.Task[None] | None = None
        self._members: dict[tuple[str, str], _Member] = {}
        self._rooms: dict[str, Room] = {}  # for memory that is shared, by upstream, also with endpoints that have gone
        self._retiring: dict[asyncio.Task[None], _Member] = {}

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._releasing is not None:
            self._releasing.cancel()
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
        listed = {(name, address): settings for name, settings in upstreams.items() for address in settings.endpoints}
        inside = {name: self._inside(settings) for name, settings in upstreams.items()}
        wanted = {(name, address): upstreams[name] for name, addresses in inside.items() for address in addresses}
        kept = {key: m for key, m in self._members.items() if key in listed and m.identity == listed[key].identity}
        new = {key: Endpoint(*key, wanted[key].dial(key[1])) for key in wanted if key not in kept}
        for key, member in kept.items():
            member.prober.follow(listed[key].models, listed[key].probe)
        for name, settings in upstreams.items():
            if settings.memory is not None:
                self._rooms.setdefault(name, Room(0)).most = settings.memory.most
        gone = {key: member for key, member in self._members.items() if key not in kept}
        self._members = {**kept, **{key: self._begin(new[key], wanted[key]) for key in new}}
        self._outside = self._members.keys() - wanted.keys()
        for key, member in gone.items():
            self._let_go(member, for_good=key not in self._members)
        if self._releasing is None and any(len(inside[name]) < len(upstreams[name].endpoints) for name in upstreams):
            self._releasing = asyncio.ensure_future(self._release_again_and_again())
        return {name: self._pool(name, inside[name], settings) for name, settings in upstreams.items()}

    def _inside(self, settings: UpstreamSettings) -> tuple[str, ...]:
        if not settings.subset:
            return settings.endpoints
        return subset_of(settings.endpoints, settings.subset, self._place)

    def _pool(self, name: str, inside: tuple[str, ...], settings: UpstreamSettings) -> Pool:
        endpoints = [self._members[name, address].endpoint for address in inside]
        if len(inside) == len(settings.endpoints):
            return Pool(name, endpoints)
        return SubsetPool(name, endpoints, settings.endpoints, partial(self._maybe_reach, name, settings))

    def _maybe_reach(self, name: str, settings: UpstreamSettings, address: str) -> Endpoint | None:
        """An endpoint of an upstream, connected and probed from now on if it was not; None if it can't be dialled."""
        member = self._members.get((name, address))
        if member is None:
            try:
                endpoint = Endpoint(name, address, settings.dial(address))
            except OSError as error:  # of a file with certificates, which was there when the config came into force
                _log.warning("endpoint %s/%s can't be dialled: %s", name, address, error)
                return None
            endpoint.needed_at = time.monotonic()
            member = self._members[name, address] = self._begin(endpoint, settings)
            self._outside.add((name, address))
        return member.endpoint

    def outside(self, name: str) -> list[Endpoint]:
        """The endpoints outside of the subset of an upstream that are connected now."""
        return [self._members[key].endpoint for key in sorted(self._outside) if key[0] == name]

    def shared_memory(self) -> list[SharedMemoryNow]:
        """What the endpoints share with this worker. It may be called from any thread."""
        return [m.endpoint.memory.now() for m in list(self._members.values()) if m.endpoint.memory is not None]

    async def _release_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(_RELEASE_SECONDS)
            self._release(time.monotonic())

    def _release(self, now: float) -> None:
        """Let go of the endpoints outside of the subsets that no sequence has needed for a while."""
        for key in list(self._outside):
            endpoint = self._members[key].endpoint
            if not endpoint.in_flight and now - endpoint.needed_at > self._keep:
                self._outside.discard(key)
                self._let_go(self._members.pop(key), for_good=True)

    def _let_go(self, member: _Member, *, for_good: bool) -> None:
        """for_good: no other member takes its place."""
        member.task.cancel()  # now, so that nothing more is heard of it
        if for_good:
            self._left(member.endpoint)
        task = asyncio.ensure_future(self._retire(member))
        self._retiring[task] = member
        task.add_done_callback(lambda done: self._retiring.pop(done, None))

    async def wait_first_probes(self, timeout: float) -> None:
        """Return when every endpoint has been probed once, or after `timeout` seconds."""
        waits = [asyncio.ensure_future(member.prober.wait_first()) for member in self._members.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()

    def _begin(self, endpoint: Endpoint, settings: UpstreamSettings) -> _Member:
        endpoint.connection.tell_faults(endpoint.suspect)
        if settings.memory is not None:
            endpoint.memory = SharedMemory(endpoint, settings.memory, self._rooms[endpoint.upstream])
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
        if member.endpoint.memory is not None:
            await member.endpoint.memory.close()
        await member.endpoint.connection.aclose()

    @staticmethod
    async def _stop_probing(member: _Member) -> None:
        member.task.cancel()
        await asyncio.gather(member.task, return_exceptions=True)
        member.prober.close()
