"""What is in force: public models, upstreams and pipelines, replaced as a whole by a reload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.pipelines import PipelineModel
from gateway.hooks import CallStarted
from gateway.routing import Routes
from gateway.types import Variant
from gateway.upstream.pool import Pool

Take = Callable[[CallStarted, bytes], None]
"""Hears of a call of a captured model, with its ModelInferRequest; returns at once."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Public models, the upstreams behind them, and the pipelines before them."""

    routes: Routes
    pools: Mapping[str, Pool]
    pipelines: Mapping[str, PipelineModel] = field(default_factory=dict)
    merges: Mapping[str, MergeSettings] = field(default_factory=dict)  # of the public models that merge requests
    captures: Mapping[str, Take] = field(default_factory=dict)  # by the model that callers name

    def is_known(self, model: str) -> bool:
        """Is it a name of the config, and not one that a caller may have invented?"""
        return self.routes.is_known(model) or model in self.pipelines

    def is_available(self, variant: Variant) -> bool:
        """Can one of its upstream's endpoints serve it, as far as is known now?"""
        pool = self.pools.get(variant.upstream)
        return pool is not None and pool.is_available(variant.model, variant.version)


class CurrentTopology:
    """The topology in force, for all who need it: a reload puts another one in its place.

    Who asks more than once in one step keeps the topology that it began with.
    """

    now: Topology

    def __init__(self, topology: Topology) -> None:
        self.now = topology
