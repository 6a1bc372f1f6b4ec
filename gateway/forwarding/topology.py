"""The topology in force: public models, upstreams and pipelines, which a reload replaces as a whole."""

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
"""Called with each call of a captured model and its ModelInferRequest; returns at once."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Public models, the upstreams that serve them, and the pipelines that call them."""

    routes: Routes
    pools: Mapping[str, Pool]
    pipelines: Mapping[str, PipelineModel] = field(default_factory=dict)
    merges: Mapping[str, MergeSettings] = field(default_factory=dict)  # by public model; only those that merge requests
    captures: Mapping[str, Take] = field(default_factory=dict)  # by the model name that callers use

    def is_known(self, model: str) -> bool:
        """Is it a name in the config? Callers may invent any other name."""
        return self.routes.is_known(model) or model in self.pipelines

    def is_available(self, variant: Variant) -> bool:
        """Can an endpoint of its upstream serve the variant, as far as is known now?"""
        pool = self.pools.get(variant.upstream)
        return pool is not None and pool.is_available(variant.model, variant.version)


class CurrentTopology:
    """Holds the topology in force, which a reload replaces.

    Code that needs the topology twice for one decision must read `now` once and keep it.
    """

    now: Topology

    def __init__(self, topology: Topology) -> None:
        self.now = topology
