"""The current state of a worker, for the admin plane and the metrics. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite

from gateway.api.catalogue import Catalogue
from gateway.forwarding.found_models import READY, FoundModels
from gateway.forwarding.threads import Threads
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.hooks import (
    AnswersNow,
    ArmGuardrailNow,
    BanditNow,
    ExperimentNow,
    GateNow,
    GuardrailNow,
    MemoryNow,
    PipelinesNow,
    RolloutNow,
    ShadowNow,
    StoreNow,
    VerdictNow,
)
from gateway.quotas import QuotaNow, Quotas
from gateway.readiness import Readiness
from gateway.routing import Direct, Route
from gateway.steps.budget import MEMORY
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.pool import SubsetPool

Json = Mapping[str, object]


class WorkerState:
    """A `StateSource` of the admin plane."""

    def __init__(
        self,
        version: str,
        readiness: Readiness,
        topology: CurrentTopology,
        catalogue: Catalogue,
        threads: Threads,
        *,
        gates: Callable[[], Sequence[GateNow]],
        shadows: Callable[[], Sequence[ShadowNow]],
        answers: Callable[[], Sequence[AnswersNow]] = tuple,
        experiments: Callable[[], Sequence[ExperimentNow]] = tuple,
        store: Callable[[], StoreNow | None] = lambda: None,
        rollouts: Callable[[], Sequence[RolloutNow]] = tuple,
        breaker: Callable[[str, str], str],
        retries_left: Callable[[], Mapping[str, int]],
        quotas: Quotas,
        memory: Callable[[], MemoryNow],
        listen: Callable[[], str],
        names: Callable[[], Json],
        traffic: Callable[[], object],
        config: Callable[[], Json],
        outside: Callable[[str], Sequence[Endpoint]],
        found: FoundModels,
    ) -> None:
        """
        gates:    the limits in force.
        shadows:  what became of copies.
        answers:  what was found in those that are looked at.
        experiments:  those of the config.
        store:    where what they see is kept; None if there are none.
        rollouts: those of the config.
        breaker:  what the breaker of a model's variant does.
        retries_left: how many calls may be sent again now, of the models that have had any.
        quotas:   in force.
        memory:   how it stands.
        listen:   the address for calls.
        names:    the names of endpoints that are looked up, with their addresses.
        traffic:  numbers of the last minutes; None if another process has them.
        config:   as `GET /config` shows it.
        outside:  the endpoints that are connected although they are not in the subset of their upstream.
        found:    the models that the config does not name and that may be called.
        """
        self._version = version
        self._readiness = readiness
        self._topology = topology
        self._catalogue = catalogue
        self._threads = threads
        self._gates = gates
        self._shadows = shadows
        self._answers = answers
        self._experiments = experiments
        self._store = store
        self._rollouts = rollouts
        self._breaker = breaker
        self._retries_left = retries_left
        self._quotas = quotas
        self._memory = memory
        self._listen = listen
        self._names = names
        self._traffic = traffic
        self._config = config
        self._outside = outside
        self._found = found

    def is_live(self) -> bool:
        """A worker that answers is live: no known fault needs a restart."""
        return True

    def readiness(self) -> tuple[bool, Sequence[str]]:
        reasons = self._readiness.reasons()
        return not reasons, reasons

    def config(self) -> Json:
        return self._config()

    def state(self) -> Json:
        """Public models → variants, pipelines → the models they call and what runs, upstreams → endpoints.

        Of an upstream with a subset, `upstreams` has the endpoints in it, and `subsets` what else there is."""
        topology, retries_left = self._topology.now, self._retries_left()
        return {
            "version": self._version,
            "listen": self._listen(),
            "ready": self._readiness.is_ready(),
            "draining": self._readiness.is_draining,
            "models": {
                name: {
                    "ready": bool(self._catalogue.is_ready(name)),
                    "retries_left": retries_left.get(name),
                    **_route_state(route, topology, self._breaker),
                }
                for name, route in topology.routes.public.items()
            },
            "pipelines": self._pipelines(topology),
            "triton_models": self._triton_models(topology),
            "limits": [_limit_state(gate) for gate in self._gates()],
            "shadows": [_shadow_state(shadow) for shadow in self._shadows()],
            "answers": [asdict(each) for each in self._answers()],
            "experiments": [_experiment_state(experiment) for experiment in self._experiments()],
            "rollouts": [_rollout_state(rollout) for rollout in self._rollouts()],
            "store": _store_state(self._store()),
            "quotas": [_quota_state(quota) for quota in self._quotas.now(time.monotonic())],
            "quota_store": _STORE[self._quotas.is_store_away],
            "memory": _memory_state(self._memory()),
            "upstreams": {name: [_endpoint_state(e) for e in pool.endpoints] for name, pool in topology.pools.items()},
            "subsets": {
                name: {
                    "endpoints": len(pool.addresses),
                    "in_subset": len(pool.endpoints),
                    "outside": [_endpoint_state(e) for e in self._outside(name)],
                }
                for name, pool in topology.pools.items()
                if isinstance(pool, SubsetPool)
            },
            "names": self._names(),
            "traffic": self._traffic(),
        }

    def _pipelines(self, topology: Topology) -> Json:
        steps = self._threads.usage()
        return {
            name: {
                "ready": model.is_ready(),
                "calls": list(model.pipeline.models),
                "faults": model.faults,
                "steps": {
                    step.step: {
                        "running": step.running,
                        "waiting": step.waiting,
                        "oldest_seconds": round(step.oldest, 1),
                    }
                    for step in steps
                    if step.pipeline == name
                },
            }
            for name, model in topology.pipelines.items()
        }

    def _triton_models(self, topology: Topology) -> Json:
        """Those that the config does not name, while all may be called."""
        if topology.routes.direct is not Direct.ALL:
            return {}
        return {
            name: {"ready": state == READY, "state": state, "reason": reason}
            for name, (state, reason) in self._found.states.items()
            if not topology.is_known(name)
        }

    def pipelines_now(self) -> PipelinesNow:
        """For the metrics. It may be called from any thread."""
        faults = {name: len(model.faults) for name, model in self._topology.now.pipelines.items()}
        return PipelinesNow(self._threads.usage(), MEMORY.held, MEMORY.most or 0, faults)


def _route_state(route: Route, topology: Topology, breaker: Callable[[str, str], str]) -> Mapping[str, object]:
    return {
        "shares": dict(route.draws.shares),  # with what a rollout has moved
        "fallback": None if route.fallback is None else list(route.fallback),
        "variants": {
            v.name: {
                "upstream": v.upstream,
                "model": v.model,
                "version": v.version,
                "ready": topology.is_available(v),
                "breaker": breaker(route.model, v.name),
            }
            for v in route.variants
        },
    }


def _shadow_state(shadow: ShadowNow) -> Mapping[str, object]:
    answered = sum(shadow.results.values()) - shadow.results["failed"]
    return {
        "model": shadow.model,
        "variant": shadow.variant,
        "results": shadow.results,
        "dropped": shadow.dropped,
        "mean_seconds": round(shadow.seconds / answered, 6) if answered else None,
        "mean_measures": {name: round(value, 6) for name, value in shadow.measures.items()},
        "not_finite": shadow.wrong,
        "parity": asdict(shadow.parity) if shadow.parity is not None else None,
    }


def _experiment_state(experiment: ExperimentNow) -> Mapping[str, object]:
    return {
        "name": experiment.name,
        "model": experiment.model,
        "exposures": experiment.exposures,
        "units": experiment.units,
        "sample_ratio_p_value": experiment.sample_ratio,
        "sample_ratio_mismatched": experiment.is_mismatched,
        "stopped_with": experiment.stopped_with or None,
        "verdict": None if experiment.verdict is None else _verdict_state(experiment.verdict),
        "bandit": None if experiment.bandit is None else _bandit_state(experiment.bandit),
    }


def _verdict_state(verdict: VerdictNow) -> Mapping[str, object]:
    return {
        "age_seconds": round(verdict.age, 1),
        "decides": verdict.decides,
        "judgements": [{"arm": arm, "outcome": outcome, "verdict": word} for arm, outcome, word in verdict.judgements],
        "guardrails": [_guardrail_state(each) for each in verdict.guardrails],
    }


def _guardrail_state(guardrail: ArmGuardrailNow | GuardrailNow) -> Mapping[str, object]:
    return {**asdict(guardrail), "distance": guardrail.distance if isfinite(guardrail.distance) else None}


def _bandit_state(bandit: BanditNow) -> Mapping[str, object]:
    return {
        "epoch": bandit.epoch,
        "epochs": bandit.epochs,
        "shares": dict(bandit.shares),
        "since": bandit.since,
        "overdue_seconds": round(bandit.overdue, 1),
        "decides": bandit.decides,
        "store_age_seconds": round(bandit.age, 1),
        "trouble": bandit.trouble,
        "waits": bandit.waits,
        "history": [{"at": at, "units": units, "shares": dict(shares)} for at, units, shares in bandit.history],
    }


def _rollout_state(rollout: RolloutNow) -> Mapping[str, object]:
    return {
        "name": rollout.name,
        "model": rollout.model,
        "from": rollout.before,
        "to": rollout.after,
        "state": rollout.phase,
        "step": rollout.step,
        "steps": rollout.steps,
        "share": rollout.share,
        "since": rollout.since,
        "reason": rollout.reason,
        "waits": list(rollout.waits),
        "guardrails": [_guardrail_state(each) for each in rollout.guardrails],
        "units": rollout.units,
        "decides": rollout.decides,
        "store_age_seconds": round(rollout.age, 1),
        "overdue_seconds": round(rollout.overdue, 1),
        "trouble": rollout.trouble,
        "history": [
            {"at": at, "state": phase, "share": share, "reason": reason} for at, phase, share, reason in rollout.history
        ],
    }


def _store_state(store: StoreNow | None) -> Mapping[str, object] | None:
    if store is None:
        return None
    return {
        "name": store.name,
        "away": store.why if store.is_away else None,
        "waiting": store.waiting,
        "written": store.written,
        "dropped": store.dropped,
        "reports": store.reports,
        "reports_refused": store.reports_refused,
        "duplicates": store.duplicates,
    }


def _limit_state(gate: GateNow) -> Mapping[str, object]:
    return {
        "upstream": gate.upstream,
        "model": gate.model,
        "limit": gate.limit,
        "in_flight": gate.in_flight,
        "waiting": gate.waiting,
        "latency_seconds": round(gate.latency, 4),
        "answers_per_second": round(gate.rate, 1),
        "refused": gate.refused,
    }


_STORE = {None: "", False: "up", True: "away"}


def _quota_state(quota: QuotaNow) -> Mapping[str, object]:
    """`left` is this worker's. Names of callers are theirs to choose, so they are cut."""
    limits = quota.limits
    said = {"requests": limits.requests, "bytes": limits.bytes, "rows": limits.rows, "concurrent": limits.concurrent}
    return {
        "caller": quota.caller,
        "model": quota.model,
        "limits": {name: limit for name, limit in said.items() if limit},
        "left": {name: round(left, 3) for name, left in quota.left.items()},
        "in_flight": quota.in_flight,
    }


