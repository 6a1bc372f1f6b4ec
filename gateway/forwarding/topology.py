"""The topology in force: public models, upstreams and pipelines, which a reload replaces as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from gateway.access.door import Access
from gateway.access.policy import Scope
from gateway.bounded import make_room
from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.pipelines import PipelineModel
from gateway.hooks import CallStarted
from gateway.routing import Routes
from gateway.types import Variant
from gateway.upstream.pool import Pool

_SEEN_KEPT: Final = 256  # scopes; as many as there are different sets of grants, times the RPCs

Take = Callable[[CallStarted, bytes], None]
"""Called with each call of a captured model and its ModelInferRequest; returns at once."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Public models, the upstreams that serve them, and the pipelines that call them."""

    routes: Routes
    pools: dict[str, Pool]
    pipelines: Mapping[str, PipelineModel] = field(default_factory=dict)
    merges: dict[str, MergeSettings] = field(default_factory=dict)  # by public model; only those that merge requests
    captures: Mapping[str, Take] = field(default_factory=dict)  # by the model name that callers use

    def limited_to(self, scope: Scope) -> Topology:
        """The part of it that this scope covers. Pipelines still call what their callers may not."""
        pipelines = {name: pipeline for name, pipeline in self.pipelines.items() if scope.covers(name, True)}
        return replace(self, routes=self.routes.limited_to(scope.covers, self.pipelines), pipelines=pipelines)

    def is_known(self, model: str) -> bool:
        """Is it a name in the config? Callers may invent any other name."""
        return self.routes.is_known(model) or model in self.pipelines

    def can_be_called(self, model: str) -> bool:
        """Is there a model of this name, for whoever this topology is?"""
        return model in self.pipelines or self.routes.lookup(model) is not None

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
        self._seen: dict[Scope, Topology] = {}
        self._seen_of = topology

    def seen_by(self, access: Access | None) -> Topology:
        """The topology as a caller sees it: what he may not use does not exist for him. None: all of it."""
        if access is None:
            return self.now
        if self._seen_of is not self.now:
            self._seen, self._seen_of = {}, self.now
        seen = self._seen.get(access.scope)
        if seen is None:
            make_room(self._seen, _SEEN_KEPT)
            seen = self._seen[access.scope] = self.now.limited_to(access.scope)
        return seen
