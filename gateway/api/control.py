"""RPCs that change a Triton server: each is carried out on every endpoint of its upstreams, or on none.

First every endpoint is asked whether it is live; then all get the request; if some refuse, the change is undone on the
others, as far as their state before is known. The caller gets the refusing endpoint's own status and text.

Changes of the same server are made one after the other, since two at once could undo each other. Changes of different
servers, and RPCs that change nothing, do not wait.

Regions that gateways share with their Tritons do not exist for callers: no answer shows them, and no change meets them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.access.door import Access
from gateway.access.policy import check_change
from gateway.api.calls import is_loopback
from gateway.errors import BadRequest, ControlRefused, DeadlineExceeded, NoTarget, UnknownModel, UpstreamFailed
from gateway.forwarding.metadata import UPSTREAM_KEY, first_values, passed_on
from gateway.forwarding.topology import CurrentTopology
from gateway.status import Code, Origin
from gateway.types import Metadata
from gateway.upstream.ask import TIMEOUT, Asker, as_error, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool, SubsetPool
from gateway.v2.shared_memory import RESERVED, is_reserved

_log = logging.getLogger(__name__)

_REACHABLE_SECONDS = 2.0  # an endpoint that does not answer ServerLive for so long can't be reached
_NOTICE: Final = 0.1  # part of a caller's time that is left when its waiting ends with an error
_MOST_NOTICE_SECONDS: Final = 0.5  # most of that time
_MOST_OF_NAME: Final = 200  # characters of a model's name in texts


class ControlPolicy(Enum):
    """Which callers may call RPCs that change a server."""

    LOOPBACK = "loopback"
    ALL = "all"
    NONE = "none"


Undo = tuple[str, Any]
"""The RPC and its request that undo a change on one endpoint."""


@dataclass(frozen=True, slots=True)
class ControlRpc:
    """How one RPC is carried out."""

    request: type[Any]  # protobuf class
    answer: type[Any]  # protobuf class
    model_field: str = ""  # the field of the request that names a model, "" if there is none
    undo: Callable[[Endpoint, Any, Asker], Any] | None = None  # a coroutine, awaited before the change: list[Undo]
    changes: bool = True  # does the RPC change the server?
    loads: bool = False  # does the RPC load or unload a model?
    on_one: Callable[[Endpoint, Any, Asker], Any] | None = None  # a coroutine in place of the plain question


async def _undo_load(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    ready = await _is_ready(endpoint, request.model_name, "", asker)
    if ready:
        return []  # the model was loaded before, and that version can't be brought back
    return [("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=request.model_name))]


async def _undo_unload(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    ready = await _is_ready(endpoint, request.model_name, "", asker)
    if not ready:
        return []
    return [("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=request.model_name))]


async def _undo_system_register(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    return [("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=request.name))]


async def _undo_cuda_register(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    return [("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(name=request.name))]


async def _undo_system_unregister(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    status = await ask(
        endpoint,
        "SystemSharedMemoryStatus",
        pb.SystemSharedMemoryStatusRequest(),
        pb.SystemSharedMemoryStatusResponse,
        asker,
    )
    regions = [region for region in status.regions.values() if request.name in ("", region.name)]
    regions = [region for region in regions if not is_reserved(region.name)]
    return [
        (
            "SystemSharedMemoryRegister",
            pb.SystemSharedMemoryRegisterRequest(name=r.name, key=r.key, offset=r.offset, byte_size=r.byte_size),
        )
        for r in regions
    ]


async def _unregister(endpoint: Endpoint, request: Any, asker: Asker) -> Any:
    """Unregister what was asked for. If that is all of them, those of gateways stay, as each of the others goes."""
    method, answer = "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterResponse
    if request.name:
        return await ask(endpoint, method, request, answer, asker)
    question = pb.SystemSharedMemoryStatusRequest()
    status = await ask(endpoint, "SystemSharedMemoryStatus", question, pb.SystemSharedMemoryStatusResponse, asker)
    if not any(is_reserved(name) for name in status.regions):
        return await ask(endpoint, method, request, answer, asker)
    for name in status.regions:
        if not is_reserved(name):
            await ask(endpoint, method, pb.SystemSharedMemoryUnregisterRequest(name=name), answer, asker)
    return answer()


async def _status(endpoint: Endpoint, request: Any, asker: Asker) -> Any:
    answer = pb.SystemSharedMemoryStatusResponse
    status = await ask(endpoint, "SystemSharedMemoryStatus", request, answer, asker)
    for name in [name for name in status.regions if is_reserved(name)]:
        del status.regions[name]
    return status


async def _undo_trace(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    question = pb.TraceSettingRequest(model_name=request.model_name)
    before = await ask(endpoint, "TraceSetting", question, pb.TraceSettingResponse, asker)
    back = pb.TraceSettingRequest(model_name=request.model_name)
    for key in request.settings:
        back.settings[key].value.extend(before.settings[key].value)
    return [("TraceSetting", back)]


async def _undo_log(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    before = await ask(endpoint, "LogSettings", pb.LogSettingsRequest(), pb.LogSettingsResponse, asker)
    back = pb.LogSettingsRequest()
    for key in request.settings:
        back.settings[key].ParseFromString(before.settings[key].SerializeToString())
    return [("LogSettings", back)]


RPCS: Mapping[str, ControlRpc] = {
    "RepositoryModelLoad": ControlRpc(
        pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse, "model_name", _undo_load, loads=True
    ),
    "RepositoryModelUnload": ControlRpc(
        pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse, "model_name", _undo_unload, loads=True
    ),
    "SystemSharedMemoryStatus": ControlRpc(
        pb.SystemSharedMemoryStatusRequest, pb.SystemSharedMemoryStatusResponse, changes=False, on_one=_status
    ),
    "SystemSharedMemoryRegister": ControlRpc(
        pb.SystemSharedMemoryRegisterRequest, pb.SystemSharedMemoryRegisterResponse, "", _undo_system_register
    ),
    "SystemSharedMemoryUnregister": ControlRpc(
        pb.SystemSharedMemoryUnregisterRequest,
        pb.SystemSharedMemoryUnregisterResponse,
        "",
        _undo_system_unregister,
        on_one=_unregister,
    ),
    "CudaSharedMemoryStatus": ControlRpc(
        pb.CudaSharedMemoryStatusRequest, pb.CudaSharedMemoryStatusResponse, changes=False
    ),
    "CudaSharedMemoryRegister": ControlRpc(
        pb.CudaSharedMemoryRegisterRequest, pb.CudaSharedMemoryRegisterResponse, "", _undo_cuda_register
    ),
    # The handle of a CUDA region can't be read back, so unregistering can't be undone.
    "CudaSharedMemoryUnregister": ControlRpc(
        pb.CudaSharedMemoryUnregisterRequest, pb.CudaSharedMemoryUnregisterResponse
    ),
    "TraceSetting": ControlRpc(pb.TraceSettingRequest, pb.TraceSettingResponse, "model_name", _undo_trace),
    "LogSettings": ControlRpc(pb.LogSettingsRequest, pb.LogSettingsResponse, "", _undo_log),
}


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """Time that changes get, in seconds."""

    longest: float = 600.0  # for one request that changes a server: a model may take minutes to load
    slow: float = 60.0  # a change that takes longer is logged


@dataclass(eq=False, slots=True)
class _Change:
    """A change that is being made, or waits for earlier changes of the same servers."""

    what: str
    addresses: frozenset[str]  # of the servers that it changes
    began: float = 0.0  # when it stopped waiting, on the monotonic clock; 0 while it waits
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        return f"{self.what} (for {time.monotonic() - self.began:.0f} s)" if self.began else self.what


class Control:
    """Carries out these RPCs."""

    def __init__(self, topology: CurrentTopology, policy: ControlPolicy, limits: ControlLimits | None = None) -> None:
        self._topology = topology
        self._policy = policy
        self._limits = limits or ControlLimits()
        self._changes: list[_Change] = []  # changes that have not ended, oldest first
        self._tasks: set[asyncio.Task[Any]] = set()  # changes that are being made

    async def call(
        self,
        method: str,
        request: Any,
        *,
        metadata: Metadata,
        peer: str,
        remaining: float | None = None,
        access: Access | None = None,
    ) -> Any:
        """Carry out one RPC and return the first endpoint's answer.

        A change that has begun goes on when its caller goes away: it must not be left half done.

        remaining: seconds until the caller's deadline, None if it has none.
        access: of the caller, if that is checked.
        :raises UnknownModel: if this caller may not use the model by its own name.
        :raises ControlRefused: if this caller may not change a server, or an upstream with a subset is to be changed.
        :raises BadRequest: if the model is a public one, it is unclear which upstream is meant, or a parameter reaches
            beyond the model that this caller may change.
        :raises NoTarget: if an endpoint can't be reached; then nothing was changed.
        :raises UpstreamFailed: with the status of an endpoint that refused.
        :raises DeadlineExceeded: if earlier changes of the same servers take too long; then nothing was changed.
        """
        self._check_allowed(method, peer)
        rpc = RPCS[method]
        model = getattr(request, rpc.model_field) if rpc.model_field else ""
        if model and access is not None and not access.scope.covers(model, False):
            raise UnknownModel(model)
        if rpc.loads and access is not None:
            check_change(request.parameters, access.scope.allowed(model, False))
        endpoints = self._endpoints(method, model, first_values(metadata).get(UPSTREAM_KEY, ""))
        if method in _ABOUT_REGIONS and (is_reserved(request.name) or is_reserved(getattr(request, "key", ""))):
            return _as_if_unknown(method, rpc, request)
        asker = Asker(passed_on(metadata))
        if _only_asks(rpc, request):
            asker = replace(asker, timeout=TIMEOUT if remaining is None else remaining)
            await self._check_reachable(method, endpoints, asker)
            return await self._apply(method, rpc, request, endpoints, asker)
        self._check_reaches_all(method, endpoints)
        change = _Change(_named(method, model, endpoints), frozenset(each.address for each in endpoints))
        with contextlib.ExitStack() as unless_begun:
            self._changes.append(change)
            unless_begun.callback(self._end, change)
            await self._wait_for_others(change, remaining)
            await self._check_reachable(method, endpoints, asker)
            task = asyncio.ensure_future(self._carry_out(method, rpc, request, endpoints, asker))
            self._tasks.add(task)
            slow = asyncio.get_running_loop().call_later(self._limits.slow, _tell_slow, change)
            task.add_done_callback(lambda done: self._made(change, done, slow))
            unless_begun.pop_all()
        return await asyncio.shield(task)

    async def finish(self, seconds: float) -> None:
        """Wait at most so long for changes that are being made, even if their callers have gone."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def aclose(self) -> None:
        """Cancel changes that are still being made."""
        for change in self._changes:
            if change.began:
                _log.error("%s is cancelled, since the gateway stops; the servers may go on with it", change)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _wait_for_others(self, change: _Change, remaining: float | None) -> None:
        """Wait for earlier changes of the same servers.

        :raises DeadlineExceeded: shortly before the caller's deadline, so that the caller learns what it waited for.
        """
        before = [other for other in self._changes if other is not change and other.addresses & change.addresses]
        if not before:
            change.began = time.monotonic()
            return
        patience = None if remaining is None else remaining - min(_NOTICE * remaining, _MOST_NOTICE_SECONDS)
        try:
            await asyncio.wait_for(_all_ended(before), patience)
        except (TimeoutError, asyncio.TimeoutError):
            running = ", ".join(str(other) for other in before if not other.ended.is_set())
            raise DeadlineExceeded(
                f"{change.what} waits for other changes of the same servers: {running}; nothing was changed"
            ) from None
        change.began = time.monotonic()

    def _end(self, change: _Change) -> None:
        self._changes.remove(change)
        change.ended.set()

    def _made(self, change: _Change, task: asyncio.Task[Any], slow: asyncio.TimerHandle) -> None:
        slow.cancel()
        self._tasks.discard(task)
        self._end(change)
        if not task.cancelled():
            task.exception()  # marks it as seen: if the caller has gone, asyncio would log it

    async def _carry_out(
        self, method: str, rpc: ControlRpc, request: Any, endpoints: Sequence[Endpoint], asker: Asker
    ) -> Any:
        if not rpc.loads:
            return await self._apply(method, rpc, request, endpoints, asker)
        model = getattr(request, rpc.model_field)
        addresses = {endpoint.address for endpoint in endpoints}
        pools = self._topology.now.pools.values()
        same = [endpoint for pool in pools for endpoint in pool.endpoints if endpoint.address in addresses]
        try:
            answer = await self._apply(method, rpc, request, endpoints, asker)
        finally:  # a change that was refused has been undone, which is a change as well
            for endpoint in same:
                endpoint.forget()  # all models, since a load may load others, such as those of an ensemble
        await asyncio.gather(*(_look_again(endpoint, model, asker) for endpoint in same))
        return answer

    def _check_allowed(self, method: str, peer: str) -> None:
        if self._policy is ControlPolicy.ALL or (self._policy is ControlPolicy.LOOPBACK and is_loopback(peer)):
            return
        raise ControlRefused(
            f"{method} may not be called from here: server.control is '{self._policy.value}' in the gateway's config; "
            "'all' allows it from everywhere, 'loopback' from the gateway's own host"
        )

    def _check_reaches_all(self, method: str, endpoints: Sequence[Endpoint]) -> None:
        pools = self._topology.now.pools
        for name in dict.fromkeys(endpoint.upstream for endpoint in endpoints):
            if isinstance(pools[name], SubsetPool):
                raise ControlRefused(
                    f"{method} must change every endpoint or none, but this gateway keeps in touch with a subset of "
                    f"upstream '{name}'; ask its servers themselves, or name another upstream in the metadata key "
                    f"{UPSTREAM_KEY}"
                )

    def _endpoints(self, method: str, model: str, upstream: str) -> Sequence[Endpoint]:
        topology = self._topology.now
        if model in topology.pipelines:
            raise BadRequest(f"'{model}' is a pipeline of the gateway; {method} takes a Triton model's own name")
        if model in topology.routes.public:
            names = ", ".join(variant.model for variant in topology.routes.public[model].variants)
            raise BadRequest(f"'{model}' is a public model; {method} takes a Triton model's own name: {names}")
        if upstream:
            if upstream not in topology.pools:
                raise BadRequest(f"{UPSTREAM_KEY}: no upstream '{upstream}'; known: {', '.join(topology.pools)}")
            return topology.pools[upstream].endpoints
        route = topology.routes.lookup(model) if model else None
        if route is not None:
            names_of = dict.fromkeys(variant.upstream for variant in route.variants)
            return _servers(topology.pools[name] for name in names_of)
        if model and len(topology.pools) > 1:
            raise BadRequest(
                f"no variant uses model '{model}': name an upstream in the metadata key {UPSTREAM_KEY}; "
                f"known: {', '.join(topology.pools)}"
            )
        return _servers(topology.pools.values())

    async def _check_reachable(self, method: str, endpoints: Sequence[Endpoint], asker: Asker) -> None:
        soon = replace(asker, timeout=_REACHABLE_SECONDS)
        asked = [ask(e, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse, soon) for e in endpoints]
        results = await asyncio.gather(*asked, return_exceptions=True)
        dead = [e for e, result in zip(endpoints, results, strict=True) if isinstance(result, CallFailed)]
        if dead:
            names = ", ".join(f"{e.upstream}/{e.address}" for e in dead)
            raise NoTarget(
                f"{method} must change every endpoint or none, but {names} can't be reached; nothing was changed. "
                f"The metadata key {UPSTREAM_KEY} chooses one upstream."
            )

    async def _apply(
        self, method: str, rpc: ControlRpc, request: Any, endpoints: Sequence[Endpoint], asker: Asker
    ) -> Any:
        changes = not _only_asks(rpc, request)
        undos = await self._how_to_undo(rpc, request, endpoints, asker) if changes else [[] for _ in endpoints]
        patient = replace(asker, timeout=self._limits.longest) if changes else asker
        if rpc.on_one is not None:
            asked = [rpc.on_one(endpoint, request, patient) for endpoint in endpoints]
        else:
            asked = [ask(endpoint, method, request, rpc.answer, patient) for endpoint in endpoints]
        results = await asyncio.gather(*asked, return_exceptions=True)
        failures = [result for result in results if isinstance(result, CallFailed)]
        if not failures:
            return results[0]
        done = [(e, u) for e, u, result in zip(endpoints, undos, results, strict=True) if not _failed(result)]
        error = as_error(failures[0])
        if changes and failures[0].origin is Origin.GIVEN_UP:
            text = (
                f"{method} did not end within {self._limits.longest:g} s; the gateway waits no longer, "
                "but the server may go on with it"
            )
            error = UpstreamFailed(error.code, text, error.trailers)
        if done and changes:
            left = await self._undo(done, asker)
            outcome = f"could not be undone on {', '.join(left)}" if left else "was undone on the others"
            error = UpstreamFailed(error.code, f"{error.text} ({method} {outcome})", error.trailers)
        raise error

    async def _how_to_undo(
        self, rpc: ControlRpc, request: Any, endpoints: Sequence[Endpoint], asker: Asker
    ) -> list[list[Undo]]:
        if rpc.undo is None or len(endpoints) == 1:
            return [[] for _ in endpoints]
        try:
            return list(await asyncio.gather(*(rpc.undo(endpoint, request, asker) for endpoint in endpoints)))
        except CallFailed as failure:
            raise as_error(failure) from failure

    async def _undo(self, done: Sequence[tuple[Endpoint, Sequence[Undo]]], asker: Asker) -> list[str]:
        """Undo a change on endpoints; returns the names of those where that was not possible."""
        left = []
        for endpoint, steps in done:
            undone = bool(steps)
            for method, request in steps:
                try:
                    await ask(endpoint, method, request, RPCS[method].answer, asker)
                except CallFailed:
                    undone = False
            if not undone:
                left.append(f"{endpoint.upstream}/{endpoint.address}")
        return left


