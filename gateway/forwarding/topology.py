"""Values: what is in force. Replaced as a whole on reload; whoever began with one keeps it to the end of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.pipelines import PipelineModel
from gateway.routing import Routes
from gateway.upstream.pool import Pool


@dataclass(frozen=True, slots=True)
class Topology:
    """Public models, the upstreams behind them, and the pipelines before them."""

    routes: Routes
    pools: Mapping[str, Pool]
    pipelines: Mapping[str, PipelineModel] = field(default_factory=dict)
    merges: Mapping[str, MergeSettings] = field(default_factory=dict)  # of the public models that merge requests

    def is_known(self, model: str) -> bool:
        """Is it a name of the config, and not one that a caller may have invented?"""
        return self.routes.is_known(model) or model in self.pipelines
