"""How a call would be routed, in words: the output of `inference-gateway explain`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.errors import UnknownModel
from gateway.routing import Routes, explain
from gateway.steps import FanOut, ModelCall, Part, Pipeline
from gateway.types import Facts


def explain_call(
    routes: Routes, pipelines: Mapping[str, Pipeline], model: str, facts: Facts, *, draw: float, indent: str = ""
) -> list[str]:
    """The lines of the output: a pipeline's parts, or a model's rules, split and order. Variants count as available."""
    pipeline = pipelines.get(model)
    if pipeline is not None:
        parts = _explain_parts(routes, pipelines, pipeline.parts, facts, draw=draw, indent=indent + "  ")
        return [f"{indent}{model}: a pipeline", *parts]
    route = routes.lookup(model)
    if route is None:
        known = ", ".join([*routes.public, *pipelines]) or "none"
        return [f"{indent}{model}: NOT_FOUND: {UnknownModel(model).text}; public models: {known}"]
    explained = explain(route, facts, draw=draw)
    kind = "a public model" if model in routes.public else "a Triton model, called directly"
    reason = f"reason: {explained.plan.reason}"
    return [f"{indent}{model}: {kind}, {reason}", *(f"{indent}  {line}" for line in explained.lines)]


def _explain_parts(
    routes: Routes,
    pipelines: Mapping[str, Pipeline],
    parts: Sequence[Part],
    facts: Facts,
    *,
    draw: float,
    indent: str,
) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if isinstance(part, ModelCall):
            lines += explain_call(routes, pipelines, part.model, facts, draw=draw, indent=indent)
        elif isinstance(part, FanOut):
            bounds = f"at most {part.bounds.most} of a row and {part.bounds.most_together} in all"
            lines.append(
                f"{indent}fan-out by step {part.name}, in the gateway: items, {bounds}, by {part.max_batch_size}:"
            )
            lines += _explain_parts(routes, pipelines, part.parts, facts, draw=draw, indent=indent + "  ")
        else:
            lines.append(f"{indent}step {part.name}, in the gateway")
    return lines
