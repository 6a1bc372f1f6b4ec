"""Who reaches whom in each overlay: what it needs is allowed, and nothing else is.

Every pair of a source and a port is looked at, and only those are expected to be allowed that a reason here names: an
upstream in the mounted config, a scraper, a caller, a route, a collector in the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import kubelet
import pytest
import yaml
from deployment_files import KUBERNETES, SURROUNDINGS, Object, elsewhere, kustomize
from manifests import of_kind, only, port_names
from network_policies import OURS, OUTSIDE, Peer, allowed

from gateway.config import split_endpoint

OVERLAYS = {
    **{each.name: each for each in sorted((KUBERNETES / "overlays").iterdir())},
    "kserve": KUBERNETES / "examples" / "kserve",
}

CALLERS = {
    "a pod with the callers' label": Peer(OURS, {"inference-client": "true"}),
    "a namespace with the callers' label": Peer.elsewhere("shop", inference_client="true"),
}
STRANGERS = {
    "a pod of the namespace": Peer(OURS, {"app": "debug"}),
    "a pod of another namespace": Peer.elsewhere("shop", labels={"app.kubernetes.io/name": "inference-gateway"}),
    "a pod there with the callers' label": Peer.elsewhere("shop", labels={"inference-client": "true"}),
    "somebody outside": OUTSIDE,
}
MONITORING = Peer.elsewhere("monitoring")
ROUTER = Peer.elsewhere("gateway-system")
KEDA = Peer.elsewhere("keda")  # asks Prometheus, never the pods

PREDICTOR = Peer(OURS, {"serving.kserve.io/inferenceservice": "imagenet", "component": "predictor"})
"""A pod that KServe makes."""


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return kustomize(OVERLAYS[request.param])


def gateway(objects: tuple[Object, ...]) -> Mapping[str, Any]:
    return dict(only(objects, "Deployment", "inference-gateway")["spec"]["template"])


def tritons(objects: tuple[Object, ...]) -> dict[str, Mapping[str, Any]]:
    return {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in of_kind(objects, "Deployment")
        if each["metadata"]["labels"]["app.kubernetes.io/name"] == "triton"
    }


def sources(objects: tuple[Object, ...]) -> dict[str, Peer]:
    """Everybody who might try."""
    return {
        **CALLERS,
        **STRANGERS,
        "monitoring": MONITORING,
        "the Gateway in front": ROUTER,
        "KEDA": KEDA,
        "a gateway": Peer.of(gateway(objects)),
        **{name: Peer.of(template) for name, template in tritons(objects).items()},
        **{job["metadata"]["name"]: Peer.of(job["spec"]["template"]) for job in of_kind(objects, "Job")},
    }


def expected_at_the_gateway(name: str, overlay: str, port: str, objects: tuple[Object, ...]) -> bool:
    if port == "admin":
        return name == "monitoring"
    if name == "somebody outside":
        return False
    if overlay == "local":  # a laptop: any pod may call
        return True
    return name in CALLERS or (name == "the Gateway in front" and bool(of_kind(objects, "GRPCRoute")))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gateways_are_reached_by_callers_and_scrapers_only(overlay: str) -> None:
    objects = kustomize(OVERLAYS[overlay])
    template = gateway(objects)
    found = {
        (name, port): allowed(objects, source, Peer.of(template), number)
        for name, source in sources(objects).items()
        for port, number in port_names(template).items()
    }
    # Its own egress lets no pod of ours call a gateway but those that no policy holds.
    wanted = {
        (name, port): expected_at_the_gateway(name, overlay, port, objects) and name != "a gateway"
        for name, port in found
    }
    assert found == wanted


def test_tritons_are_reached_by_gateways_and_scrapers_only(objects: tuple[Object, ...]) -> None:
    """Also by no neighbour, since whoever reaches one may load and unload its models."""
    for pool, template in tritons(objects).items():
        reached = {
            (name, port)
            for name, source in sources(objects).items()
            for port, number in port_names(template).items()
            if allowed(objects, source, Peer.of(template), number)
        }
        assert reached == {("a gateway", "grpc"), ("monitoring", "metrics")}, pool


def test_a_predictor_of_kserves_is_reached_by_gateways_and_scrapers_only() -> None:
    objects = kustomize(OVERLAYS["kserve"])
    reached = {
        (name, port)
        for name, source in sources(objects).items()
        for port in (8002, 8080, 9000)
        if allowed(objects, source, PREDICTOR, port)
    }
    assert reached == {("a gateway", 9000), ("monitoring", 8002)}


def upstreams(objects: tuple[Object, ...]) -> Iterator[tuple[str, int]]:
    """Host and port of every endpoint in the config that the gateway mounts."""
    config = yaml.safe_load(only(objects, "ConfigMap", "inference-gateway")["data"]["gateway.yaml"])
    for upstream in config["upstreams"].values():
        yield from map(split_endpoint, upstream["endpoints"])


def test_a_gateway_reaches_its_upstreams_names_and_its_collector_and_nothing_else(objects: tuple[Object, ...]) -> None:
    template = gateway(objects)
    mine = Peer.of(template)
    pods = {**{name: Peer.of(pod) for name, pod in tritons(objects).items()}, "imagenet-predictor-pods": PREDICTOR}
    for host, port in upstreams(objects):
        assert allowed(objects, mine, pods[host], port), host
    for resolver in (OUTSIDE, Peer.elsewhere("kube-system"), Peer.elsewhere("openshift-dns")):
        for port in (53, 5353):
            assert allowed(objects, mine, resolver, port, "UDP")
            assert allowed(objects, mine, resolver, port, "TCP")
    collector = kubelet.environment(template["spec"]["containers"][0]).get("OTEL_EXPORTER_OTLP_ENDPOINT")
    where = urlsplit(collector or "http://otel-collector.observability.svc:4318")
    namespace = str(where.hostname).split(".")[1]
    assert allowed(objects, mine, Peer.elsewhere(namespace), where.port or 80) is (collector is not None)
    for stranger in (OUTSIDE, Peer.elsewhere("shop"), Peer(OURS, {"app": "debug"}), Peer.elsewhere("kube-system")):
        assert not any(allowed(objects, mine, stranger, port) for port in (80, 443, 6443, 8001))


def test_with_a_store_of_experiments_a_gateway_reaches_its_database_and_no_other_port_there(composed: Any) -> None:
    objects = composed("experiment-store", "triton-cpu", "models-embedded")
    mine, database = Peer.of(gateway(objects)), {"app.kubernetes.io/name": "postgresql"}
    there = Peer.elsewhere("databases", labels=database)
    assert allowed(objects, mine, there, 5432)
    assert not allowed(objects, mine, there, 22)
    for stranger in (
        Peer.elsewhere("databases"),
        Peer.elsewhere("shop", labels=database),
        Peer(OURS, database),
        OUTSIDE,
    ):
        assert not allowed(objects, mine, stranger, 5432)
    assert not allowed(composed("triton-cpu", "models-embedded"), mine, there, 5432)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_scrapers_are_let_in_where_they_are_called_otherwise(overlay: str) -> None:
    """The parameter reaches every policy that a scraper passes."""
    objects = elsewhere(OVERLAYS[overlay])
    for template in (gateway(objects), *tritons(objects).values()):
        port = port_names(template).get("metrics") or port_names(template)["admin"]
        assert allowed(objects, Peer.elsewhere(SURROUNDINGS["prometheus-namespace"]), Peer.of(template), port)
        assert not allowed(objects, MONITORING, Peer.of(template), port)
    if overlay == "kserve":
        assert allowed(objects, Peer.elsewhere(SURROUNDINGS["prometheus-namespace"]), PREDICTOR, 8002)


# The rules themselves, as the reference has them


def policy(direction: str, *rules: Mapping[str, Any]) -> Object:
    spec = {"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": [direction], direction.lower(): list(rules)}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": spec}


SHOPS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}
BLUE = {"podSelector": {"matchLabels": {"color": "blue"}}}
PORT = {"ports": [{"protocol": "TCP", "port": 80}]}


@pytest.mark.parametrize(
    ("policies", "source", "expected"),
    [
        pytest.param([], OUTSIDE, True, id="no policy, no wall"),
        pytest.param([policy("Ingress")], OUTSIDE, False, id="no rule lets nobody in"),
        pytest.param([policy("Ingress", {})], OUTSIDE, True, id="an empty rule lets everybody in"),
        pytest.param([policy("Ingress", PORT)], OUTSIDE, True, id="a rule without peers is about the port"),
        pytest.param([policy("Ingress", {"ports": [{"port": 81}]})], OUTSIDE, False, id="another port"),
        pytest.param([policy("Ingress", {"from": [BLUE]})], Peer(OURS, {"color": "blue"}), True, id="pods here"),
        pytest.param([policy("Ingress", {"from": [BLUE]})], Peer("shop", {"color": "blue"}), False, id="not there"),
        pytest.param([policy("Ingress", {"from": [SHOPS | BLUE]})], Peer("shop"), False, id="both in one peer: and"),
        pytest.param([policy("Ingress", {"from": [SHOPS, BLUE]})], Peer("shop"), True, id="two peers: or"),
        pytest.param([policy("Ingress"), policy("Ingress", PORT)], OUTSIDE, True, id="policies add up"),
        pytest.param([policy("Egress")], OUTSIDE, True, id="egress is another matter"),
        pytest.param([policy("Egress")], Peer(OURS, {"app": "a"}), False, id="and the source's own"),
    ],
)
def test_policies_are_read_as_kubernetes_reads_them(policies: list[Object], source: Peer, expected: bool) -> None:
    assert allowed(policies, source, Peer(OURS, {"app": "a"}), 80) is expected
