"""Composition root of one worker: a loaded config becomes objects, entered in order and left in reverse.

The one module that knows all rooms. What is shared between workers is the config and the metrics directory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from gateway.admin import Admin, ConfigHistory, Connections
from gateway.api.calls import CallLimits
from gateway.api.catalogue import Catalogue
from gateway.api.control import Control, ControlPolicy
from gateway.api.health import HealthService
from gateway.api.listener import Listener, Register, ServerSettings, ServerTls
from gateway.api.relay import Relay
from gateway.api.stream_caller import StreamRelay
from gateway.api.typed import ClassificationService, PredictionService, add_prediction_service
from gateway.api.v2 import V2Service
from gateway.assemble import collected_of, memory_of, merges_of, names_of, routes_of, upstreams_of
from gateway.compiled import is_compiled
from gateway.config import Config, Finding, Loaded, Watcher
from gateway.container import memory_limit
from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.contracts import Contracts
from gateway.forwarding.inference import Inference
from gateway.forwarding.models import Models
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.streams import StreamLimits
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import Topology
from gateway.hooks import ConfigChanged, ConnectionFull, EndpointChanged, PipelinesNow
from gateway.notifier import Changes
from gateway.routing import Routes
from gateway.rpc.budget import Budget
from gateway.state import state_of
from gateway.steps.budget import MEMORY
from gateway.telemetry.pipeline_totals import PipelineTotals
from gateway.telemetry.process import ProcessTelemetry
from gateway.telemetry.shared_values import SharedDirectory
from gateway.transport.listener import COLLECTED, ForwardMethod
from gateway.upstream.discovery import Discovery
from gateway.upstream.endpoint import Endpoint, State
from gateway.upstream.fleet import Fleet
from gateway.v1 import classification_pb2_grpc
from gateway.v2.names import INFER, SERVICE_NAME, STREAM

_log = logging.getLogger(__name__)

VERSION = version("inference-gateway")
_FIRST_LOOK_UPS_SECONDS = 3.0  # how long a config waits for the addresses behind its names before it is in force
_FIRST_PROBES_SECONDS = 3.0  # how long to wait before the port opens, so that the first calls find known endpoints
_TYPED_SERVICES = ("gateway.v1.ClassificationService", "gateway.v1.PredictionService")


@dataclass(frozen=True, slots=True)
class Place:
    """Where this worker is among others."""

    admin_listen: str  # of this process: the configured address, or a socket that the supervisor asks
    shared: SharedDirectory | None = None  # for metrics; None if it is alone
    shared_listen: str = (
        ""  # where the supervisor listens; "" if this process is alone and listens where the config says
    )
    channel: socket.socket | None = None  # over which the supervisor hands connections


class Gateway:
    """One worker, between enter and exit."""

    def __init__(self, loaded: Loaded, load: Callable[[], Loaded], environ: Mapping[str, str], place: Place) -> None:
        """load: reads the config again; raises ConfigError."""
        self._first = loaded
        self._environ = environ
        self._place = place
        self._exits = contextlib.AsyncExitStack()
        self._changes = Changes()
        self._history = ConfigHistory()
        self._watcher = Watcher(load, loaded, self._reloaded, self._refused)
        self._collected = Budget(
            collected_of(loaded.config, memory_limit), COLLECTED
        )  # of callers' requests and upstreams' answers together
        self._draining = False
        self._started = False
        self.settings: Config = loaded.config
        self.listen = loaded.config.listen
        self.admin_address = ""

    async def __aenter__(self) -> Gateway:
        async with contextlib.AsyncExitStack() as exits:
            await self._enter(exits)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def _enter(self, exits: contextlib.AsyncExitStack) -> None:
        config = self.settings
        self._telemetry = ProcessTelemetry(config.telemetry, self._environ, VERSION, self._place.shared)
        self._totals = PipelineTotals(self._place.shared) if self._place.shared else None
        self._hooks = (await self._telemetry.enter([self._history])).hooks
        exits.push_async_callback(self._telemetry.aclose)
        self._fleet = await exits.enter_async_context(Fleet(self._endpoint_changed, self._endpoint_left))
        self._discovery = await exits.enter_async_context(Discovery(self._addresses_changed))
        self._threads = await exits.enter_async_context(Threads(config.pipelines.threads, config.pipelines.queue))
        self._telemetry.watch(self._pipelines_now)
        sequences = Sequences(idle=config.sequences.idle, most=config.sequences.most)
        self._inference = Inference(Topology(routes_of(config), {}), self._hooks, sequences)
        self._catalogue = Catalogue(self._inference)
        self._models = Models(self._inference)
        self._contracts = Contracts(self._inference)
        await self._discovery.learn(names_of(config), _FIRST_LOOK_UPS_SECONDS)
        self._take_over(self._first, (), _declared(self._first.config))
        self.admin_address = await self._enter_admin(exits)
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._contracts.run()))
        await self._fleet.wait_first_probes(_FIRST_PROBES_SECONDS)
        listen = self._place.shared_listen or config.listen
        settings = self._server_settings(config, listen)
        self._server = self._make_server(settings)
        await self._server.start()
        exits.push_async_callback(self._control.aclose)
        exits.push_async_callback(self._server.stop, 0)
        host = listen.rpartition(":")[0]
        self.listen = f"{host}:{self._server.port}"
        if self._first.files:
            watching = asyncio.ensure_future(self._watcher.run())
            exits.push_async_callback(_cancel, watching)
        self._started = True
        self._changes.notify()
        _log.info("hot path: %s", "compiled" if is_compiled() else "interpreted, which takes half as much CPU again")
        _log.info("serving gRPC on %s, admin on %s", self.listen, self.admin_address)

    async def _enter_admin(self, exits: contextlib.AsyncExitStack) -> str:
        connections = Connections(self._telemetry.connection_refused)
        admin = Admin(self, self._place.admin_listen, self._telemetry.scrape.render, connections)
        await exits.enter_async_context(admin)
        return admin.address

    def _server_settings(self, config: Config, listen: str) -> ServerSettings:
        server, tls = config.server, config.server.tls
        return ServerSettings(
            listen,
            server.max_message_bytes,
            max_collected_bytes=self._collected.most,
            channel=self._place.channel,
            tls=ServerTls(tls.cert, tls.key, tls.client_ca) if tls else None,
            max_streams=server.max_streams,
            max_connections=server.max_connections,
            max_connection_age=server.max_connection_age,
            refused=self._telemetry.connection_refused,
        )

    def _make_server(self, settings: ServerSettings) -> Listener:
        server = self.settings.server
        limits = CallLimits(server.default_deadline, server.max_deadline)
        services = self._services(self.settings, limits)
        relay = Relay(self._models, limits)
        streams = StreamRelay(self._models, StreamLimits())
        forward = {
            INFER: ForwardMethod(relay.handle, cut_through=True),
            STREAM: ForwardMethod(streams.handle, streaming=True),
        }

        def on_full(peer: str) -> None:
            self._hooks.connection_full(ConnectionFull(peer, settings.max_streams))

        return Listener(settings, services, forward, budget=self._collected, on_full=on_full)

    def _services(self, config: Config, limits: CallLimits) -> Sequence[Register]:
        self._control = Control(self._inference, ControlPolicy(config.server.control))
        service = V2Service(self._catalogue, self._control, self.is_ready)
        names = [SERVICE_NAME, *_TYPED_SERVICES]
        self._health = health = HealthService(self._catalogue, self._changes, self.is_ready, names)
        typed = ClassificationService(self._models, limits), PredictionService(self._models, limits)

        def register(server: Any) -> None:
            server.add_generic_rpc_handlers((service.handlers(),))
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
            classification_pb2_grpc.add_ClassificationServiceServicer_to_server(typed[0], server)
            add_prediction_service(typed[1], server)
            if config.server.reflection:
                shown = (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME)
                reflector = reflection.aio.ReflectionServicer(shown)
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)

        return [register]

    # Config

    def reload(self) -> None:
        """Read the config at once, or as soon as this worker serves. For SIGHUP."""
        self._watcher.poke()

    async def _reloaded(self, loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        await self._discovery.learn(names_of(loaded.config), _FIRST_LOOK_UPS_SECONDS)
        if loaded.config.server.tls == self._first.config.server.tls:  # else the files in use are no longer looked at
            self._server.renew_certificate()
        # Thousands of models take a while, which calls on this loop must not wait for.
        declared = await asyncio.to_thread(_declared, loaded.config)
        self._take_over(loaded, notices, declared)
        self._discovery.keep(names_of(loaded.config))

    def _addresses_changed(self) -> None:
        """Pods came or went: new pools, all else as it is."""
        pools = self._fleet.apply(upstreams_of(self.settings, self._discovery.addresses, self._collected))
        self._inference.topology = replace(self._inference.topology, pools=pools)
        self._changes.notify()

    def _take_over(
        self, loaded: Loaded, notices: tuple[Finding, ...], declared: tuple[Routes, dict[str, MergeSettings]]
    ) -> None:
        """Put a config in force, in one step: who began with the old topology ends with it."""
        # What can fail comes first: a config that can't be taken over must leave everything as it was.
        routes, merges = declared
        before = self._inference.topology.pipelines
        pipelines = {
            name: PipelineModel(
                pipeline,
                self._threads,
                self._models.call,
                self._is_model_ready,
                before.get(name),
                shared=self._totals,
            )
            for name, pipeline in loaded.pipelines.items()
        }
        capture = self._telemetry.captures.apply(loaded.config.telemetry.capture)
        pools = self._fleet.apply(upstreams_of(loaded.config, self._discovery.addresses, self._collected))
        self._contracts.poke()
        MEMORY.most = memory_of(loaded.config, memory_limit)
        self._threads.room.most = MEMORY.most // 2
        self.settings = loaded.config
        self._inference.capture = capture
        self._inference.topology = Topology(routes, pools, pipelines, merges)
        texts = tuple(str(finding) for finding in (*loaded.warnings, *notices))
        self._hooks.config_changed(
            ConfigChanged(
                loaded.source,
                loaded.digest,
                True,
                texts,
                time.monotonic(),
                loaded.expiries,
                tuple(loaded.config.upstreams),
            )
        )
        self._changes.notify()
        _log.info("config %s from %s is in force", loaded.digest[:12], loaded.source)
        for text in texts:
            _log.warning("%s", text)

    def _refused(self, findings: tuple[Finding, ...]) -> None:
        texts = tuple(map(str, findings))
        self._hooks.config_changed(ConfigChanged(self._first.source, "", False, texts, time.monotonic()))
        _log.error("the new config is refused, the old one stays:\n  %s", "\n  ".join(texts))

    def _pipelines_now(self) -> PipelinesNow:
        """For the metrics; asked from any thread."""
        pipelines = self._inference.topology.pipelines
        faults = {name: len(model.faults) for name, model in pipelines.items()}
        return PipelinesNow(self._threads.usage(), MEMORY.held, MEMORY.most or 0, faults)

    def _is_model_ready(self, name: str) -> bool:
        return bool(self._catalogue.is_ready(name))

    def _endpoint_changed(self, endpoint: Endpoint) -> None:
        ready = endpoint.state is State.READY
        models = tuple(name for (name, _), is_ready in endpoint.models.items() if is_ready)
        missing = ", ".join(name for (name, _), is_ready in endpoint.models.items() if not is_ready)
        reason = endpoint.reason or (f"models not ready: {missing}" if missing else "")
        self._hooks.endpoint_changed(
            EndpointChanged(endpoint.upstream, endpoint.address, ready, models, reason, time.monotonic())
        )
        self._contracts.poke()
        self._changes.notify()
        told = f"ready ({reason})" if ready and reason else "ready" if ready else f"{endpoint.state.value}: {reason}"
        _log.log(
            logging.INFO if ready else logging.WARNING,
            "endpoint %s/%s is %s",
            endpoint.upstream,
            endpoint.address,
            told,
        )

    def _endpoint_left(self, endpoint: Endpoint) -> None:
        self._hooks.endpoint_changed(
            EndpointChanged(endpoint.upstream, endpoint.address, False, (), "left", time.monotonic(), gone=True)
        )
        _log.info("endpoint %s/%s has left", endpoint.upstream, endpoint.address)

    # What it says of itself

    def is_ready(self) -> bool:
        return self._started and not self._draining and not self._catalogue.problems()

    def is_live(self) -> bool:
        return True

    def readiness(self) -> tuple[bool, Sequence[str]]:
        if self._draining:
            return False, ["draining"]
        if not self._started:
            return False, ["starting"]
        problems = self._catalogue.problems()
        return not problems, problems

    def state(self) -> Mapping[str, object]:
        return {
            "version": VERSION,
            "listen": self.listen,
            "ready": self.is_ready(),
            "draining": self._draining,
            **state_of(self._inference, self._catalogue, self._threads.usage()),
            "names": self._discovery.state(),
            "traffic": self._telemetry.traffic.report() if self._telemetry.traffic else None,
        }

    def config(self) -> Mapping[str, object]:
        return self._history.config()

    # The end

    @property
    def left_steps_behind(self) -> bool:
        """After exit: are there threads that nobody can stop, and that could hold up the end of the interpreter?"""
        return self._threads.left_behind

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Stop in a way that no caller notices: not ready at once, still accepting for a while, then finish calls.

        hurry: from when it is set, do not wait for more calls.
        """
        server = self._first.config.server  # as the supervisor knows it, which waits for so long
        self._draining = True
        self._changes.notify()
        _log.info("draining: accepting for %g s more, then %g s for calls in flight", server.drain_delay, server.drain)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for((hurry or asyncio.Event()).wait(), server.drain_delay)
        self._health.close()
        await asyncio.gather(self._server.stop(server.drain), self._control.finish(server.drain))


def _declared(config: Config) -> tuple[Routes, dict[str, MergeSettings]]:
    return routes_of(config), merges_of(config)


async def _cancel(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
