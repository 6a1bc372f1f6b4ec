"""I/O: asks endpoints whether they live and which of the watched models are ready.

`ServerLive` tells about the endpoint: Triton answers false there only while it shuts down. `ServerReady` is not used:
one model that is loading makes it false for all. A model that variants use is asked for by `ModelReady`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code
from gateway.upstream.ask import decoded
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint, ModelKey, State
from gateway.upstream.inference_probe import InferenceProbe, ProbeInference
from gateway.upstream.known import KnownModel
from gateway.v2.names import SERVICE

_MODELS_AT_ONCE = 8  # concurrent ModelReady calls to one endpoint


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How often and how patiently to ask. Seconds."""

    interval: float = 1.0
    timeout: float = 1.5
    slow_probes_to_fail: int = 2  # consecutive time-outs; a busy server must not be taken for a dead one at once
    inferences: Mapping[ModelKey, ProbeInference] = field(default_factory=dict)  # of the models that are tried out too


class Prober:
    """Probes one endpoint until closed.

    `changed` is called after each probe that leaves the endpoint in another state than it was last called for, for
    another reason or with other models, whether the probe or a failed call has changed it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        models: Sequence[ModelKey],
        settings: ProbeSettings,
        changed: Callable[[Endpoint], None],
    ) -> None:
        self.endpoint = endpoint
        self._models = tuple(models)
        self._settings = settings
        self._changed = changed
        self._told: object = None  # what `changed` was called for last
        self._wake = asyncio.Event()
        self._inferences: dict[ModelKey, InferenceProbe] = {}
        self._slow = 0
        self._took = 0.0  # seconds, the last probe if it was answered
        self._first = asyncio.Event()
        endpoint.on_suspicion = self._wake.set

    async def wait_first(self) -> None:
        """Return when one probe has ended, well or not."""
        await self._first.wait()

    def follow(self, models: Sequence[ModelKey], settings: ProbeSettings) -> None:
        """Change what is asked for and how, from the next probe on, which comes at once.

        If nothing changes, nothing happens: when one pod of a thousand is replaced, the others are not all asked.
        """
        if (tuple(models), settings) == (self._models, self._settings):
            return
        self._models = tuple(models)
        self._settings = settings
        for gone in set(self.endpoint.models) - set(models):
            del self.endpoint.models[gone]
        for key, probe in list(self._inferences.items()):
            if settings.inferences.get(key) != probe.settings:
                self._inferences.pop(key).close()
                self.endpoint.probed.pop(key, None)
        self._wake.set()

    def close(self) -> None:
        """To be called once it no longer runs."""
        for probe in self._inferences.values():
            probe.close()

    async def run(self) -> None:
        while True:
            await self._probe()
            if self.endpoint.state is not State.READY or all(each.has_ended for each in self._inferences.values()):
                self._first.set()
            await self._look_again()
            if self.endpoint.memory is not None and self.endpoint.state is State.READY:
                self.endpoint.memory.registration.look_soon()
            now = (self.endpoint.state, self.endpoint.reason, dict(self.endpoint.models), dict(self.endpoint.probed))
            if now != self._told and self.endpoint.state is not State.UNPROBED:
                self._told = now
                self._changed(self.endpoint)
            await self._pause()

    async def _pause(self) -> None:
        """Wait for the interval, or less if a call gave a reason to; never so little that it is a storm.

        Callers can give reasons without end, and a probe of thousands of models is work: half of the time is free.
        """
        least = min(max(0.1, self._took), self._settings.interval)
        await asyncio.sleep(least)
        rest = (self._settings.interval - least) * random.uniform(0.8, 1.2)  # noqa: S311  (spread, not secrecy)
        try:
            await asyncio.wait_for(self._wake.wait(), rest)
        except (TimeoutError, asyncio.TimeoutError):
            return
        finally:
            self._wake.clear()

    async def _probe(self) -> None:
        endpoint, clock = self.endpoint, asyncio.get_running_loop().time
        began = clock()
        try:
            live = await self._ask("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
            ready = await self._ready_models() if live.live else {}
        except CallFailed as failure:
            self._note_failure(failure)
            if self.endpoint.state is State.DOWN:
                self._try_out({})
            return
        self._slow, self._took = 0, clock() - began
        self._try_out(ready)
        for name, version in ready:
            if ready[name, version] != endpoint.models.get((name, version), ready[name, version]):
                endpoint.forget(name)
        endpoint.models = ready
        if live.live and endpoint.state is not State.READY:
            endpoint.forget()  # it may have been started again since it was last heard of
            if endpoint.state is not State.SUSPECT:
                endpoint.warm_up(clock())
            if endpoint.state is State.DOWN:
                endpoint.pardon(clock())
        if live.live:
            endpoint.state, endpoint.reason = State.READY, ""
        else:
            endpoint.state, endpoint.reason = State.DOWN, "the server says that it is not live"

    def _try_out(self, ready: dict[ModelKey, bool]) -> None:
        """Let models of which inferences are configured be ready only if these go well."""
        endpoint = self.endpoint
        for key, settings in self._settings.inferences.items():
            probe = self._inferences.get(key)
            if probe is None:
                probe = self._inferences[key] = InferenceProbe(endpoint, key, settings, self._wake.set)
            is_ready = ready.get(key, False)
            is_well = probe.look(is_ready)
            endpoint.probed[key] = "" if is_well else probe.reason
            if is_ready and not is_well:
                ready[key] = False

    def _note_failure(self, failure: CallFailed) -> None:
        self._took = 0.0
        if failure.code == Code.DEADLINE_EXCEEDED:
            self._slow += 1
            if self._slow < self._settings.slow_probes_to_fail:
                self._wake.set()  # whether it hangs or was only busy should be known soon
                return
            self.endpoint.reason = f"no answer to a probe in {self._settings.timeout:g} s"
        else:
            self.endpoint.reason = failure.text
        self.endpoint.state = State.DOWN

    async def _ready_models(self) -> dict[ModelKey, bool]:
        limit = asyncio.Semaphore(_MODELS_AT_ONCE)

        async def ask(model: ModelKey) -> bool:
            async with limit:
                request = pb.ModelReadyRequest(name=model[0], version=model[1])
                return bool((await self._ask("ModelReady", request, pb.ModelReadyResponse)).ready)

        models = self._models
        return dict(zip(models, await asyncio.gather(*map(ask, models)), strict=True))

    async def _look_again(self) -> None:
        """Ask whether the models that something is remembered of are still as they were; see `known`."""
        if self.endpoint.state is State.READY and self.endpoint.remembered:
            limit = asyncio.Semaphore(_MODELS_AT_ONCE)
            await asyncio.gather(*(self._look_at(known, limit) for known in list(self.endpoint.remembered.values())))

    async def _look_at(self, known: KnownModel, limit: asyncio.Semaphore) -> None:
        name, version = known.name, known.version
        async with limit:
            if not known.is_current:
                return
            before = known.counts
            try:
                config = pb.ModelConfigRequest(name=name, version=version)
                same = known.is_same_config((await self._ask("ModelConfig", config, pb.ModelConfigResponse)).config)
                counts = pb.ModelStatisticsRequest(name=name, version=version)
                statistics = await self._ask("ModelStatistics", counts, pb.ModelStatisticsResponse)
                same = known.is_same_count(statistics, before) and same
            except CallFailed:
                same = False  # it is gone, or nobody knows
            if not same and known.is_current:
                self.endpoint.forget(name)

    async def _ask(self, method: str, request: Any, response: Any) -> Any:
        """raises: CallFailed. Any: protobuf message classes, which carry no types of their own."""
        answer = await self.endpoint.connection.unary(
            SERVICE + method, request.SerializeToString(), (), self._settings.timeout
        )
        return decoded(method, answer.body, response)
