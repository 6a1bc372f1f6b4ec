"""Composition root of one worker: what it is put together from, and in what order that starts and stops.

The one module that knows all rooms; it decides nothing. What is shared between workers is the config and the metrics
directory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from gateway.admin import Admin, ConfigHistory, Connections
from gateway.api.calls import CallLimits
from gateway.api.catalogue import Catalogue
from gateway.api.control import Control, ControlPolicy
from gateway.api.health import HealthService
from gateway.api.listener import Listener, Register
from gateway.api.outcomes import OutcomeService, add_outcome_service
from gateway.api.ranking import RankingService, add_ranking_service
from gateway.api.reading import ReadingService
from gateway.api.relay import Relay
from gateway.api.speech import SpeechService
from gateway.api.stream_caller import StreamRelay
from gateway.api.text import TextService
from gateway.api.typed import ClassificationService, PredictionService, add_prediction_service
from gateway.api.v2 import V2Service
from gateway.assemble import admin_of, collected_of, routes_of, server_of, shared_quotas_of, store_of, usage_of
from gateway.compiled import is_compiled
from gateway.config import Finding, Loaded, Watcher
from gateway.entrance import Entrance
from gateway.event_log import EventLog
from gateway.experimentation.bandits import Bandits
from gateway.experimentation.evidence import Evidence
from gateway.experimentation.rollouts import Rollouts
from gateway.experimentation.store_settings import store_settings_of
from gateway.experimentation.verdicts import Verdicts
from gateway.experiments.epochs import Epochs
from gateway.experiments.rollout import RolloutKey, State
from gateway.forwarding.admission.rooms import Rooms
from gateway.forwarding.contracts import Contracts
from gateway.forwarding.inference import Inference
from gateway.forwarding.model_index import ModelIndex
from gateway.forwarding.models import Models
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.sequences import Sequences
from gateway.forwarding.streams import StreamLimits
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import ConnectionFull, QuotasNow, Watched
from gateway.memory_watch import MemoryWatch
from gateway.process.container import MemoryGauge, memory_limit
from gateway.process.notifier import Changes
from gateway.quota_store import QuotaStore
from gateway.quotas import Quotas
from gateway.readiness import Readiness
from gateway.rpc.budget import Budget
from gateway.state import WorkerState
from gateway.steps import Pipeline
from gateway.takeover import Takeover
from gateway.telemetry.pipeline_totals import PipelineTotals
from gateway.telemetry.process import ProcessTelemetry
from gateway.telemetry.shared_values import SharedDirectory
from gateway.transport.listener import COLLECTED, ForwardMethod
from gateway.upstream.discovery import Discovery
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.fleet import Fleet
from gateway.upstream.subset import place_of
from gateway.v1 import classification_pb2_grpc, reading_pb2_grpc, speech_pb2_grpc, text_pb2_grpc
from gateway.v2.names import INFER, SERVICE_NAME, STREAM

_log = logging.getLogger(__name__)

VERSION = version("inference-gateway")
_FIRST_PROBES_SECONDS = (
    3.0  # how long the first probes may delay the opening of the port, so that first calls find probed endpoints
)
_SERVICES = (
    SERVICE_NAME,
    "gateway.v1.ClassificationService",
    "gateway.v1.OutcomeService",
    "gateway.v1.PredictionService",
    "gateway.v1.RankingService",
    "gateway.v1.ReadingService",
    "gateway.v1.SpeechService",
    "gateway.v1.TextService",
)


@dataclass(frozen=True, slots=True)
class Place:
    """The addresses of this worker, and what it shares with other workers."""

    admin_listen: str  # the admin address of this process: the configured one, or a socket for the supervisor
    shared: SharedDirectory | None = None  # for metrics; None if there is only one worker
    shared_listen: str = ""  # where the supervisor listens; "" if this process listens itself, where the config says
    channel: socket.socket | None = None  # over which the supervisor hands connections over
    worker: int = 0  # its number among the workers, from 0 on


class Gateway:
    """One worker: `async with` starts and stops it."""

    def __init__(self, loaded: Loaded, load: Callable[[], Loaded], environ: Mapping[str, str], place: Place) -> None:
        """load: reads the config again; raises ConfigError."""
        self._first = loaded
        self._environ = environ
        self._place = place
        self._exits = contextlib.AsyncExitStack()
        self._history = ConfigHistory()
        self._watcher = Watcher(load, loaded, self._reloaded, self._refused)
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
        """Start the parts of the worker; they are stopped in the reverse order."""
        await self._enter_telemetry(exits)
        await self._enter_upstreams(exits)
        self._compose()
        exits.callback(self._shadows.stop)
        exits.push_async_callback(self._entrance.aclose)
        exits.push_async_callback(self._evidence.aclose)
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._evidence.run()))
        exits.push_async_callback(self._rollouts.aclose)
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._rollouts.run()))
        exits.push_async_callback(self._bandits.aclose)
        exits.push_async_callback(self._verdicts.aclose)
        await self._takeover.begin(self._first)
        await self._enter_admin(exits)
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._contracts.run()))
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._rooms.run()))
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._index.run()))
        if self._shared_quotas is not None:
            store = QuotaStore(store_of(self._first.config), self._shared_quotas)
            exits.push_async_callback(_cancel, asyncio.ensure_future(store.run()))
        await asyncio.gather(
            self._fleet.wait_first_probes(_FIRST_PROBES_SECONDS),
            self._entrance.wait_first_keys(_FIRST_PROBES_SECONDS),
            self._rollouts.wait_first_look(_FIRST_PROBES_SECONDS),
            self._bandits.wait_first_look(_FIRST_PROBES_SECONDS),
        )
        await self._enter_server(exits)
        if self._first.files:
            exits.push_async_callback(_cancel, asyncio.ensure_future(self._watcher.run()))
        self._readiness.started()
        _log.info(
            "hot path: %s",
            "compiled"
            if is_compiled()
            else "interpreted, which takes about 1.5 times the CPU time of the compiled one",
        )
        _log.info("serving gRPC on %s, admin on %s", self.listen, self.admin_address)

    async def _enter_telemetry(self, exits: contextlib.AsyncExitStack) -> None:
        config, shared = self._first.config, self._place.shared
        self._telemetry = ProcessTelemetry(config.telemetry, self._environ, VERSION, shared)
        self._totals = PipelineTotals(shared) if shared else None
        self._quotas = Quotas()
        self._usage = usage_of(config, self._quotas, str(self._place.worker))
        self._hooks = (await self._telemetry.enter([self._history], self._usage)).hooks
        self._events = EventLog(self._hooks)
        exits.push_async_callback(self._telemetry.aclose)

    async def _enter_upstreams(self, exits: contextlib.AsyncExitStack) -> None:
        config = self._first.config
        pipelines = config.pipelines
        fleet = Fleet(
            self._endpoint_changed,
            self._events.endpoint_left,
            place=place_of(socket.gethostname(), self._place.worker, config.workers),
            keep=config.sequences.idle,
        )
        self._fleet = await exits.enter_async_context(fleet)
        self._discovery = await exits.enter_async_context(Discovery(self._addresses_changed))
        self._threads = await exits.enter_async_context(Threads(pipelines.threads, pipelines.queue))

    def _compose(self) -> None:
        """Make the parts that need no start, in the order in which they depend on each other."""
        config = self._first.config
        sequences = Sequences(idle=config.sequences.idle, most=config.sequences.most)
        self._collected = Budget(  # of callers' requests and upstreams' answers together
            collected_of(config, memory_limit), COLLECTED
        )
        self._changes = Changes()
        self._topology = CurrentTopology(Topology(routes_of(config), {}))
        self._catalogue = Catalogue(self._topology)
        self._readiness = Readiness(self._catalogue.problems, self._changes)
        inference = Inference(self._topology, self._hooks, sequences, quotas=self._quotas)
        inference.counts_rows = self._usage is not None
        self._gates, self._shares, self._hedges = inference.gates, inference.shares, inference.hedges
        self._shadows, self._checks = inference.shadows, inference.checks
        self._memory = MemoryWatch(
            MemoryGauge(config.workers).read,
            collected=self._collected,
            shares=self._shares,
            gates=self._gates,
            shadows=self._shadows,
            workers=config.workers,
        )
        self._rollouts = Rollouts(inference.rolled, store_settings_of(config), self._is_available, self._rollouts_moved)
        self._bandits = Bandits(store_settings_of(config), self._epochs_began)
        self._verdicts = Verdicts(store_settings_of(config), self._memory.now)
        self._evidence = Evidence(
            inference.exposures,
            store_settings_of(config),
            self._experiments_stopped,
            inference.shadows,
            bandits=self._bandits.now,
            verdicts=self._verdicts.now,
        )
        self._shared_quotas = shared_quotas_of(config)
        self._shadows.on_pair = self._telemetry.disagreements.take
        self._breaker, self._retries_left = inference.circuits.breaker_state, inference.retries_left
        self._models = Models(inference)
        self._contracts = Contracts(self._topology)
        self._found, self._index = inference.found, ModelIndex(self._topology, inference.found)
        self._rooms = Rooms(self._topology, self._gates)
        self._control = Control(self._topology, ControlPolicy(config.server.control))
        self._entrance = Entrance(self._telemetry.call_refused)
        self._takeover = Takeover(
            self._topology,
            self._fleet,
            self._discovery,
            threads=self._threads,
            captures=self._telemetry.captures,
            gates=self._gates,
            quotas=self._quotas,
            shared_quotas=self._shared_quotas,
            shares=self._shares,
            hedges=self._hedges,
            checks=self._checks,
            shadows=self._shadows,
            evidence=self._evidence,
            rollouts=self._rollouts,
            bandits=self._bandits,
            verdicts=self._verdicts,
            disagreements=self._telemetry.disagreements,
            events=self._events,
            pipeline=self._pipeline,
            collected=self._collected,
            entrance=self._entrance,
            changed=self._topology_changed,
        )

    async def _enter_admin(self, exits: contextlib.AsyncExitStack) -> None:
        traffic = self._telemetry.traffic
        self.shown = WorkerState(
            VERSION,
            self._readiness,
            self._topology,
            self._catalogue,
            self._threads,
            gates=self._gates.now,
            shadows=self._shadows.now,
            answers=self._checks.now,
            experiments=self._evidence.now,
            store=self._evidence.store_now,
            rollouts=self._rollouts.now,
            breaker=self._breaker,
            retries_left=self._retries_left,
            quotas=self._quotas,
            memory=self._memory.now,
            listen=lambda: self.listen,
            names=self._discovery.state,
            traffic=traffic.report if traffic else lambda: None,
            config=self._history.config,
            outside=self._fleet.outside,
            found=self._found,
        )
        self._telemetry.watch(
            Watched(
                self.shown.pipelines_now,
                self._gates.now,
                self._shares.now,
                self._hedges.now,
                self._shadows.now,
                self._checks.now,
                self._memory.now,
                self._retries_left,
                self._evidence.now,
                self._evidence.store_now,
                self._rollouts.now,
                self._quotas_now,
                self._usage.counts.now if self._usage is not None else tuple,
                self._fleet.shared_memory,
                self._forgotten,
            )
        )
        connections = Connections(self._telemetry.connection_refused)
        admin = Admin(
            self.shown,
            self._place.admin_listen,
            self._telemetry.scrape.render,
            connections,
            admin_of(self._first.config),
            order=self._order,
            verdicts=self._verdicts.latest,
            history=traffic.history if traffic else None,
        )
        await exits.enter_async_context(admin)
        self._admin, self.admin_address = admin, admin.address

    async def _order(self, name: str, action: str, by: str) -> tuple[int, Mapping[str, object]]:
        """Do something to a rollout."""
        from gateway.experimentation.rollout_commands import RolloutCommands, ordered  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

        commands = RolloutCommands.of(self._takeover.config)
        return await asyncio.to_thread(ordered, commands, name, action, by)

    def _forgotten(self) -> list[str]:
        """The found models whose place was needed since it was asked last, but for those that the config names now."""
        taken = [self._found.forgotten.popleft() for _ in range(len(self._found.forgotten))]
        return [name for name in taken if not self._topology.now.is_known(name)]

    def _quotas_now(self) -> QuotasNow:
        """For the metrics. It may be called from any thread."""
        refused = [
            (*key, reason, count) for key, counts in self._quotas.refused().items() for reason, count in counts.items()
        ]
        return QuotasNow(refused, bool(self._quotas.is_store_away))

    async def _enter_server(self, exits: contextlib.AsyncExitStack) -> None:
        config, shared = self._first.config, self._place.shared_listen
        listen = shared or config.listen
        settings = server_of(
            config,
            listen,
            channel=self._place.channel,
            refused=self._telemetry.connection_refused,
            turned_away=self._telemetry.connection_turned_away,
        )
        limits = CallLimits(config.server.default_deadline, config.server.max_deadline)
        forward = {
            INFER: ForwardMethod(Relay(self._models, self._topology, limits).handle, cut_through=True),
            STREAM: ForwardMethod(StreamRelay(self._models, StreamLimits()).handle, streaming=True),
        }

        def on_full(peer: str) -> None:
            self._hooks.connection_full(ConnectionFull(peer, settings.max_streams))

        services = [self._services(limits)]
        self._server = Listener(settings, services, forward, budget=self._collected, on_full=on_full)
        self._memory.watch(self._server)
        self._entrance.watch(self._server.guard)
        await self._server.start()
        exits.push_async_callback(self._control.aclose)
        exits.push_async_callback(self._speech.aclose)
        exits.push_async_callback(self._server.stop, 0)
        exits.push_async_callback(_cancel, asyncio.ensure_future(self._memory.run()))
        self.listen = f"{listen.rpartition(':')[0]}:{self._server.port}"

    def _services(self, limits: CallLimits) -> Register:
        """Every service, except the methods that are forwarded as bytes."""
        is_ready = self._readiness.is_ready
        self._health = health = HealthService(self._catalogue, self._changes, is_ready, _SERVICES)
        v2 = V2Service(self._catalogue, self._control, is_ready)
        classification = ClassificationService(self._models, self._topology, limits)
        prediction = PredictionService(self._models, limits)
        reading = ReadingService(self._models, self._topology, limits)
        ranking = RankingService(self._models, self._topology, limits)
        text = TextService(self._models, self._topology, limits, self._collected)
        self._speech = speech = SpeechService(self._models, limits, self._collected)
        outcomes = OutcomeService(self._evidence, limits)

        def register(server: Any) -> None:
            server.add_generic_rpc_handlers((v2.handlers(),))
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
            classification_pb2_grpc.add_ClassificationServiceServicer_to_server(classification, server)
            add_prediction_service(prediction, server)
            reading_pb2_grpc.add_ReadingServiceServicer_to_server(reading, server)
            add_ranking_service(ranking, server)
            text_pb2_grpc.add_TextServiceServicer_to_server(text, server)
            speech_pb2_grpc.add_SpeechServiceServicer_to_server(speech, server)
            add_outcome_service(outcomes, server)
            if self._first.config.server.reflection:
                shown = (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
                reflector = reflection.aio.ReflectionServicer(shown)
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)

        return register

    def _pipeline(self, pipeline: Pipeline, before: PipelineModel | None) -> PipelineModel:
        def is_ready(model: str) -> bool:
            return bool(self._catalogue.is_ready(model))

        models = self._models
        return PipelineModel(
            pipeline,
            self._threads,
            models.call,
            is_ready,
            before,
            shared=self._totals,
            hold=models.maybe_hold,
            turn_of=models.inference.gates.turn_of,
        )

    # Reactions to changes

    def _endpoint_changed(self, endpoint: Endpoint) -> None:
        self._events.endpoint_changed(endpoint)
        self._topology_changed()

    def _experiments_stopped(self, stopped: Mapping[str, str]) -> None:
        self._takeover.experiments_stopped(stopped)

    def _epochs_began(self, epochs: Mapping[str, Epochs]) -> None:
        self._takeover.epochs_began(epochs)

    def _rollouts_moved(self, states: Mapping[RolloutKey, State]) -> None:
        self._takeover.rollouts_moved(states)

    def _is_available(self, model: str, name: str) -> bool:
        """Can this variant be called, and has it passed its parity gate, if it has one?"""
        topology, parity = self._topology.now, self._shadows.gated.get(model, {}).get(name)
        route = topology.routes.public.get(model)
        variants = () if route is None else [each for each in route.variants if each.name == name]
        return any(map(topology.is_available, variants)) and (parity is None or parity.is_open)

    def _addresses_changed(self) -> None:
        self._takeover.addresses_changed()

    def _topology_changed(self) -> None:
        self._contracts.poke()
        self._rooms.poke()
        self._index.poke()
        self._changes.notify()

    def reload(self) -> None:
        """Read the config again at once, or as soon as this worker serves. SIGHUP calls it."""
        self._watcher.poke()

    async def _reloaded(self, loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        if loaded.config.server.tls == self._first.config.server.tls:  # other files come into use only by a restart
            self._server.renew_certificate()
        await self._takeover.follow(loaded, notices)
        self._admin.guard(admin_of(loaded.config))

    def _refused(self, findings: tuple[Finding, ...]) -> None:
        self._events.config_refused(self._first.source, findings)

    # Stopping

    @property
    def left_steps_behind(self) -> bool:
        """After the exit: do steps still run on threads, which nothing can stop?"""
        return self._threads.left_behind

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Stop without failing a call: report not ready, accept calls for `drain_delay`, then wait for those in flight.

        hurry: ends the wait of `drain_delay` once it is set.
        """
        server = self._first.config.server  # from the first config, since the supervisor waits for the times in that
        self._readiness.draining()
        _log.info("draining: accepting for %g s more, then %g s for calls in flight", server.drain_delay, server.drain)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for((hurry or asyncio.Event()).wait(), server.drain_delay)
        self._health.close()
        await asyncio.gather(self._server.stop(server.drain), self._control.finish(server.drain))


async def _cancel(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
