"""What Kubernetes and the operators beside it accept: their published schemas, and what admission wants more."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from deployment_files import ROOT, Object
from manifests import walk

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
"""The Kubernetes versions that are supported."""

CRDS = ROOT / "tests" / "data" / "crds"
"""Schemas of custom resources that no package on PyPI has, or none as new as is needed."""


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
def _packaged(module: str, kind: str) -> Mapping[str, Any]:
    """The JSON Schema of a custom resource, of a package on PyPI."""
    return _strict(getattr(importlib.import_module(module), kind).model_json_schema())


@cache
def _vendored(name: str) -> Mapping[str, Any]:
    """One of tests/data/crds, whose first lines say where it is from."""
    return _strict(yaml.safe_load((CRDS / f"{name}.yaml").read_text()))


def _strict(schema: dict[str, Any]) -> Mapping[str, Any]:
    """A key that a schema does not know is an error, where the API server would drop it without a word."""
    for node in [each for each in walk(schema) if isinstance(each, dict)]:
        if "properties" in node:
            node.setdefault("additionalProperties", False)
        if str(node.get("pattern", "")).startswith("^(?i)"):  # Go's way to say that case doesn't matter
            node["pattern"] = "(?i)^" + node["pattern"].removeprefix("^(?i)")
    return schema


def _by_schema(module: str, kind: str) -> Callable[[Object], None]:
    def check(thing: Object) -> None:
        spec = {"apiVersion": thing["apiVersion"], "kind": kind, "spec": thing["spec"]}
        jsonschema.validate(spec, _packaged(module, kind))

    return check


def _by_crds(*names: str) -> Callable[[Object], None]:
    """By each of some releases: the oldest that is supported, and the newest."""

    def check(thing: Object) -> None:
        for name in names:
            schema = dict(_vendored(name))
            schema["properties"] = {**schema["properties"], "metadata": {"type": "object"}}
            jsonschema.validate(thing, schema)

    return check


def _grpc_route(thing: Object) -> None:
    """The schema, and what its rules in CEL want beyond it."""
    _by_crds("grpcroute-gateway-api-1.4.0")(thing)  # 1.6.1 has the same
    for rule in thing["spec"]["rules"]:
        assert all("port" in backend for backend in rule["backendRefs"]), "a Service needs one"


def _backend_tls_policy(thing: Object) -> None:
    """The schema, and what its rules in CEL and implementations want beyond it."""
    _by_crds("backendtlspolicy-gateway-api-1.4.0", "backendtlspolicy-gateway-api-1.6.1")(thing)
    validation = thing["spec"]["validation"]
    assert ("caCertificateRefs" in validation) != ("wellKnownCACertificates" in validation)
    for authority in validation["caCertificateRefs"]:
        assert authority["kind"] == "ConfigMap", "what every implementation can read"


def _scaled_object(thing: Object) -> None:
    """The schema, and what KEDA's admission and Prometheus scaler want beyond it (their sources, 2.18 and 2.20)."""
    _by_crds("scaledobject-keda-2.18.0", "scaledobject-keda-2.20.2")(thing)
    spec = thing["spec"]
    assert spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert any(trigger["type"] not in ("cpu", "memory") for trigger in spec["triggers"]), "or there is no fallback"
    for trigger in spec["triggers"]:
        if trigger["type"] == "prometheus":
            assert trigger["metricType"] in ("AverageValue", "Value")  # Value with fallback since 2.18
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "ignoreNullValues"}
            assert trigger["metadata"]["ignoreNullValues"] == "false", "or lost scraping scales to the minimum"
        else:
            assert trigger["type"] == "cpu"  # beside `fallback` since 2.17
            assert trigger["metricType"] in ("AverageValue", "Utilization")


_CUSTOM: dict[tuple[str, str], Callable[[Object], None]] = {
    ("cert-manager.io/v1", "Certificate"): _by_schema("cloudcoil.models.cert_manager.v1", "Certificate"),
    ("keda.sh/v1alpha1", "ScaledObject"): _scaled_object,
    **{
        ("monitoring.coreos.com/v1", kind): _by_schema("cloudcoil.models.prometheus_operator.v1", kind)
        for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    },
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _grpc_route,
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): _backend_tls_policy,
    ("serving.kserve.io/v1beta1", "InferenceService"): _by_crds("inferenceservice-kserve-0.20.0"),
}
