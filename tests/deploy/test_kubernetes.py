"""Every overlay builds, its objects are what Kubernetes accepts, and what they say of each other is true."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubelet
import kubernetes_validate
import pytest
import yaml
from certificates import Authority
from deployment_files import KUBERNETES, ROOT, Object, kustomize
from manifests import containers, name_of, of_kind, only, pods, resolved, selected, selects, walk
from pod_security import violations

from gateway.cli import _parser
from gateway.config import Loaded, load, split_endpoint
from gateway.config.load import fingerprint

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
"""The Kubernetes versions that are supported."""

OVERLAYS = {
    **{each.name: each for each in sorted((KUBERNETES / "overlays").iterdir())},
    "base": KUBERNETES / "base",
    "kserve": KUBERNETES / "examples" / "kserve",
}
COMPONENTS = sorted(each.name for each in (KUBERNETES / "components").iterdir())

TRITON = {"app.kubernetes.io/name": "triton"}

# What an overlay relies on and does not bring: made by cert-manager, by the operator of the cluster, or not needed.
GIVEN_SECRETS = {"inference-gateway-tls", "model-store"}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return kustomize(OVERLAYS[request.param])


Compose = Callable[..., tuple[Object, ...]]
NEEDED = {
    "autoscale-keda-cpu": ["triton-cpu"],
    "autoscale-keda-gpu": ["triton-gpu"],
    "tensorrt-build": ["triton-gpu"],
}


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_can_be_added_to_the_base(composed: Compose, component: str) -> None:
    pools = NEEDED.get(component, ["triton-cpu"] if not component.startswith("triton-") else [])
    objects = composed(*pools, component)
    for thing in objects:
        _check_schema(thing, VERSIONS[-1])


# What Kubernetes accepts


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_passes_the_schemas_of_every_supported_version(objects: tuple[Object, ...], version: str) -> None:
    for thing in objects:
        _check_schema(thing, version)


def _check_schema(thing: Object, version: str) -> None:
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


def _inference_service(thing: Object) -> None:
    """Written from KServe's reference, since no package ships that schema."""
    assert thing["spec"].keys() == {"predictor"}
    predictor = thing["spec"]["predictor"]
    assert predictor.keys() <= {"minReplicas", "maxReplicas", "model"}
    model = predictor["model"]
    known = {"modelFormat", "protocolVersion", "runtime", "runtimeVersion", "storageUri", "args", "ports", "resources"}
    assert model.keys() <= known
    assert model["modelFormat"].keys() <= {"name", "version"}


_CUSTOM: dict[tuple[str, str], Callable[[Object], None]] = {
    ("cert-manager.io/v1", "Certificate"): _by_schema("cloudcoil.models.cert_manager.v1", "Certificate"),
    ("keda.sh/v1alpha1", "ScaledObject"): _by_schema("cloudcoil.models.keda.v1alpha1", "ScaledObject"),
    **{
        ("monitoring.coreos.com/v1", kind): _by_schema("cloudcoil.models.prometheus_operator.v1", kind)
        for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
    },
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _grpc_route,
    ("serving.kserve.io/v1beta1", "InferenceService"): _inference_service,
}


# What the pods are


def test_every_pod_is_let_into_a_restricted_namespace(objects: tuple[Object, ...]) -> None:
    for owner, template in pods(objects):
        assert not list(violations(template)), name_of(owner)


def test_the_gateway_writes_nowhere_but_to_memory_and_talks_to_nobody_in_kubernetes(
    objects: tuple[Object, ...],
) -> None:
    spec = only(objects, "Deployment", "inference-gateway")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False
    writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert all(volumes[name]["emptyDir"]["medium"] == "Memory" for name in writable)


def test_every_container_asks_for_what_it_needs_and_says_how_much_memory_is_too_much(
    objects: tuple[Object, ...],
) -> None:
    for owner, template in pods(objects):
        for container in containers(template):
            resources = container.get("resources", {})
            assert resources.get("requests", {}).keys() >= {"cpu", "memory"}, (name_of(owner), container["name"])
            assert "memory" in resources.get("limits", {}), (name_of(owner), container["name"])


def test_images_are_pinned_and_one_thing_is_one_image(objects: tuple[Object, ...]) -> None:
    images = [container["image"] for _, template in pods(objects) for container in containers(template)]
    assert all(re.search(r":[0-9][\w.-]*$", image) for image in images), images
    tags = [image.rpartition(":") for image in images]
    assert len({name for name, _, _ in tags}) == len({(name, tag) for name, _, tag in tags}), images


