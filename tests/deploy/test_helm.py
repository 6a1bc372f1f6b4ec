"""The chart renders what kustomize builds for the same values. Helm itself renders (4.2, in helm-python-sdk)."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import helm_python
import pytest
import yaml
from deployment_files import KUBERNETES, ROOT, SURROUNDINGS, Object, elsewhere, kustomize
from manifests import name_of, of_kind, only, pods
from pod_security import violations
from schemas import VERSIONS, check_schema

HELM = ROOT / "deploy" / "helm"
CHART = HELM / "inference-gateway"
OVERLAYS = ("local", "cpu", "gpu")

Values = Mapping[str, Any]


def values_of(overlay: str) -> dict[str, Any]:
    """What README.md tells to install with: the values beside the chart and the overlay's config."""
    values: dict[str, Any] = yaml.safe_load((HELM / f"values-{overlay}.yaml").read_text())
    config = (KUBERNETES / "overlays" / overlay / "config" / "gateway.yaml").read_text()
    return merged(values, {"gateway": {"config": config}})


def merged(values: Values, other: Values) -> dict[str, Any]:
    both = dict(values)
    for key, value in other.items():
        both[key] = merged(both[key], value) if isinstance(value, Mapping) and key in both else value
    return both


def rendered(values: Values, namespace: str = "inference") -> list[Object]:
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(dict(values), name="gateway", namespace=namespace)
    return [
        thing
        for name, text in files.items()
        if name.endswith(".yaml")
        for thing in yaml.safe_load_all(text)
        if thing is not None
    ]


def compared(objects: Sequence[Object]) -> dict[str, Object]:
    """Without the namespace itself, which Helm makes (--create-namespace); alert rules without their comments."""
    named = {name_of(thing): thing for thing in objects if thing["kind"] != "Namespace"}
    assert len(named) == len([thing for thing in objects if thing["kind"] != "Namespace"])
    return named


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_renders_what_kustomize_builds_for_the_same_values(overlay: str) -> None:
    chart, built = compared(rendered(values_of(overlay))), compared(kustomize(KUBERNETES / "overlays" / overlay))
    assert chart.keys() == built.keys()
    for name in built:
        assert chart[name] == built[name], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_so_it_does_elsewhere(overlay: str) -> None:
    """In another namespace, of a cluster whose own things are called otherwise."""
    around = {
        "namespace": SURROUNDINGS["prometheus-namespace"],
        "prometheusAddress": SURROUNDINGS["prometheus-address"],
        "release": SURROUNDINGS["prometheus-release"],
        "runbooks": SURROUNDINGS["runbooks"],
    }
    chart = compared(rendered(merged(values_of(overlay), {"monitoring": around}), "elsewhere"))
    assert chart == compared(elsewhere(KUBERNETES / "overlays" / overlay))


DELIVERIES = ("embedded", "image-volume", "pvc", "object-store")


PAIRS = tuple(itertools.product(((), ("cpu",), ("gpu",), ("cpu", "gpu")), DELIVERIES))


@pytest.mark.parametrize(("pools", "delivery"), PAIRS)
def test_every_pair_of_pools_and_delivery_is_what_kustomize_builds(
    pools: Sequence[str], delivery: str, composed: Any
) -> None:
    values = {
        "gateway": {"config": (KUBERNETES / "base" / "config" / "gateway.yaml").read_text()},
        "triton": {pool: {"enabled": pool in pools} for pool in ("cpu", "gpu")},
        "models": {"delivery": delivery, "image": {"repository": "registry.test/models", "tag": "2"}},
    }
    chart = compared(rendered(values))
    built = compared(composed(*(f"triton-{pool}" for pool in pools), f"models-{delivery}"))
    assert chart == built


