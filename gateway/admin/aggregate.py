"""Admin: joins the answers of several workers into one. Pure: JSON values in, JSON values out.

Workers run the same config and see the same endpoints, each for itself. Where they differ, the worst counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
"""A worker's answer to `/state` or `/config`. Any: it is JSON."""

_BREAKERS_WORST_FIRST = ("tripped", "probing", "admitting")
_STORE_WORST_FIRST = ("away", "up", "")
_LATENCY = "latency_seconds"
_AGE = "store_age_seconds"
_WORST_FIRST = ("down", "unprobed", "suspect", "ready")


def merged_state(states: Sequence[Json]) -> dict[str, Any]:
    """One state for all workers. states: the workers' own; an empty one is left out, since its worker does not serve
    yet."""
    serving = [state for state in states if state]
    if not serving:
        return {
            "ready": False,
            "draining": False,
            "models": {},
            "pipelines": {},
            "triton_models": {},
            "limits": [],
            "rollouts": [],
            "quotas": [],
            "quota_store": "",
            "upstreams": {},
            "subsets": {},
            "names": {},
        }
    return {
        "version": serving[0]["version"],
        "listen": serving[0]["listen"],
        "ready": all(state["ready"] for state in serving),
        "draining": any(state["draining"] for state in serving),
        "models": _by_name(serving, "models", _model),
        "pipelines": _by_name(serving, "pipelines", _pipeline),
        "triton_models": _by_name([{"triton_models": {}, **each} for each in serving], "triton_models", _least_ready),
        "limits": _limits(serving),
        "shadows": _shadows(serving),
        "answers": _answers(serving),
        "experiments": _experiments(serving),
        "rollouts": _rollouts(serving),
        "store": _store(serving),
        "quotas": _quotas(serving),
        "quota_store": min((state.get("quota_store", "") for state in serving), key=_STORE_WORST_FIRST.index),
        "memory": _memory(serving),
        "upstreams": _by_name(serving, "upstreams", _upstream),
        "subsets": _by_name([{"subsets": {}, **each} for each in serving], "subsets", _subset),
        "names": _by_name(serving, "names", lambda found: max(found, key=lambda each: bool(each["failure"]))),
    }


def merged_config(configs: Sequence[Json]) -> dict[str, Any]:
    """One history for all workers: the config in force if it is the same in all of them, and each change once."""
    known = [config for config in configs if config]
    current = [config["current"] for config in known if config["current"]]
    refused = [config["last_refused"] for config in known if config["last_refused"]]
    changes: dict[tuple[Any, ...], Json] = {}
    for change in sorted((change for config in known for change in config["changes"]), key=lambda each: each["time"]):
        # Workers read one file within seconds of one another; a minute later it is another change.
        changes.setdefault((change["digest"], change["accepted"], *change["findings"], change["time"][:16]), change)
    return {
        "current": current[0] if len({each["digest"] for each in current}) == 1 else None,
        "last_refused": max(refused, key=lambda each: str(each["time"]), default=None),
        "changes": list(changes.values())[::-1],
    }


def _by_name(states: Sequence[Json], key: str, join: Any) -> dict[str, Any]:
    """Join what the workers say under `key`, name by name. join: takes the values of one name."""
    names = dict.fromkeys(name for state in states for name in state[key])
    return {name: join([state[key][name] for state in states if name in state[key]]) for name in names}


def _limits(states: Sequence[Json]) -> list[Json]:
    """Each worker limits what it sends itself."""
    found: dict[tuple[str, str], list[Json]] = {}
    for limit in (limit for state in states for limit in state.get("limits", ())):
        found.setdefault((limit["upstream"], limit["model"]), []).append(limit)
    return [_limit(each) for each in found.values()]


def _limit(found: Sequence[Json]) -> Json:
    reasons = dict.fromkeys(reason for each in found for reason in each["refused"])
    return {
        **found[0],
        **{key: sum(each[key] for each in found) for key in ("limit", "in_flight", "waiting", "answers_per_second")},
        "latency_seconds": max(each["latency_seconds"] for each in found),
        "refused": {reason: sum(each["refused"].get(reason, 0) for each in found) for reason in reasons},
    }


