"""RPCs that change a Triton server: each reaches every endpoint of its upstreams, or none.

First every endpoint is asked whether it lives; then all get the request; if some refuse, what the others did is undone,
as far as their state before is known. The caller gets the refusing endpoint's own status and text.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadRequest, ControlRefused, NoTarget, UpstreamFailed
from gateway.infer.inference import Inference
from gateway.infer.metadata import UPSTREAM_KEY, first_values, passed_on
from gateway.server.calls import is_loopback
from gateway.types import Metadata
from gateway.upstream.ask import Asker, as_error, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import Pool

Answer = TypeVar("Answer")

_REACHABLE_SECONDS = 2.0  # in which an endpoint must say that it lives, before anything is changed


class ControlPolicy(Enum):
    """From where RPCs that change a server may be called."""

    LOOPBACK = "loopback"
    ALL = "all"
    NONE = "none"


Undo = tuple[str, Any]
"""The RPC and request that put one endpoint back."""


@dataclass(frozen=True, slots=True)
class ControlRpc:
    """One of them."""

    request: type[Any]  # protobuf classes
    answer: type[Any]
    model_field: str = ""  # where the request names a model, if it does
    undo: Callable[[Endpoint, Any, Asker], Any] | None = (
        None  # awaitable giving a list of Undo, taken before the change
    )
    changes: bool = True
    loads: bool = False  # or unloads


async def _undo_load(endpoint: Endpoint, request: Any, asker: Asker) -> list[Undo]:
    ready = await _is_ready(endpoint, request.model_name, "", asker)
    if ready:
        return []  # a reload: what was loaded before can't be had back
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
    return [
        (
            "SystemSharedMemoryRegister",
            pb.SystemSharedMemoryRegisterRequest(name=r.name, key=r.key, offset=r.offset, byte_size=r.byte_size),
        )
        for r in regions
    ]


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
        pb.SystemSharedMemoryStatusRequest, pb.SystemSharedMemoryStatusResponse, changes=False
    ),
    "SystemSharedMemoryRegister": ControlRpc(
        pb.SystemSharedMemoryRegisterRequest, pb.SystemSharedMemoryRegisterResponse, "", _undo_system_register
    ),
    "SystemSharedMemoryUnregister": ControlRpc(
        pb.SystemSharedMemoryUnregisterRequest, pb.SystemSharedMemoryUnregisterResponse, "", _undo_system_unregister
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


class Control:
    """Carries them out."""

    def __init__(self, inference: Inference, policy: ControlPolicy) -> None:
        self._inference = inference
        self._policy = policy
        self._one_at_a_time = asyncio.Lock()  # two changes at once could undo each other

    async def call(self, method: str, request: Any, *, metadata: Metadata, peer: str) -> Any:
        """Carry out one RPC and return the first endpoint's answer.

        :raises ControlRefused: if the caller may not.
        :raises BadRequest: if the model named is public, or the upstream can't be told.
        :raises NoTarget: if an endpoint can't be reached; then nothing was changed.
        :raises UpstreamFailed: as an endpoint refused.
        """
        self._check_allowed(method, peer)
        rpc = RPCS[method]
        model = getattr(request, rpc.model_field) if rpc.model_field else ""
        endpoints = self._endpoints(method, model, first_values(metadata).get(UPSTREAM_KEY, ""))
        asker = Asker(passed_on(metadata))
        async with self._one_at_a_time:
            await self._check_reachable(method, endpoints, asker)
            return await _to_its_end(self._carry_out(method, rpc, request, endpoints, asker))

    async def _carry_out(
        self, method: str, rpc: ControlRpc, request: Any, endpoints: Sequence[Endpoint], asker: Asker
    ) -> Any:
        if not rpc.loads:
            return await self._apply(method, rpc, request, endpoints, asker)
        model = getattr(request, rpc.model_field)
        addresses = {endpoint.address for endpoint in endpoints}
        pools = self._inference.topology.pools.values()
        same = [endpoint for pool in pools for endpoint in pool.endpoints if endpoint.address in addresses]
        try:
            answer = await self._apply(method, rpc, request, endpoints, asker)
        finally:  # also where it was refused: then it has been undone
            for endpoint in same:
                endpoint.forget()  # all models: a load may reach some that it does not name, as an ensemble's
        await asyncio.gather(*(_look_again(endpoint, model, asker) for endpoint in same))
        return answer

    def _check_allowed(self, method: str, peer: str) -> None:
        if self._policy is ControlPolicy.ALL or (self._policy is ControlPolicy.LOOPBACK and is_loopback(peer)):
            return
        raise ControlRefused(
            f"{method} may not be called from here: server.control is '{self._policy.value}' in the gateway's config; "
            "'all' would allow it from everywhere, 'loopback' from the gateway's own host"
        )

    def _endpoints(self, method: str, model: str, upstream: str) -> Sequence[Endpoint]:
        topology = self._inference.topology
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
                f"{method} reaches every endpoint or none, and {names} can't be reached; nothing was changed. "
                f"The metadata key {UPSTREAM_KEY} chooses one upstream."
            )

    async def _apply(
        self, method: str, rpc: ControlRpc, request: Any, endpoints: Sequence[Endpoint], asker: Asker
    ) -> Any:
        undos = await self._how_to_undo(rpc, request, endpoints, asker)
        patient = replace(asker, timeout=None)  # a model may take minutes to load
        asked = [ask(endpoint, method, request, rpc.answer, patient) for endpoint in endpoints]
        results = await asyncio.gather(*asked, return_exceptions=True)
        failures = [result for result in results if isinstance(result, CallFailed)]
        if not failures:
            return results[0]
        done = [(e, u) for e, u, result in zip(endpoints, undos, results, strict=True) if not _failed(result)]
        error = as_error(failures[0])
        if done and rpc.changes:
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
        """Put endpoints back; answers the names of those where that was not possible."""
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


def _servers(pools: Iterable[Pool]) -> Sequence[Endpoint]:
    """Each Triton once, also if it is in several upstreams: the second time it would refuse."""
    return list({endpoint.address: endpoint for pool in pools for endpoint in pool.endpoints}.values())


async def _to_its_end(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Wait for work that must not be left half done, also if the caller goes away meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _is_ready(endpoint: Endpoint, model: str, version: str, asker: Asker) -> bool:
    """:raises CallFailed: if the endpoint can't be asked."""
    request = pb.ModelReadyRequest(name=model, version=version)
    return bool((await ask(endpoint, "ModelReady", request, pb.ModelReadyResponse, asker)).ready)


async def _look_again(endpoint: Endpoint, model: str, asker: Asker) -> None:
    """Learn at once what a load or unload has changed, so that the caller's next request finds it."""
    for name, version in [key for key in endpoint.models if key[0] == model]:
        with contextlib.suppress(CallFailed):  # the next probe will tell
            endpoint.models[name, version] = await _is_ready(endpoint, name, version, asker)
    endpoint.on_suspicion()


def _failed(result: Any) -> bool:
    return isinstance(result, BaseException)