FEATURES: Mapping[str, tuple[Values, Sequence[str]]] = {
    "hpa": ({"gateway": {"autoscaling": {"by": "hpa"}}}, ["autoscale-hpa"]),
    "keda": ({"gateway": {"autoscaling": {"by": "keda"}}}, ["autoscale-keda-gateway"]),
    "keda for the pool": ({"triton": {"cpu": {"autoscaling": {"enabled": True}}}}, ["autoscale-keda-cpu"]),
    "monitoring": ({"monitoring": {"enabled": True}}, ["monitoring"]),
    "tls": ({"tls": {"enabled": True}}, ["tls-cert-manager"]),
    "route": ({"gatewayApi": {"enabled": True}}, ["gateway-api"]),
    "route and tls": (
        {"gatewayApi": {"enabled": True}, "tls": {"enabled": True}},
        ["tls-cert-manager", "gateway-api", "gateway-api-tls"],
    ),
    "traces": ({"traces": {"enabled": True}}, ["traces"]),
    "sidecar": ({"gateway": {"sidecar": True}}, ["sidecar"]),
    "sidecar and model files": (
        {"gateway": {"sidecar": True, "modelFiles": True}},
        ["sidecar", "gateway-model-files"],
    ),
    "a store of experiments": ({"experimentStore": {"enabled": True}}, ["experiment-store"]),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_a_component(feature: str, composed: Any) -> None:
    values, components = FEATURES[feature]
    config = (KUBERNETES / "base" / "config" / "gateway.yaml").read_text()
    if "tls" in values:
        config = config.replace("server:\n", "server:\n  tls: {cert: ../tls/tls.crt, key: ../tls/tls.key}\n")
    image = {"repository": "registry.test/models", "tag": "2"}
    chart = compared(rendered(merged(values, {"gateway": {"config": config}, "models": {"image": image}})))
    built = compared(composed("triton-cpu", "models-embedded", *components))
    for objects in (chart, built):  # one config is that of the base, the other may name its certificate
        del objects["ConfigMap/inference-gateway"]
    assert chart == built


def patch(kind: str, name: str, **values: Any) -> dict[str, Any]:
    """A patch of an overlay; `spec__replicas=5` is 5 at /spec/replicas."""
    changes = [{"op": "add", "path": "/" + path.replace("__", "/"), "value": value} for path, value in values.items()]
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(changes)}