def _memory_state(now: MemoryNow) -> Mapping[str, object]:
    return {
        "step": now.step,
        "refuses": now.refuses,
        "bytes": now.used,
        "limit_bytes": now.limit,
        "connections_reset": now.resets,
    }


def _endpoint_state(endpoint: Endpoint) -> Mapping[str, object]:
    return {
        "address": endpoint.address,
        "state": endpoint.state.value,
        "reason": endpoint.reason,
        "in_flight": endpoint.in_flight,
        "warmth": round(endpoint.warmth, 2),
        "latency_seconds": {
            f"{name}:{version}" if version else name: round(record.latency.seconds, 4)
            for (name, version), record in list(endpoint.records.items())
            if record.latency.seconds
        },
        "ejected": [name for (name, _), record in list(endpoint.records.items()) if record.ejections],
        "ejected_for": {
            name: "all" if record.is_ejected() else f"{len(record.ejections)} of its callers"
            for (name, _), record in list(endpoint.records.items())
            if record.ejections
        },
        "models": {f"{name}:{version}" if version else name: ok for (name, version), ok in endpoint.models.items()},
        "probed": {
            f"{name}:{version}" if version else name: why or "well"
            for (name, version), why in list(endpoint.probed.items())
        },
        **({"shared_memory": endpoint.memory.state} if endpoint.memory is not None else {}),
    }
