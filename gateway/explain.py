"""How a call would be routed, in words: the output of `inference-gateway explain`. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.access.policy import Policy
from gateway.access.principal import NOBODY, Principal
from gateway.access.rpcs import NAMED
from gateway.errors import UnknownModel
from gateway.routing import Routes, explain
from gateway.steps import ModelCall, Pipeline
from gateway.types import Facts


def explain_access(
    policy: Policy, routes: Routes, pipelines: Mapping[str, Pipeline], caller: str, model: str
) -> list[str]:
    """What a caller may do with a model, and which grants say so. His groups are those of the config alone."""
    principal = policy.known(Principal(caller)) if caller else NOBODY
    is_public = model in routes.public or model in pipelines
    groups = f", of {', '.join(sorted(principal.groups))} (and of what a token tells)" if principal.groups else ""
    lines = [f"caller {caller}{groups}" if caller else "nobody: a caller without credentials"]
    for number, grant in enumerate(policy.grants):
        at = f"  access.grants[{number}]"
        if not grant.holds_for(principal):
            lines.append(f"{at}: is for others")
        elif not grant.covers(model, is_public):
            lines.append(f"{at}: holds, and does not have {'the public model' if is_public else 'the Triton model'}")
        else:
            rpcs = ", ".join(name for name in NAMED if name in grant.rpcs)
            allowed = f"; requests may have: {', '.join(sorted(grant.allow))}" if grant.allow else ""
            lines.append(f"{at}: lets him use it by {rpcs}{allowed}")
    may = sorted(
        rpc for rpc in NAMED if (found := policy.maybe_scope(principal, rpc)) and found.covers(model, is_public)
    )
    if not may:
        lines.append(f"  so {model} does not exist for him: {UnknownModel(model).text}")
    return lines


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
