"""How a call would be routed, in words: the output of `inference-gateway explain`. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.errors import UnknownModel
from gateway.routing import Routes, explain
from gateway.steps import ModelCall, Pipeline
from gateway.types import Facts


def explain_call(
    routes: Routes, pipelines: Mapping[str, Pipeline], model: str, facts: Facts, *, draw: float, indent: str = ""
) -> list[str]:
    """The lines of the output: a pipeline's parts, or a model's rules, split and order. Variants count as available."""
    pipeline = pipelines.get(model)
    if pipeline is not None:
        lines = [f"{indent}{model}: a pipeline"]
        for part in pipeline.parts:
            if isinstance(part, ModelCall):
                lines += explain_call(routes, pipelines, part.model, facts, draw=draw, indent=indent + "  ")
            else:
                lines.append(f"{indent}  step {part.name}, in the gateway")
        return lines
    route = routes.lookup(model)
    if route is None:
        known = ", ".join([*routes.public, *pipelines]) or "none"
        return [f"{indent}{model}: NOT_FOUND: {UnknownModel(model).text}; public models: {known}"]
    explained = explain(route, facts, draw=draw)
    kind = "a public model" if model in routes.public else "a Triton model, called directly"
    reason = f"reason: {explained.plan.reason}"
    return [f"{indent}{model}: {kind}, {reason}", *(f"{indent}  {line}" for line in explained.lines)]
