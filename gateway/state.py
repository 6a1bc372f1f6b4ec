"""What a worker says of itself on `/state`: models, pipelines, upstreams and endpoints as they are now. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.api.catalogue import Catalogue
from gateway.forwarding.inference import Inference
from gateway.hooks import GateNow, StepNow
from gateway.routing import Route
from gateway.upstream.endpoint import Endpoint


def state_of(inference: Inference, catalogue: Catalogue, steps: Sequence[StepNow] = ()) -> dict[str, object]:
    """JSON values: public models → variants, pipelines → the models they call, upstreams → endpoints.

    steps: of pipelines, those that run or wait.
    """
    topology = inference.topology
    return {
        "models": {
            name: {"ready": bool(catalogue.is_ready(name)), **_route_state(route, inference)}
            for name, route in topology.routes.public.items()
        },
        "pipelines": {
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
        },
        "limits": [_limit_state(gate) for gate in inference.gates.now()],
        "upstreams": {name: [_endpoint_state(e) for e in pool.endpoints] for name, pool in topology.pools.items()},
    }


def _route_state(route: Route, inference: Inference) -> Mapping[str, object]:
    return {
        "shares": dict(route.split.shares),
        "fallback": None if route.fallback is None else list(route.fallback),
        "variants": {
            v.name: {
                "upstream": v.upstream,
                "model": v.model,
                "version": v.version,
                "ready": inference.is_available(v),
            }
            for v in route.variants
        },
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


def _endpoint_state(endpoint: Endpoint) -> Mapping[str, object]:
    return {
        "address": endpoint.address,
        "state": endpoint.state.value,
        "reason": endpoint.reason,
        "in_flight": endpoint.in_flight,
        "models": {f"{name}:{version}" if version else name: ok for (name, version), ok in endpoint.models.items()},
    }