_ABOUT_REGIONS: Final = frozenset(
    f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Status", "Register", "Unregister")
)


def _as_if_unknown(method: str, rpc: ControlRpc, request: Any) -> Any:
    """What Triton says of a region that it does not know; nobody is asked.

    :raises BadRequest: if one is to be registered under such a name, or over such memory.
    :raises UpstreamFailed: as Triton, if its status is wanted.
    """
    if method.endswith("Unregister"):
        return rpc.answer()
    if method.endswith("Register"):
        raise BadRequest(f"names and keys of shared memory that begin with '{RESERVED}' are the gateway's own")
    kind = method.removesuffix("SharedMemoryStatus").lower()
    raise UpstreamFailed(Code.NOT_FOUND, f"Unable to find {kind} shared memory region: '{request.name}'", ())


def _servers(pools: Iterable[Pool]) -> Sequence[Endpoint]:
    """Each Triton server once, even if it is in several upstreams: it would refuse the change the second time."""
    return list({endpoint.address: endpoint for pool in pools for endpoint in pool.endpoints}.values())


def _only_asks(rpc: ControlRpc, request: Any) -> bool:
    """Does the RPC change nothing? TraceSetting and LogSettings without settings only ask."""
    return not rpc.changes or ("settings" in request.DESCRIPTOR.fields_by_name and not request.settings)


