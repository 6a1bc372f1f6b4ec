"""How a call would be routed, in words, and how a gateway stands to it now: `inference-gateway explain`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gateway.access.policy import Policy
from gateway.access.principal import NOBODY, Principal
from gateway.access.rpcs import NAMED
from gateway.errors import UnknownModel
from gateway.quotas import Limits, Quotas
from gateway.routing import Routes, explain
from gateway.steps import FanOut, ModelCall, Part, Pipeline
from gateway.types import Facts

Json = Mapping[str, Any]
"""What `GET /state` answers. Any: it is JSON."""


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


def finds_model(routes: Routes, pipelines: Mapping[str, Pipeline], model: str, facts: Facts) -> bool:
    """Is there anything that could answer such a call? Otherwise it is NOT_FOUND, as `explain_call` says."""
    if model in pipelines:
        return True
    route = routes.lookup(model)
    return route is not None and route.maybe_for_version(facts.version) is not None


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


def explain_now(state: Json, model: str) -> list[str]:
    """What stands between a call and an answer now: breakers, limits, ejections and retries, as a gateway tells."""
    if model in state["pipelines"]:
        return [line for called in state["pipelines"][model]["calls"] for line in explain_now(state, called)]
    found = state["models"].get(model)
    if found is None:
        return [f"now: the gateway has no public model {model!r}"]
    left = found.get("retries_left")
    retries = "none was needed yet" if left is None else f"{left} left (of the worker and the caller with the fewest)"
    lines = [f"now: {model} is {'ready' if found['ready'] else 'not ready'}; retries: {retries}"]
    lines += [line for each in state.get("rollouts", ()) if each["model"] == model for line in _rollout(each)]
    for name, variant in found["variants"].items():
        ready = "ready" if variant["ready"] else "unavailable"
        lines.append(f"  variant {name}: {ready}, its breaker is {variant['breaker']}")
        parity = _parity(state, model, name)
        wrong = _wrong_answers(state, model, name)
        lines += [f"    {line}" for line in (*parity, *wrong, *_limits(state, variant), *_endpoints(state, variant))]
    return [*lines, *_experiments(state, model)]


def _wrong_answers(state: Json, model: str, name: str) -> Iterator[str]:
    for answers in state.get("answers", ()):
        found = answers["results"]
        if (answers["model"], answers["variant"]) == (model, name) and (found["not_finite"] or found["contract"]):
            yield (
                f"of {sum(found.values())} answers that were looked at {found['not_finite']} had NaN or infinity, "
                f"{found['contract']} were not as its metadata says"
            )


def _experiments(state: Json, model: str) -> Iterator[str]:
    for experiment in state.get("experiments", ()):
        if experiment["model"] == model:
            units = ", ".join(f"{arm} {count}" for arm, count in experiment["units"].items()) or "none yet"
            stopped = experiment.get("stopped_with")
            ended = f"; stopped, everybody gets '{stopped}'" if stopped else ""
            alarm = "; units do not come to arms as planned" if experiment["sample_ratio_mismatched"] else ""
            yield f"  experiment {experiment['name']}: units by arm: {units}{ended}{alarm}"
            if experiment.get("bandit"):
                yield from _bandit(experiment["bandit"])


def _bandit(bandit: Json) -> Iterator[str]:
    shares = ", ".join(f"{arm} {share:.4g}" for arm, share in bandit["shares"].items()) or "none yet"
    yield (
        f"    a bandit in epoch {bandit['epoch']} of {bandit['epochs']}, whose units have shares {shares}, "
        f"as the store said {bandit['store_age_seconds']:.0f} s ago"
    )
    for each in (bandit["waits"], bandit["trouble"]):
        if each:
            yield f"    {each}"


def _rollout(rollout: Json) -> Iterator[str]:
    yield (
        f"  rollout {rollout['name']}: {rollout['state']}, step {rollout['step']} of {rollout['steps']}; "
        f"{rollout['share']:.4g} of what '{rollout['from']}' would get goes to '{rollout['to']}', "
        f"as the store said {rollout['store_age_seconds']:.0f} s ago"
    )
    for each in (*rollout["waits"], rollout["trouble"]):
        if each:
            yield f"    {each}"


def _parity(state: Json, model: str, name: str) -> Iterator[str]:
    for shadow in state.get("shadows", ()):
        parity = shadow["parity"]
        if (shadow["model"], shadow["variant"]) == (model, name) and parity is not None:
            may = "calls may fall back to it" if parity["is_open"] else "calls may not fall back to it yet"
            yield (
                f"{may}: {parity['agreed']} of {parity['compared']} copies agreed; needed are "
                f"{parity['agreement']:.0%} of {parity['copies']}"
            )


def explain_quotas(quotas: Quotas, pipelines: Mapping[str, Pipeline], model: str, facts: Facts) -> list[str]:
    """The quotas that a call comes under, for the gateway as a whole."""
    name = quotas.name_of(facts.metadata)
    whose = f"caller {name!r}" if name else "a caller without a name"
    accounts = quotas.of(facts.metadata, model).accounts if quotas.is_on else ()
    if not accounts:
        return [f"quota of {whose}: none"]
    note = " (the pipeline's own calls come under none)" if model in pipelines else ""
    lines = [f"quotas of {whose} at {model}{note}:"]
    for account in accounts:
        parts = [
            each for each in (account.caller and "this caller", account.model and f"model {account.model}") if each
        ]
        lines.append(f"  {' at '.join(parts) or 'callers without a name'}: {_limits_text(account.limits)}")
    return lines


def _limits_text(limits: Limits) -> str:
    rates = [("requests", limits.requests), ("bytes", limits.bytes), ("rows", limits.rows)]
    said = [f"{rate:.15g} {what} a second" for what, rate in rates if rate]
    if said:
        said.append(f"{limits.burst:g} s' worth at once")
    if limits.concurrent:
        said.append(f"{limits.concurrent} calls at a time")
    return ", ".join(said)


def quotas_now(state: Json, caller: str, model: str) -> list[str]:
    """What is left of a call's quotas now, as a gateway tells."""
    lines = []
    for quota in state.get("quotas", ()):
        if (
            quota["caller"] in (caller, "")
            and quota["model"] in (model, "")
            and (quota["caller"] == caller or quota["model"])
        ):
            whose = f"caller {quota['caller']!r}" if quota["caller"] else "all callers"
            left = ", ".join(f"{value:g} {name}" for name, value in quota["left"].items())
            lines.append(
                f"now: left to {whose} of {quota['model'] or 'all models'}: {left}; {quota['in_flight']} in flight"
            )
    if state.get("quota_store"):
        lines.append(f"now: the store of quotas is {state['quota_store']}")
    return lines


