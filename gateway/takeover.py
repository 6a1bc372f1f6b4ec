"""Puts a checked config, or new addresses of endpoints, in force: in one step, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from gateway.assemble import (
    admission_of,
    checks_of,
    hedges_of,
    memory_of,
    merges_of,
    names_of,
    quotas_of,
    rolled_of,
    routes_of,
    running_of,
    shadows_of,
    shares_of,
    steps_of,
    upstreams_of,
)
from gateway.config import Config, Finding, Loaded
from gateway.entrance import Entrance, prepared
from gateway.event_log import EventLog
from gateway.experimentation.bandits import Bandits
from gateway.experimentation.evidence import Evidence
from gateway.experimentation.rollouts import Rollouts
from gateway.experimentation.verdicts import Verdicts
from gateway.experiments.epochs import Epochs
from gateway.experiments.rollout import RolloutKey, State
from gateway.forwarding.admission import Gates
from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.checks import Checks
from gateway.forwarding.hedging import Hedges
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.shadowing import Shadows
from gateway.forwarding.sharing import Shares
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.process.container import memory_limit
from gateway.quotas import Quotas, SharedBuckets
from gateway.routing import Routes
from gateway.rpc.budget import Budget
from gateway.steps import Pipeline
from gateway.steps.budget import MEMORY
from gateway.telemetry.capture import Captures
from gateway.telemetry.disagreements import Disagreements
from gateway.upstream.discovery import Discovery
from gateway.upstream.fleet import Fleet

_LOOK_UPS_SECONDS: Final = 3.0  # how long a config waits for its names to be looked up before it comes into force

PipelineMaker = Callable[[Pipeline, "PipelineModel | None"], PipelineModel]
"""Makes the model of a pipeline. The second argument is the model of the same name that it replaces, if any."""


class Takeover:
    """Puts configs in force. A call that began with the old topology ends with it."""

    def __init__(
        self,
        topology: CurrentTopology,
        fleet: Fleet,
        discovery: Discovery,
        *,
        threads: Threads,
        captures: Captures,
        gates: Gates,
        quotas: Quotas,
        shared_quotas: SharedBuckets | None,
        shares: Shares,
        hedges: Hedges,
        checks: Checks,
        shadows: Shadows,
        evidence: Evidence | None = None,
        rollouts: Rollouts | None = None,
        bandits: Bandits | None = None,
        verdicts: Verdicts | None = None,
        disagreements: Disagreements,
        events: EventLog,
        pipeline: PipelineMaker,
        collected: Budget,
        entrance: Entrance,
        changed: Callable[[], None],
    ) -> None:
        """
        shared_quotas: what the store of quotas says; None if there is none.
        collected:  budget for answers of upstreams that are collected.
        changed:    called when another topology is in force.
        """
        self._topology = topology
        self._fleet = fleet
        self._discovery = discovery
        self._threads = threads
        self._captures = captures
        self._gates = gates
        self._quotas = quotas
        self._shared_quotas = shared_quotas
        self._shares = shares
        self._hedges = hedges
        self._checks = checks
        self._shadows = shadows
        self._evidence = evidence
        self._rollouts = rollouts
        self._bandits = bandits
        self._verdicts = verdicts
        self._stopped: Mapping[str, str] = {}  # experiments, and the arm that everybody gets
        self._states: Mapping[RolloutKey, State] = {}  # of rollouts
        self._epochs: Mapping[str, Epochs] = {}  # of bandits
        self._disagreements = disagreements
        self._events = events
        self._pipeline = pipeline
        self._collected = collected
        self._entrance = entrance
        self._changed = changed
        self._config: Config

    @property
    def config(self) -> Config:
        """The one in force."""
        return self._config

    async def begin(self, loaded: Loaded) -> None:
        """Put the first config in force.

        :raises OSError: if a file that the config names can't be read.
        """
        self._config = loaded.config  # for `addresses_changed`, which may be called before this config is in force
        await self._discovery.learn(names_of(loaded.config), _LOOK_UPS_SECONDS)
        self._take_over(loaded, (), *_declared(loaded.config, self._stopped, self._states, self._epochs))

    async def follow(self, loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        """Replace the config in force.

        notices: the settings that only a restart puts in force.
        :raises OSError: if a file that the config names can't be read; then nothing has changed.
        """
        await self._discovery.learn(names_of(loaded.config), _LOOK_UPS_SECONDS)
        # In a thread, since calls on this loop must not wait while thousands of models are read.
        stopped, states, epochs = self._stopped, self._states, self._epochs
        routes, merges = await asyncio.to_thread(_declared, loaded.config, stopped, states, epochs)
        if stopped is not self._stopped or states is not self._states or epochs is not self._epochs:
            routes = routes_of(loaded.config, self._stopped, self._states, self._epochs)
        self._take_over(loaded, notices, routes, merges)
        self._discovery.keep(names_of(loaded.config))

    def experiments_stopped(self, stopped: Mapping[str, str]) -> None:
        """Have everybody get these arms of these experiments, which have ended."""
        self._stopped = stopped
        if self._config.experiments:
            self._replace_routes()

    def rollouts_moved(self, states: Mapping[RolloutKey, State]) -> None:
        """Give the new variants of rollouts their shares. Calls in flight end as they began."""
        self._states = states
        self._replace_routes()

    def epochs_began(self, epochs: Mapping[str, Epochs]) -> None:
        """Share out the units that have come to take part in bandits. Others stay where they are."""
        self._epochs = epochs
        self._replace_routes()

    def _replace_routes(self) -> None:
        routes = routes_of(self._config, self._stopped, self._states, self._epochs)
        self._topology.now = replace(self._topology.now, routes=routes)
        self._tell_experiments()
        self._changed()

    def _tell_experiments(self) -> None:
        config, states, epochs = self._config, self._states, self._epochs
        if self._evidence is not None:
            self._evidence.exposures.apply([*running_of(config, self._stopped, epochs), *steps_of(config, states)])
            self._evidence.epochs = epochs
        if self._rollouts is not None:
            self._rollouts.rolled.apply(rolled_of(config, states))

    def addresses_changed(self) -> None:
        """Replace the pools, since the addresses of a name have changed."""
        pools = self._fleet.apply(upstreams_of(self._config, self._discovery.addresses, self._collected))
        self._topology.now = replace(self._topology.now, pools=pools)
        self._changed()

    def _take_over(
        self, loaded: Loaded, notices: tuple[Finding, ...], routes: Routes, merges: dict[str, MergeSettings]
    ) -> None:
        # The steps that can fail come first: a config that can't be taken over must change nothing.
        config, before = loaded.config, self._topology.now.pipelines
        pipelines = {name: self._pipeline(pipeline, before.get(name)) for name, pipeline in loaded.pipelines.items()}
        access = prepared(config)
        captures = self._captures.apply(config.telemetry.capture)
        pools = self._fleet.apply(upstreams_of(config, self._discovery.addresses, self._collected))
        MEMORY.most = memory_of(config, memory_limit)
        self._threads.room.most = MEMORY.most // 2
        self._config = config
        self._topology.now = Topology(routes, pools, pipelines, merges, captures)
        self._entrance.apply(access)
        self._gates.apply(admission_of(config), time.monotonic())
        self._quotas.apply(quotas_of(config), self._shared_quotas)
        self._shares.apply(shares_of(config))
        self._hedges.apply(hedges_of(config))
        self._checks.apply(checks_of(config))
        self._shadows.apply(shadows_of(config, routes))
        self._disagreements.apply(config)
        if self._evidence is not None:
            self._evidence.apply(config)
        if self._rollouts is not None:
            self._rollouts.apply(config)
        if self._bandits is not None:
            self._bandits.apply(config)
        if self._verdicts is not None:
            self._verdicts.apply(config)
        self._tell_experiments()
        self._events.config_in_force(loaded, notices)
        self._changed()


def _declared(
    config: Config, stopped: Mapping[str, str], states: Mapping[RolloutKey, State], epochs: Mapping[str, Epochs]
) -> tuple[Routes, dict[str, MergeSettings]]:
    return routes_of(config, stopped, states, epochs), merges_of(config)