def _named(method: str, model: str, endpoints: Sequence[Endpoint]) -> str:
    """A change in words, for callers and the log; without addresses, which callers must not learn."""
    upstreams = ", ".join(dict.fromkeys(endpoint.upstream for endpoint in endpoints))
    of = f" of '{model[:_MOST_OF_NAME]}'" if model else ""
    return f"{method}{of} on {upstreams}"


def _tell_slow(change: _Change) -> None:
    _log.warning("%s has not ended yet; other changes of the same servers wait for it", change)


async def _all_ended(changes: Iterable[_Change]) -> None:
    for change in changes:
        await change.ended.wait()


async def _is_ready(endpoint: Endpoint, model: str, version: str, asker: Asker) -> bool:
    """Is a model ready on an endpoint? raises: CallFailed if the endpoint does not answer."""
    request = pb.ModelReadyRequest(name=model, version=version)
    return bool((await ask(endpoint, "ModelReady", request, pb.ModelReadyResponse, asker)).ready)


async def _look_again(endpoint: Endpoint, model: str, asker: Asker) -> None:
    """Learn at once what a load or unload has changed, so that the caller's next request finds the model."""
    for name, version in [key for key in endpoint.models if key[0] == model]:
        with contextlib.suppress(CallFailed):  # the next probe will find out
            endpoint.models[name, version] = await _is_ready(endpoint, name, version, asker)
    endpoint.on_suspicion()


def _failed(result: Any) -> bool:
    return isinstance(result, BaseException)