def _limits(state: Json, variant: Json) -> Iterator[str]:
    mine = (variant["upstream"], variant["model"])
    limits = [limit for limit in state["limits"] if (limit["upstream"], limit["model"]) == mine]
    if not limits:
        yield "calls are not limited"
    for limit in limits:
        refused = ", ".join(f"{count} {reason}" for reason, count in limit["refused"].items())
        yield (
            f"at most {limit['limit']} calls in flight: {limit['in_flight']} are, {limit['waiting']} wait; "
            f"{1000 * limit['latency_seconds']:.0f} ms an answer; refused since the start: {refused}"
        )


def _endpoints(state: Json, variant: Json) -> Iterator[str]:
    """Those that do not get calls of it as usual, and why."""
    key = f"{variant['model']}:{variant['version']}" if variant["version"] else variant["model"]
    for endpoint in state["upstreams"].get(variant["upstream"], ()):
        said = endpoint["probed"].get(key, "well")
        if endpoint["state"] != "ready":
            why = f"is {endpoint['state']}: {endpoint['reason']}"
        elif said != "well":
            why = f"fails probe inferences: {said}"
        elif not endpoint["models"].get(key, True):
            why = "has the model not ready"
        elif variant["model"] in endpoint["ejected"]:
            whose = endpoint.get("ejected_for", {}).get(variant["model"], "all")
            why = f"is ejected for {whose}: it fails calls that its peers answer"
        else:
            continue
        yield f"{variant['upstream']}/{endpoint['address']} {why}"