def test_an_overlays_image_name_reaches_an_image_volume_too(composed: Compose) -> None:
    objects = composed("triton-cpu", "models-image-volume")
    volumes = only(objects, "Deployment", "triton-cpu")["spec"]["template"]["spec"]["volumes"]
    (models,) = [volume for volume in volumes if volume["name"] == "models"]
    assert models == {"name": "models", "image": {"reference": "registry.test/models:2", "pullPolicy": "IfNotPresent"}}


def test_secrets_are_referred_to_and_not_contained(objects: tuple[Object, ...]) -> None:
    assert not of_kind(objects, "Secret")
    for node in walk(list(objects)):
        if isinstance(node, Mapping):
            for key, named_by in (("secretKeyRef", "name"), ("secretRef", "name"), ("secret", "secretName")):
                if isinstance(node.get(key), Mapping):
                    assert node[key][named_by] in GIVEN_SECRETS
            if re.search(r"password|secret|token|key", str(node.get("name", "")), re.IGNORECASE):
                assert "value" not in node, node


# What they say of each other


def test_every_configmap_and_claim_that_is_mounted_is_there(objects: tuple[Object, ...]) -> None:
    there = {name_of(each) for each in objects}
    for _, template in pods(objects):
        for volume in template["spec"].get("volumes", ()):
            if "configMap" in volume:
                assert f"ConfigMap/{volume['configMap']['name']}" in there
            if "persistentVolumeClaim" in volume:
                assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in there


def test_every_mount_and_every_probe_names_what_its_pod_has(objects: tuple[Object, ...]) -> None:
    for owner, template in pods(objects):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
        for container in containers(template):
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes, name_of(owner)
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container:
                    assert resolved(container[probe]["httpGet"]["port"], template), (name_of(owner), probe)


def test_every_selector_selects_pods_that_have_the_ports(objects: tuple[Object, ...]) -> None:
    kserve = {"serving.kserve.io/inferenceservice": "imagenet", "component": "predictor"}  # KServe makes those pods
    for service in of_kind(objects, "Service"):
        if service["spec"]["selector"] == kserve:
            continue
        found = selected(service["spec"]["selector"], objects)
        assert found, name_of(service)
        for port in service["spec"]["ports"]:
            assert all(resolved(port["targetPort"], template) for template in found), name_of(service)
    for policy in of_kind(objects, "NetworkPolicy"):
        found = selected(policy["spec"]["podSelector"], objects)
        assert found, name_of(policy)
        ports = [port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule["ports"]]
        assert all(resolved(port, template) for port in ports for template in found), name_of(policy)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"], objects), name_of(budget)
    for owner, template in pods(objects):
        if "selector" in owner["spec"]:
            assert selects(owner["spec"]["selector"], template["metadata"]["labels"]), name_of(owner)
        for spread in template["spec"].get("topologySpreadConstraints", ()):
            assert selects(spread["labelSelector"], template["metadata"]["labels"]), name_of(owner)


def test_what_is_scraped_is_there(objects: tuple[Object, ...]) -> None:
    services = of_kind(objects, "Service")
    for monitor in of_kind(objects, "ServiceMonitor"):
        found = [each for each in services if selects(monitor["spec"]["selector"], each["metadata"]["labels"])]
        assert len(found) == 1, "each gateway is scraped once"
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["port"] in [port["name"] for port in found[0]["spec"]["ports"]]
    for monitor in of_kind(objects, "PodMonitor"):
        found_pods = selected(monitor["spec"]["selector"], objects)
        assert found_pods
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert all(resolved(endpoint["port"], template) for template in found_pods)


def test_what_is_scaled_is_there_and_leaves_its_number_to_the_scaler(objects: tuple[Object, ...]) -> None:
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in only(objects, target["kind"], target["name"])["spec"], name_of(scaler)


def test_routes_lead_to_services_and_certificates_are_made_out_to_them(objects: tuple[Object, ...]) -> None:
    services = {service["metadata"]["name"]: service for service in of_kind(objects, "Service")}
    for route in of_kind(objects, "GRPCRoute"):
        for backend in (b for rule in route["spec"]["rules"] for b in rule["backendRefs"]):
            assert backend["port"] in [port["port"] for port in services[backend["name"]]["spec"]["ports"]]
    for certificate in of_kind(objects, "Certificate"):
        hosts = {name.partition(".")[0] for name in certificate["spec"]["dnsNames"]}
        assert hosts <= services.keys()
        assert certificate["spec"]["secretName"] in GIVEN_SECRETS