PRODUCT = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}
ROLE = {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/models-reader"}
POD = "spec__template__spec__"
BOX = f"{POD}containers__0__"
ELSEWHERE = [{"ipBlock": {"cidr": "10.1.2.0/28"}}]

OWN_VALUES: Mapping[str, tuple[Values, Sequence[str], Mapping[str, Any]]] = {
    "images": (
        {
            "imagePullSecrets": [{"name": "registry"}],
            "gateway": {"image": {"repository": "registry.test/gateway", "tag": "7"}},
            "triton": {"gpu": {"enabled": True}},
            "models": {"delivery": "pvc", "image": {"repository": "registry.test/models", "tag": "8"}},
            "tensorrt": {"enabled": True, "image": {"repository": "registry.test/tensorrt", "tag": "9-26.08"}},
        },
        ["triton-cpu", "triton-gpu", "models-pvc", "tensorrt-build"],
        {
            "images": [
                {"name": "inference-gateway", "newName": "registry.test/gateway", "newTag": "7"},
                {"name": "inference-gateway-models", "newName": "registry.test/models", "newTag": "8"},
                {"name": "inference-gateway-tensorrt", "newName": "registry.test/tensorrt", "newTag": "9-26.08"},
            ],
            "patches": [
                patch(kind, ".*", **{f"{POD}imagePullSecrets": [{"name": "registry"}]})
                for kind in ("Deployment", "Job")
            ],
        },
    ),
    "sizes": (
        {
            "gateway": {"replicas": 5, "resources": {"requests": {"cpu": "2"}}, "gracePeriodSeconds": 90},
            "triton": {"cpu": {"replicas": 7, "resources": {"limits": {"memory": "9Gi"}}}},
        },
        ["triton-cpu", "models-embedded"],
        {
            "replicas": [{"name": "inference-gateway", "count": 5}, {"name": "triton-cpu", "count": 7}],
            "patches": [
                patch(
                    "Deployment",
                    "inference-gateway",
                    **{f"{BOX}resources__requests__cpu": "2", f"{POD}terminationGracePeriodSeconds": 90},
                ),
                patch("Deployment", "triton-cpu", **{f"{BOX}resources__limits__memory": "9Gi"}),
            ],
        },
    ),
    "scalers": (
        {
            "gateway": {"autoscaling": {"by": "keda", "min": 4, "max": 9, "fallback": 8, "inFlight": "200"}},
            "triton": {"cpu": {"autoscaling": {"enabled": True, "min": 1, "queueMilliseconds": "35"}}},
        },
        ["triton-cpu", "models-embedded", "autoscale-keda-gateway", "autoscale-keda-cpu"],
        {
            "patches": [
                patch(
                    "ScaledObject",
                    "inference-gateway",
                    spec__minReplicaCount=4,
                    spec__maxReplicaCount=9,
                    spec__fallback__replicas=8,
                    spec__triggers__0__metadata__threshold="200",
                ),
                patch(
                    "ScaledObject",
                    "triton-cpu",
                    spec__minReplicaCount=1,
                    spec__triggers__0__metadata__threshold="35",
                ),
            ]
        },
    ),
    "the pool's place and identity": (
        {
            "triton": {
                "cpu": {"enabled": False},
                "gpu": {"enabled": True, "nodeSelector": PRODUCT, "serviceAccount": {"annotations": ROLE}},
            },
            "models": {"delivery": "object-store", "objectStore": {"url": "s3://mine/here", "region": "us-east-1"}},
            "tensorrt": {"enabled": True, "volume": {"size": "9Gi", "storageClassName": "nfs"}},
        },
        ["triton-gpu", "models-object-store", "tensorrt-build"],
        {
            "patches": [
                patch(
                    "Deployment",
                    "triton-gpu",
                    **{
                        f"{POD}nodeSelector": PRODUCT,
                        f"{BOX}env__2__value": "s3://mine/here",  # MODEL_REPOSITORY
                        f"{BOX}env__3__value": "us-east-1",  # AWS_DEFAULT_REGION
                    },
                ),
                patch("Job", "build-tensorrt.*", **{f"{POD}nodeSelector": PRODUCT}),
                patch(
                    "PersistentVolumeClaim",
                    "tensorrt-plans",
                    spec__resources__requests__storage="9Gi",
                    spec__storageClassName="nfs",
                ),
                patch("ServiceAccount", "triton-gpu", metadata__annotations=ROLE),
            ]
        },
    ),
    "a database elsewhere": (
        {"experimentStore": {"enabled": True, "databases": ELSEWHERE, "port": 6432}},
        ["triton-cpu", "models-embedded", "experiment-store"],
        {
            "patches": [
                {
                    "target": {"kind": "NetworkPolicy", "name": "experiments-to-database"},
                    "patch": json.dumps(
                        [
                            {"op": "replace", "path": "/spec/egress/0/to", "value": ELSEWHERE},
                            {"op": "replace", "path": "/spec/egress/0/ports/0/port", "value": 6432},
                        ]
                    ),
                }
            ]
        },
    ),
    "what is in front and around": (
        {
            "gatewayApi": {"enabled": True, "hostnames": ["models.shop.test"]},
            "models": {"delivery": "pvc", "volume": {"size": "100Gi", "storageClassName": "nfs"}},
        },
        ["triton-cpu", "models-pvc", "gateway-api"],
        {
            "patches": [
                patch("GRPCRoute", "inference-gateway", spec__hostnames=["models.shop.test"]),
                patch(
                    "PersistentVolumeClaim",
                    "model-repository",
                    spec__resources__requests__storage="100Gi",
                    spec__storageClassName="nfs",
                ),
            ]
        },
    ),
}


@pytest.mark.parametrize("case", OWN_VALUES)
def test_values_of_ones_own_do_what_an_overlays_patches_do(case: str, composed: Any) -> None:
    values, components, more = OWN_VALUES[case]
    config = (KUBERNETES / "base" / "config" / "gateway.yaml").read_text()
    chart = compared(rendered(merged(values, {"gateway": {"config": config}})))
    built = compared(composed(*components, **{"images": [], **more}))
    assert chart == built


def test_every_component_can_be_switched_on_in_the_chart() -> None:
    """One that is new and forgotten in generate.py is not in the chart at all."""
    components = {each.name for each in (KUBERNETES / "components").iterdir()}
    assert components | {"grafana"} == set(generator().FEATURES)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_chart_renders_passes_the_schemas(version: str) -> None:
    for values in ({}, *map(values_of, OVERLAYS)):
        for thing in rendered(values):
            check_schema(thing, version)


def test_what_the_chart_renders_is_let_into_a_restricted_namespace() -> None:
    for values in ({}, *map(values_of, OVERLAYS)):
        assert not [
            (name_of(owner), list(violations(template)))
            for owner, template in pods(rendered(values))
            if list(violations(template))
        ]


def test_the_chart_passes_helms_lint() -> None:
    found = helm_python.lint(str(CHART))
    assert not found["errors"]
    assert [each["error"] for each in found["messages"]] in ([], ["icon is recommended"])


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", HELM / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_chart_is_made_from_the_manifests_as_they_are() -> None:
    """`python deploy/helm/generate.py` was run after the last change of deploy/kubernetes."""
    files = generator().chart()
    assert {name for name in files if (CHART / name).read_text(encoding="utf-8") != files[name]} == set()
    by_hand = {"templates/checks.yaml"}
    assert {f"templates/{path.name}" for path in (CHART / "templates").glob("*.yaml")} == files.keys() - {
        "values.yaml",
        "values.schema.json",
    } | by_hand


# Values


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"models": {"delivery": "ftp"}}, id="a delivery that is none"),
        pytest.param({"gateway": {"replica": 3}}, id="a misspelled value"),
        pytest.param({"gateway": {"replicas": "three"}}, id="a number that is none"),
        pytest.param({"gateway": {"config": "listen: ["}}, id="a config that is no YAML"),
        pytest.param({"tensorrt": {"enabled": True}}, id="plans without a GPU pool"),
        pytest.param({"tls": {"enabled": True}}, id="a certificate that no config names"),
    ],
)
def test_values_that_are_wrong_are_refused(values: Values) -> None:
    with pytest.raises(helm_python.HelmError):
        rendered(values)


