"""Admin: what an on-call person should look at first. Pure: JSON values of the gateway's state in, sentences out.

`error`: callers get errors, or would with the next failure. `warning`: something is not as configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Json = Mapping[str, Any]

# Errors that are not the caller's fault. Callers choose to cancel (CANCELLED), and may choose too short a deadline.
_OUR_FAULTS = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED", "DATA_LOSS", "DEADLINE_EXCEEDED")
_ADMITTING = "admitting"  # a breaker that lets all calls through
_WELL = "well"  # of probe inferences
_STUCK_SECONDS = 30.0  # that a step may run; nobody waits interactively for longer
_WARN_SHARE, _ALARM_SHARE = 0.01, 0.1  # shares of a model's calls in the last minute


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to look at."""

    severity: Literal["error", "warning"]
    kind: Literal["model", "endpoint", "upstream", "config", "gateway"]
    name: str  # of the model, endpoint (`UPSTREAM/ADDRESS`) or upstream; else ""
    text: str


def notices(state: Json, config: Json) -> list[dict[str, str]]:
    """The notices, errors first. state, config: the values of `/state` and `/config`."""
    of_state = (_gateway, _models, _limits, _pipelines, _endpoints, _traffic, _experiments, _rollouts)
    notices = [*(notice for part in of_state for notice in part(state)), *_config(config)]
    return [asdict(notice) for notice in sorted(notices, key=lambda notice: notice.severity)]


def _gateway(state: Json) -> Iterator[Notice]:
    if state.get("draining"):
        yield Notice("warning", "gateway", "", "is draining: it finishes what is in flight and ends")
    elif not state.get("ready"):
        yield Notice("error", "gateway", "", "is not ready: no endpoint has answered")
    memory = state.get("memory")
    if memory and memory["step"]:
        share = memory["bytes"] / memory["limit_bytes"]
        yield Notice("error", "gateway", "", f"{share:.0%} of the memory is in use: {memory['refuses']}")
    if state.get("quota_store") == "away":
        yield Notice("warning", "gateway", "", "the store of quotas does not answer: each worker has its own share")
    silent = [slot for slot, worker in state.get("workers", {}).items() if not worker]
    if silent:
        yield Notice("warning", "gateway", "", f"workers not serving: {', '.join(silent)}")


def _models(state: Json) -> Iterator[Notice]:
    for name, model in state.get("models", {}).items():
        gone = [variant for variant, each in model["variants"].items() if not each["ready"]]
        if len(gone) == len(model["variants"]):
            yield Notice("error", "model", name, "no variant can answer")
            continue
        total = sum(model["shares"].values())
        for variant in gone:
            share = model["shares"].get(variant, 0) / total if total else 0
            if share:
                others = "its calls fail" if model["fallback"] == [] else "its calls fall back to another"
                yield Notice("warning", "model", name, f"variant {variant} ({share:.0%}) is unavailable; {others}")
        yield from _breakers(name, model)
        if model.get("retries_left") == 0:
            yield Notice("warning", "model", name, "retries are used up: a caller's failed calls are not sent again")


def _breakers(name: str, model: Json) -> Iterator[Notice]:
    for variant, each in model["variants"].items():
        breaker = each.get("breaker", _ADMITTING)
        if breaker != _ADMITTING and each["ready"]:
            others = "a part of its calls goes" if breaker == "probing" else "its calls go"
            yield Notice("warning", "model", name, f"the breaker of variant {variant} is {breaker}: {others} to others")


def _limits(state: Json) -> Iterator[Notice]:
    for limit in state.get("limits", ()):
        if limit["waiting"]:
            text = f"{limit['waiting']} calls wait: at most {limit['limit']} are in flight"
            yield Notice("warning", "model", f"{limit['upstream']}/{limit['model']}", text)


def _pipelines(state: Json) -> Iterator[Notice]:
    for name, pipeline in state.get("pipelines", {}).items():
        if not pipeline["ready"]:
            yield Notice("error", "model", name, f"a model it calls can't answer: {', '.join(pipeline['calls'])}")
        for fault in pipeline.get("faults", ()):
            yield Notice("error", "model", name, f"does not fit the models that it calls: {fault}")
        for step, now in pipeline.get("steps", {}).items():
            if now["oldest_seconds"] >= _STUCK_SECONDS:
                held = f"holds {now['running']} threads, for up to {now['oldest_seconds']:.0f} s"
                yield Notice("error", "model", name, f"step {step} {held}; {now['waiting']} wait")