def test_names_in_the_namespace_are_used_once(objects: tuple[Object, ...]) -> None:
    names = [name_of(each) for each in objects]
    assert len(names) == len(set(names))
    assert all(each["metadata"].get("namespace", "inference") == "inference" for each in objects)


# The gateway's own config


@pytest.fixture(scope="module")
def tls_secret(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What cert-manager would put into the Secret."""
    files = Authority(tmp_path_factory.mktemp("authority")).issue("inference-gateway")
    return {"tls.crt": Path(files.certificate).read_text(), "tls.key": Path(files.key).read_text()}


@pytest.fixture
def mounted(objects: tuple[Object, ...], tmp_path: Path, tls_secret: Mapping[str, str]) -> Loaded:
    """The config that the gateway's container would load, from its volumes laid out as the kubelet does."""
    template = only(objects, "Deployment", "inference-gateway")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "configMap" in volume:
            lay_out(tmp_path / mount["mountPath"][1:], only(objects, "ConfigMap", volume["configMap"]["name"])["data"])
        elif "secret" in volume:
            lay_out(tmp_path / mount["mountPath"][1:], tls_secret)
    arguments = _parser().parse_args(container["args"])
    return load(tmp_path / arguments.config[1:], {})


def lay_out(folder: Path, data: Mapping[str, str], generation: str = "..2026_01_01") -> None:
    """A mounted ConfigMap or Secret: links to `..data`, which is a link to a folder that is replaced as a whole."""
    (folder / generation).mkdir(parents=True)
    for name, content in data.items():
        (folder / generation / name).write_text(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    (folder / "..new").symlink_to(generation)
    (folder / "..new").rename(folder / "..data")


def test_the_mounted_config_is_one_that_the_gateway_accepts_without_a_word(mounted: Loaded) -> None:
    assert not mounted.warnings


def test_a_turned_configmap_is_seen(mounted: Loaded) -> None:
    before = fingerprint(mounted.files)
    folder = Path(mounted.source).parent
    lay_out(folder, {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}, "..2026_01_02")
    assert fingerprint(mounted.files) != before


def test_the_config_listens_where_the_pod_says(objects: tuple[Object, ...], mounted: Loaded) -> None:
    template = only(objects, "Deployment", "inference-gateway")["spec"]["template"]
    assert mounted.config.listen == f"0.0.0.0:{resolved('grpc', template)}"
    assert mounted.config.admin.listen == f"0.0.0.0:{resolved('admin', template)}"


def test_the_pod_gets_more_time_to_end_than_the_gateway_may_take(objects: tuple[Object, ...], mounted: Loaded) -> None:
    spec = only(objects, "Deployment", "inference-gateway")["spec"]["template"]["spec"]
    server = mounted.config.server
    assert server.drain_delay >= 5, "endpoints are removed and SIGTERM is sent at the same time"
    assert spec["terminationGracePeriodSeconds"] >= server.drain_delay + server.drain + 5
    assert "lifecycle" not in spec["containers"][0], "a preStop hook would come on top"


def test_triton_gets_the_time_that_its_flags_promise(objects: tuple[Object, ...]) -> None:
    for template in selected(TRITON, objects):
        (container,) = template["spec"]["containers"]
        (exit_timeout,) = [int(a.partition("=")[2]) for a in container["args"] if a.startswith("--exit-timeout-secs")]
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert before >= 36, "5 s (x 1.2) between two look-ups and 30 s in CoreDNS' cache"
        assert template["spec"]["terminationGracePeriodSeconds"] >= before + exit_timeout + 5


def test_every_upstream_is_a_headless_service_that_the_gateway_may_reach(
    objects: tuple[Object, ...], mounted: Loaded, request: pytest.FixtureRequest
) -> None:
    alone = "base" in request.node.callspec.id  # without any Triton
    services = {service["metadata"]["name"]: service for service in of_kind(objects, "Service")}
    for endpoint in (e for upstream in mounted.config.upstreams.values() for e in upstream.endpoints):
        host, number = split_endpoint(endpoint)
        assert endpoint.startswith("dns:///"), "a plain name would be one connection to one pod"
        if alone:
            assert host not in services
            continue
        service = services[host]
        assert service["spec"]["clusterIP"] == "None"
        (port,) = [each for each in service["spec"]["ports"] if each["port"] == number]
        for template in selected(service["spec"]["selector"], objects):
            assert resolved(port["targetPort"], template) == number, "a headless name leads to the pods' own ports"
        assert any(_admits(rule, service["spec"]["selector"], number) for rule in _egress(objects))


def _egress(objects: tuple[Object, ...]) -> Iterator[Mapping[str, Any]]:
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "inference-gateway"}}:
            yield from policy["spec"].get("egress", ())