def _shadows(states: Sequence[Json]) -> list[Json]:
    """Each worker sends copies of its own calls, and has a parity gate of its own, of which the worst is told."""
    found: dict[tuple[str, str], list[Json]] = {}
    for shadow in (each for state in states for each in state.get("shadows", ())):
        found.setdefault((shadow["model"], shadow["variant"]), []).append(shadow)
    return [_shadow(each) for each in found.values()]


def _shadow(found: Sequence[Json]) -> Json:
    compared = [each["results"]["agreed"] + each["results"]["differed"] for each in found]
    names = dict.fromkeys(name for each in found for name in each["mean_measures"])
    parities = [each["parity"] for each in found if each["parity"] is not None]
    took = [each["mean_seconds"] for each in found if each["mean_seconds"] is not None]
    return {
        **found[0],
        **{key: _sums([each[key] for each in found]) for key in ("results", "dropped")},
        "mean_seconds": max(took, default=None),
        "mean_measures": {name: _mean([each["mean_measures"].get(name) for each in found], compared) for name in names},
        "not_finite": sum(each["not_finite"] for each in found),
        "parity": min(parities, key=lambda each: (each["is_open"], each["compared"]), default=None),
    }


def _sums(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _mean(values: Sequence[float | None], counts: Sequence[int]) -> float | None:
    """Of those that have one, each weighed by its count."""
    known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None and count]
    total = sum(count for _, count in known)
    return round(sum(value * count for value, count in known) / total, 6) if total else None