def _endpoints(state: Json) -> Iterator[Notice]:
    for upstream, endpoints in state.get("upstreams", {}).items():
        if not endpoints:
            yield Notice("error", "upstream", upstream, "no address is known")
        elif all(endpoint["state"] == "down" for endpoint in endpoints):
            yield Notice("error", "upstream", upstream, "every endpoint is down")
        for endpoint in endpoints:
            name = f"{upstream}/{endpoint['address']}"
            probed = {model: said for model, said in endpoint.get("probed", {}).items() if said != _WELL}
            missing = [model for model, is_ready in endpoint["models"].items() if not is_ready and model not in probed]
            if endpoint["state"] in ("down", "suspect"):
                yield Notice("warning", "endpoint", name, f"is {endpoint['state']}: {endpoint['reason']}")
            elif missing:
                yield Notice("warning", "endpoint", name, f"models not ready: {', '.join(missing)}")
            if endpoint.get("ejected"):
                text = f"is left alone for models that its peers answer: {', '.join(endpoint['ejected'])}"
                yield Notice("warning", "endpoint", name, text)
            for model, said in probed.items():
                yield Notice("warning", "endpoint", name, f"probe inferences of {model} fail: {said}")
    for name, found in state.get("names", {}).items():
        if found["failure"]:
            yield Notice("warning", "upstream", name, f"looking the name up failed: {found['failure']}")


def _traffic(state: Json) -> Iterator[Notice]:
    """Notices about a model's calls in the last minute."""
    windows = (state.get("traffic") or {}).get("windows") or [{"models": {}}]
    for name, model in windows[0]["models"].items():
        calls = model["calls"]
        failed = sum(model["errors"].get(code, 0) for code in _OUR_FAULTS)
        if calls and failed / calls >= _WARN_SHARE:
            codes = ", ".join(code for code in model["errors"] if code in _OUR_FAULTS)
            severity: Literal["error", "warning"] = "error" if failed / calls >= _ALARM_SHARE else "warning"
            yield Notice(severity, "model", name, f"{failed / calls:.0%} of the calls failed ({codes})")
        if model["fallbacks"]:
            yield Notice("warning", "model", name, f"{model['fallbacks']:.0f} calls moved on to another variant")
        if model["queue_full"]:
            yield Notice("warning", "model", name, f"a queue was full {model['queue_full']:.0f} times")


def _experiments(state: Json) -> Iterator[Notice]:
    store = state.get("store")
    if store and store["away"] is not None:
        lost = sum(store["dropped"].values()) + store["reports_refused"]
        told = f"{store['waiting']} records wait" + (f", {lost} are lost" if lost else "")
        yield Notice("warning", "gateway", "", f"the store of experiments is away, {told}: {store['away']}")
    for experiment in state.get("experiments", ()):
        if experiment["sample_ratio_mismatched"]:
            told = f"experiment {experiment['name']} is void: units do not come to its arms as planned"
            yield Notice("warning", "model", experiment["model"], told)
        for each in (experiment.get("verdict") or {}).get("guardrails", ()):
            if each["state"] == "breached":
                told = f"experiment {experiment['name']}: guardrail breached: {each['text']}"
                yield Notice("warning", "model", experiment["model"], told)
        bandit = experiment.get("bandit")
        if bandit and bandit["trouble"]:
            told = f"shares of experiment {experiment['name']} stay as they are: {bandit['trouble']}"
            yield Notice("warning", "model", experiment["model"], told)


def _rollouts(state: Json) -> Iterator[Notice]:
    for rollout in state.get("rollouts", ()):
        name, model = rollout["name"], rollout["model"]
        if rollout["trouble"]:
            yield Notice("warning", "model", model, f"rollout {name}: {rollout['trouble']}")
        if rollout["state"] in ("rolled back", "paused"):
            yield Notice("warning", "model", model, f"rollout {name} is {rollout['state']}: {rollout['reason']}")


def _config(config: Json) -> Iterator[Notice]:
    changes = config.get("changes") or []
    if changes and not changes[0]["accepted"]:
        findings = "; ".join(changes[0]["findings"])
        yield Notice("warning", "config", "", f"file was refused, the one before stays in force: {findings}")
    elif changes and config.get("current") is None:
        yield Notice("warning", "config", "", "differs between workers")