def _admits(rule: Mapping[str, Any], labels: Mapping[str, str], port: int) -> bool:
    return port in [each["port"] for each in rule["ports"]] and any(
        "podSelector" in to and selects(to["podSelector"], labels) for to in rule["to"]
    )


def test_every_variant_is_a_model_that_its_pool_loads_and_the_repository_has(
    objects: tuple[Object, ...], mounted: Loaded
) -> None:
    repository = {folder.name for folder in (ROOT / "model_repository").iterdir() if folder.is_dir()}
    for model in mounted.config.models.values():
        for variant in (model.variants or {}).values():
            assert variant.model in repository
            host, _ = split_endpoint(mounted.config.upstreams[variant.upstream].endpoints[0])
            for template in selected({"app.kubernetes.io/component": host}, objects):
                assert variant.model in _loaded(template["spec"]["containers"][0])
            for service in of_kind(objects, "InferenceService"):
                assert f"--load-model={variant.model}" in service["spec"]["predictor"]["model"]["args"]


def _loaded(triton: Mapping[str, Any]) -> set[str]:
    """What a pool's Triton loads, at its start or when it is there."""
    environ = kubelet.environment(triton)
    plans = {each.partition("=")[0] for each in environ.get("PLANS_WANTED", "").split()}
    return {
        *(argument.partition("=")[2] for argument in triton["args"] if argument.startswith("--load-model=")),
        *environ.get("LOAD_LATER", "").split(),
        *plans,
    }


def test_no_triton_loads_all_that_there_is(objects: tuple[Object, ...]) -> None:
    """In the default mode a model that can't run in this pool keeps the server from starting."""
    arguments = [template["spec"]["containers"][0]["args"] for template in selected(TRITON, objects)]
    arguments += [each["spec"]["predictor"]["model"]["args"] for each in of_kind(objects, "InferenceService")]
    assert all("--model-control-mode=explicit" in each for each in arguments)


def test_a_gpu_pools_variants_fall_back_from_the_fastest_to_what_is_always_there() -> None:
    """TensorRT, ONNX on a GPU, ONNX on a CPU, in one list."""
    config = yaml.safe_load((KUBERNETES / "overlays" / "gpu" / "config" / "gateway.yaml").read_text())
    imagenet = config["models"]["imagenet"]
    order = [next(iter(imagenet["variants"])), *imagenet["fallback"]]
    assert [imagenet["variants"][name]["model"].removeprefix("efficientnet_lite0_") for name in order] == [
        "tensorrt", "onnx_trt", "onnx_cuda", "onnx_int8", "onnx",
    ]  # fmt: skip
    assert imagenet["attempts"] == len(order)


def test_gateways_reach_every_pool_and_monitoring_reaches_everybody(objects: tuple[Object, ...]) -> None:
    gateway = {"app.kubernetes.io/name": "inference-gateway"}
    for owner, template in pods(objects):
        labels = template["metadata"]["labels"]
        rules = [
            rule
            for policy in of_kind(objects, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels)
            for rule in policy["spec"].get("ingress", ())
        ]
        peers = [(peer, port["port"]) for rule in rules for peer in rule["from"] for port in rule["ports"]]
        if labels["app.kubernetes.io/name"] == "triton":
            assert ({"podSelector": {"matchLabels": gateway}}, "grpc") in peers, name_of(owner)
        if "app.kubernetes.io/component" in labels:
            monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
            assert any(peer == monitoring for peer, _ in peers), name_of(owner)


# What is there twice


def test_the_labels_in_the_configmap_are_the_models() -> None:
    copied = (KUBERNETES / "base" / "config" / "imagenet-labels.txt").read_text()
    assert copied == (ROOT / "model_repository" / "efficientnet_lite0_onnx" / "labels.txt").read_text()


def test_the_alert_rules_in_kubernetes_are_the_ones_that_are_tested() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    thing = yaml.safe_load((KUBERNETES / "components" / "monitoring" / "alert-rules.yaml").read_text())
    assert thing["spec"] == rules