def test_what_is_installed_without_values_answers(tmp_path: Path) -> None:
    """The default config is one for the default pool."""
    objects = rendered({})
    config = yaml.safe_load(only(objects, "ConfigMap", "inference-gateway")["data"]["gateway.yaml"])
    (triton,) = [each for each in of_kind(objects, "Deployment") if each["metadata"]["name"] == "triton-cpu"]
    arguments = triton["spec"]["template"]["spec"]["containers"][0]["args"]
    for variant in config["models"]["imagenet"]["variants"].values():
        assert f"--load-model={variant['model']}" in arguments


def test_values_for_a_cloud_reach_the_pods() -> None:
    values = {
        "triton": {
            "cpu": {
                "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/models"}},
                "podLabels": {"azure.workload.identity/use": "true"},
                "nodeSelector": {"pool": "cpu"},
                "autoscaling": {"enabled": True, "queueMilliseconds": 30},
            }
        },
        "models": {"delivery": "pvc", "volume": {"storageClassName": "nfs"}},
    }
    objects = rendered(values)
    for thing in objects:
        check_schema(thing, VERSIONS[-1])
    assert only(objects, "ServiceAccount", "triton-cpu")["metadata"]["annotations"]
    template = only(objects, "Deployment", "triton-cpu")["spec"]["template"]
    assert template["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert template["spec"]["nodeSelector"] == {"pool": "cpu"}
    assert only(objects, "ScaledObject", "triton-cpu")["spec"]["triggers"][0]["metadata"]["threshold"] == "30"
    assert only(objects, "PersistentVolumeClaim", "model-repository")["spec"]["storageClassName"] == "nfs"


def test_a_package_has_everything_in_it(tmp_path: Path) -> None:
    """The files that the chart shares with kustomize are links in the checkout, and files in a package."""
    path = helm_python.package(str(CHART), destination=str(tmp_path))
    shutil.unpack_archive(str(path), tmp_path / "out")
    packed = tmp_path / "out" / "inference-gateway"
    assert (packed / "files" / "alerts.yaml").read_text() == (ROOT / "deploy/prometheus/alerts.yaml").read_text()
    assert not [each for each in packed.rglob("*") if each.is_symlink()]
    with helm_python.Chart.load(str(packed)) as chart:
        assert chart.render({}, name="gateway", namespace="inference")
