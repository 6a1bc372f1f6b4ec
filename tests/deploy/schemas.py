"""What Kubernetes and the operators beside it accept, by their published schemas or, where there is none, reference."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
from deployment_files import Object
from manifests import walk

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
"""The Kubernetes versions that are supported."""


def check_schema(thing: Object, version: str) -> None:
    group = thing["apiVersion"].rpartition("/")[0]
    if "." not in group or (group.endswith(".k8s.io") and group != "gateway.networking.k8s.io"):
        _check_standard(json.dumps(thing), version)
        return
    check = _CUSTOM.get((thing["apiVersion"], thing["kind"]))
    assert check, f"nobody checks {thing['apiVersion']} {thing['kind']}"
    check(thing)


@cache  # most objects are the same in several overlays, and the schemas are large
def _check_standard(thing: str, version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own
        kubernetes_validate.validate(json.loads(thing), version, strict=True)


@cache
def _published(module: str, kind: str) -> Mapping[str, Any]:
    """The JSON Schema of a custom resource, made strict: a key that it does not know is an error."""
    schema: dict[str, Any] = getattr(importlib.import_module(module), kind).model_json_schema()
    for node in [each for each in walk(schema) if isinstance(each, dict)]:
        if "properties" in node:
            node.setdefault("additionalProperties", False)
        if str(node.get("pattern", "")).startswith("^(?i)"):  # Go's way to say that case doesn't matter
            node["pattern"] = "(?i)^" + node["pattern"].removeprefix("^(?i)")
    return schema


def _by_schema(module: str, kind: str) -> Callable[[Object], None]:
    def check(thing: Object) -> None:
        spec = {"apiVersion": thing["apiVersion"], "kind": kind, "spec": thing["spec"]}
        jsonschema.validate(spec, _published(module, kind))

    return check


def _grpc_route(thing: Object) -> None:
    """Written from the Gateway API's reference, since no package ships that schema."""
    spec = thing["spec"]
    assert spec.keys() <= {"parentRefs", "hostnames", "rules"}
    for parent in spec["parentRefs"]:
        assert parent.keys() <= {"group", "kind", "name", "namespace", "sectionName", "port"}
        assert parent["name"]
    assert all(re.fullmatch(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)+", host) for host in spec["hostnames"])
    assert 1 <= len(spec["rules"]) <= 16
    for rule in spec["rules"]:
        assert rule.keys() <= {"name", "matches", "filters", "backendRefs", "sessionPersistence"}
        for match in rule["matches"]:
            assert match.keys() <= {"method", "headers"}
            assert match["method"].keys() <= {"type", "service", "method"}
            assert match["method"].get("type", "Exact") in ("Exact", "RegularExpression")
        for backend in rule["backendRefs"]:
            assert backend.keys() <= {"group", "kind", "name", "namespace", "port", "weight", "filters"}
            assert isinstance(backend["port"], int)


def _backend_tls_policy(thing: Object) -> None:
    """Written from the Gateway API's reference (1.4), since no package ships that schema."""
    spec = thing["spec"]
    assert spec.keys() <= {"targetRefs", "validation", "options"}
    assert 1 <= len(spec["targetRefs"]) <= 16
    for target in spec["targetRefs"]:
        assert {"group", "kind", "name"} <= target.keys() <= {"group", "kind", "name", "sectionName"}
    validation = spec["validation"]
    assert validation.keys() <= {"caCertificateRefs", "hostname", "subjectAltNames", "wellKnownCACertificates"}
    assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", validation["hostname"])
    assert ("caCertificateRefs" in validation) != ("wellKnownCACertificates" in validation)
    for authority in validation["caCertificateRefs"]:
        assert authority.keys() == {"group", "kind", "name"}
        assert authority["kind"] == "ConfigMap", "what every implementation can read"


def _scaled_object(thing: Object) -> None:
    """KEDA's schema, and what its admission and its Prometheus scaler want beyond it (2.18, from the reference)."""
    _by_schema("cloudcoil.models.keda.v1alpha1", "ScaledObject")(thing)
    spec = thing["spec"]
    assert {"failureThreshold", "replicas"} <= spec["fallback"].keys() <= {"failureThreshold", "replicas", "behavior"}
    assert any(trigger["type"] not in ("cpu", "memory") for trigger in spec["triggers"]), "or there is no fallback"
    for trigger in spec["triggers"]:
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        if trigger["type"] == "prometheus":
            assert trigger["metricType"] in ("AverageValue", "Value")  # Value with fallback since 2.18
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "ignoreNullValues"}
            assert trigger["metadata"]["ignoreNullValues"] == "false", "or lost scraping scales to the minimum"
        else:
            assert trigger["type"] == "cpu"
            assert trigger["metricType"] in ("AverageValue", "Utilization")


def _inference_service(thing: Object) -> None:
    """Written from KServe's reference, since no package ships that schema."""
    assert thing["spec"].keys() == {"predictor"}
    predictor = thing["spec"]["predictor"]
    assert predictor.keys() <= {"minReplicas", "maxReplicas", "model", "serviceAccountName"}
    model = predictor["model"]
    known = {"modelFormat", "protocolVersion", "runtime", "runtimeVersion", "storageUri", "args", "ports", "resources"}
    assert model.keys() <= known
    assert model["modelFormat"].keys() <= {"name", "version"}


_CUSTOM: dict[tuple[str, str], Callable[[Object], None]] = {
    ("cert-manager.io/v1", "Certificate"): _by_schema("cloudcoil.models.cert_manager.v1", "Certificate"),
    ("keda.sh/v1alpha1", "ScaledObject"): _scaled_object,
    **{
        ("monitoring.coreos.com/v1", kind): _by_schema("cloudcoil.models.prometheus_operator.v1", kind)
        for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    },
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _grpc_route,
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): _backend_tls_policy,
    ("serving.kserve.io/v1beta1", "InferenceService"): _inference_service,
}