def _answers(states: Sequence[Json]) -> list[Json]:
    """Each worker looks at its own."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for each in (each for state in states for each in state.get("answers", ())):
        found.setdefault((each["model"], each["variant"]), Counter()).update(each["results"])
    return [
        {"model": model, "variant": variant, "results": dict(results)} for (model, variant), results in found.items()
    ]


def _experiments(states: Sequence[Json]) -> list[Json]:
    """What each worker has told adds up; what is in the store is the same for all, each at its own instant."""
    found: dict[str, list[Json]] = {}
    for experiment in (each for state in states for each in state.get("experiments", ())):
        found.setdefault(experiment["name"], []).append(experiment)
    return [
        {
            **max(each, key=lambda one: sum(one["units"].values())),
            "exposures": sum(one["exposures"] for one in each),
            **_verdict([one["verdict"] for one in each if one.get("verdict")]),
            **_bandit([one["bandit"] for one in each if one.get("bandit")]),
        }
        for each in found.values()
    ]


def _verdict(verdicts: Sequence[Json]) -> Json:
    """All read one, and who has read it last knows it best."""
    if not verdicts:
        return {}
    told = min(verdicts, key=lambda one: (not one["judgements"], one["age_seconds"]))
    return {"verdict": {**told, "decides": any(one["decides"] for one in verdicts)}}


def _bandit(bandits: Sequence[Json]) -> Json:
    """As of rollouts. Who decides knows the latest epoch first."""
    if not bandits:
        return {}
    told = {
        **max(bandits, key=lambda one: (one["decides"], one["epoch"], -one[_AGE])),
        _AGE: max(one[_AGE] for one in bandits),
        "trouble": next((one["trouble"] for one in bandits if one["trouble"]), ""),
    }
    return {"bandit": told}


def _rollouts(states: Sequence[Json]) -> list[Json]:
    """What the worker says that decides, if one does; the store is as old as for the worker that is furthest behind."""
    found: dict[str, list[Json]] = {}
    for rollout in (each for state in states for each in state.get("rollouts", ())):
        found.setdefault(rollout["name"], []).append(rollout)
    return [
        {
            **max(each, key=lambda one: (one["decides"], -one[_AGE])),
            _AGE: max(one[_AGE] for one in each),
            "trouble": next((one["trouble"] for one in each if one["trouble"]), ""),
        }
        for each in found.values()
    ]


def _quotas(states: Sequence[Json]) -> list[Json]:
    """Each worker has a share of what is left."""
    found: dict[tuple[str, str], list[Json]] = {}
    for quota in (quota for state in states for quota in state.get("quotas", ())):
        found.setdefault((quota["caller"], quota["model"]), []).append(quota)
    return [
        {
            **each[0],
            "left": {name: round(sum(one["left"].get(name, 0.0) for one in each), 3) for name in each[0]["left"]},
            "in_flight": sum(one["in_flight"] for one in each),
        }
        for each in found.values()
    ]


def _store(states: Sequence[Json]) -> Json | None:
    """Away if it is so for any worker."""
    found = [state["store"] for state in states if state.get("store")]
    if not found:
        return None
    reasons = dict.fromkeys(reason for each in found for reason in each["dropped"])
    counts = ("waiting", "written", "reports", "reports_refused", "duplicates")
    return {
        **max(found, key=lambda each: each["away"] is not None),
        **{key: sum(each[key] for each in found) for key in counts},
        "dropped": {reason: sum(each["dropped"].get(reason, 0) for each in found) for reason in reasons},
    }


def _memory(states: Sequence[Json]) -> Json | None:
    """The workers of a container see the same bytes, each at its own instant."""
    found = [state["memory"] for state in states if state.get("memory")]
    if not found:
        return None
    worst = max(found, key=lambda each: (each["step"], each["bytes"]))
    return {**worst, "connections_reset": sum(each["connections_reset"] for each in found)}


def _least_ready(found: Sequence[Json]) -> Json:
    return min(found, key=lambda each: bool(each["ready"]))


def _pipeline(found: Sequence[Json]) -> Json:
    faults = dict.fromkeys(fault for each in found for fault in each.get("faults", ()))
    return {
        **_least_ready(found),
        "faults": list(faults),
        "steps": _by_name([{"steps": {}, **each} for each in found], "steps", _step),
    }


def _step(found: Sequence[Json]) -> Json:
    return {
        "running": sum(each["running"] for each in found),
        "waiting": sum(each["waiting"] for each in found),
        "oldest_seconds": max(each["oldest_seconds"] for each in found),
    }


def _model(found: Sequence[Json]) -> Json:
    left = [each["retries_left"] for each in found if each.get("retries_left") is not None]
    fewest = {"retries_left": min(left)} if left else {}
    return {**_least_ready(found), **fewest, "variants": _by_name(found, "variants", _variant)}


def _variant(found: Sequence[Json]) -> Json:
    """A worker that has had few calls may not know yet what the others have learnt."""
    breakers = [each["breaker"] for each in found if "breaker" in each]
    worst = {"breaker": min(breakers, key=_BREAKERS_WORST_FIRST.index)} if breakers else {}
    return {**_least_ready(found), **worst}


def _upstream(found: Sequence[Sequence[Json]]) -> list[Json]:
    by_address: dict[str, list[Json]] = {}
    for endpoint in (endpoint for endpoints in found for endpoint in endpoints):
        by_address.setdefault(endpoint["address"], []).append(endpoint)
    return [_endpoint(each) for each in by_address.values()]


def _subset(found: Sequence[Json]) -> Json:
    """Each worker has a subset of its own."""
    in_subset = max(each["in_subset"] for each in found)
    return {**found[0], "in_subset": in_subset, "outside": _upstream([each["outside"] for each in found])}


def _endpoint(found: Sequence[Json]) -> Json:
    worst = min(found, key=lambda each: _WORST_FIRST.index(each["state"]))
    return {
        **worst,
        "in_flight": sum(each["in_flight"] for each in found),
        "ejected": sorted({model for each in found for model in each.get("ejected", ())}),
        "ejected_for": _by_name([{"ejected_for": {}, **each} for each in found], "ejected_for", _most_callers),
        "models": _all_ready(each["models"] for each in found),
        "warmth": min(each.get("warmth", 1.0) for each in found),
        "latency_seconds": _by_name([{_LATENCY: {}, **each} for each in found], _LATENCY, max),
        "probed": _by_name([{"probed": {}, **each} for each in found], "probed", _worst_probe),
    }


def _most_callers(found: Sequence[str]) -> str:
    """Each worker counts those that it has met."""
    return "all" if "all" in found else max(found, key=lambda each: int(each.split()[0]))


def _worst_probe(found: Sequence[str]) -> str:
    return next((each for each in found if each != "well"), "well")


def _all_ready(found: Iterable[Mapping[str, bool]]) -> dict[str, bool]:
    ready: dict[str, bool] = {}
    for models in found:
        for model, is_ready in models.items():
            ready[model] = ready.get(model, True) and is_ready
    return ready
