"""Every overlay builds, its objects are what Kubernetes accepts, and what they say of each other is true."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubelet
import pytest
import yaml
from certificates import Authority
from deployment_files import KUBERNETES, ROOT, SURROUNDINGS, Object, elsewhere, kustomize
from manifests import containers, name_of, of_kind, only, pods, resolved, selected, selects, walk
from pod_security import violations
from schemas import VERSIONS, check_schema

from gateway.assemble import shared_of
from gateway.cli import _parser
from gateway.config import Loaded, load, split_endpoint
from gateway.config.load import fingerprint
from gateway.upstream.room import is_this_host

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
        check_schema(thing, VERSIONS[-1])


# What Kubernetes accepts


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_passes_the_schemas_of_every_supported_version(objects: tuple[Object, ...], version: str) -> None:
    for thing in objects:
        check_schema(thing, version)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ScaledObject", ("spec", "fallback"), {"failureThreshold": 4, "replica": 6}),
        ("ScaledObject", ("spec", "triggers", 0, "metricType"), 7),
        ("ScaledObject", ("spec", "pollInterval"), 15),
        ("GRPCRoute", ("spec", "rules", 0, "backendRefs", 0, "port"), "grpc"),
        ("BackendTLSPolicy", ("spec", "validation", "hostname"), "no host"),
        ("BackendTLSPolicy", ("spec", "targetRefs", 0, "namespace"), "inference"),
    ],
)
def test_what_an_operator_would_refuse_or_drop_is_found(kind: str, path: Sequence[Any], value: object) -> None:
    (thing, *_) = copy.deepcopy(of_kind(kustomize(OVERLAYS["gpu"]), kind))
    node: Any = thing
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check_schema(thing, VERSIONS[-1])


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
        if policy["spec"]["podSelector"] == {"matchLabels": kserve}:
            continue
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


def test_where_there_are_a_route_and_tls_the_route_knows_whom_to_trust(objects: tuple[Object, ...]) -> None:
    if of_kind(objects, "GRPCRoute") and of_kind(objects, "Certificate"):
        (policy,), (certificate,) = of_kind(objects, "BackendTLSPolicy"), of_kind(objects, "Certificate")
        assert policy["spec"]["validation"]["hostname"] in certificate["spec"]["dnsNames"]
        backends = {
            b["name"] for r in of_kind(objects, "GRPCRoute") for rule in r["spec"]["rules"] for b in rule["backendRefs"]
        }
        assert backends == {target["name"] for target in policy["spec"]["targetRefs"]}


def test_pods_that_stay_have_a_service_account_of_their_own_without_a_token(objects: tuple[Object, ...]) -> None:
    accounts = {}
    for deployment in of_kind(objects, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        assert only(objects, "ServiceAccount", spec["serviceAccountName"])["automountServiceAccountToken"] is False
        assert accounts.setdefault(spec["serviceAccountName"], name_of(deployment)) == name_of(deployment)


def test_names_can_be_looked_up_whoever_answers_them(objects: tuple[Object, ...]) -> None:
    """A cache on the node is no pod, and OpenShift's listen on 5353."""
    everywhere = [rule for rule in _egress(objects) if "to" not in rule]
    ports = {(port["protocol"], port["port"]) for rule in everywhere for port in rule["ports"]}
    assert ports == {(protocol, port) for protocol in ("TCP", "UDP") for port in (53, 5353)}


def test_names_in_the_namespace_are_used_once(objects: tuple[Object, ...]) -> None:
    names = [name_of(each) for each in objects]
    assert len(names) == len(set(names))
    (namespace,) = of_kind(objects, "Namespace")
    assert {each["metadata"].get("namespace", namespace["metadata"]["name"]) for each in objects} == {
        namespace["metadata"]["name"]
    }


WITH_PARAMETERS = [name for name in OVERLAYS if name != "base"]


@pytest.mark.parametrize("overlay", WITH_PARAMETERS)
def test_whatever_spells_the_namespace_out_follows_it(overlay: str) -> None:
    before = next(each["metadata"]["name"] for each in kustomize(OVERLAYS[overlay]) if each["kind"] == "Namespace")
    for thing in elsewhere(OVERLAYS[overlay]):
        assert (thing["metadata"].get("namespace") or thing["metadata"]["name"]) == "elsewhere"
        if thing["kind"] == "ConfigMap":
            continue
        for text in (each for each in walk(thing) if isinstance(each, str)):
            assert f".{before}.svc" not in text, name_of(thing)
            assert f'"{before}"' not in text, name_of(thing)
        for trigger in thing["spec"].get("triggers", ()) if thing["kind"] == "ScaledObject" else ():
            query = trigger["metadata"].get("query", "")
            assert query.count('namespace="elsewhere"') == len(re.findall(r"(?:gateway|nv)_\w+\{", query)), query


@pytest.mark.parametrize("overlay", WITH_PARAMETERS)
def test_what_the_cluster_around_is_called_is_said_once(overlay: str) -> None:
    """Parameters reach whatever repeats them, and are no object themselves."""
    objects = elsewhere(OVERLAYS[overlay])
    assert not [each for each in objects if each["metadata"]["name"] == "parameters"]
    for thing in objects:
        if thing["apiVersion"].startswith("monitoring.coreos.com/"):
            assert thing["metadata"]["labels"]["release"] == SURROUNDINGS["prometheus-release"]
        for node in (each for each in walk(thing) if isinstance(each, Mapping)):
            assert node.get("serverAddress", SURROUNDINGS["prometheus-address"]) == SURROUNDINGS["prometheus-address"]
            assert node.get("kubernetes.io/metadata.name") != "monitoring"
            if "runbook_url" in node:
                assert node["runbook_url"].startswith(SURROUNDINGS["runbooks"] + "#")


def test_kserves_pods_are_let_into_their_namespace_and_may_read_their_models() -> None:
    """Its storage initializer does not meet `restricted`, and reads with what a ServiceAccount names."""
    objects = kustomize(OVERLAYS["kserve"])
    (namespace,), (service,) = of_kind(objects, "Namespace"), of_kind(objects, "InferenceService")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"
    account = only(objects, "ServiceAccount", service["spec"]["predictor"]["serviceAccountName"])
    assert account["secrets"]


def test_gateways_honor_their_own_labels_and_tritons_do_not(composed: Compose) -> None:
    """A Triton's backends may show metrics of their own; none of them may say of which namespace and pool it is."""
    objects = composed("triton-cpu", "monitoring")
    (gateway,), (triton,) = of_kind(objects, "ServiceMonitor"), of_kind(objects, "PodMonitor")
    assert all(endpoint["honorLabels"] for endpoint in gateway["spec"]["endpoints"])
    assert not any(endpoint.get("honorLabels") for endpoint in triton["spec"]["podMetricsEndpoints"])


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


def test_a_sidecar_and_its_gateway_have_the_same_memory_and_user_and_nobody_else_reaches_it(composed: Compose) -> None:
    objects = composed("sidecar")
    template = only(objects, "Deployment", "inference-gateway")["spec"]["template"]
    assert not list(violations(template))
    triton = next(each for each in template["spec"]["initContainers"] if each["name"] == "triton")
    (gateway,) = template["spec"]["containers"]
    assert triton["restartPolicy"] == "Always", "it starts before the gateway and ends after it"
    assert "--allow-client-shm=true" in triton["args"]
    shared = []
    for container in (triton, gateway):
        (mounted,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        shared.append((mounted, container["securityContext"]["runAsUser"]))
    assert shared[0] == shared[1]
    (volume,) = [each["emptyDir"] for each in template["spec"]["volumes"] if each["name"] == shared[0][0]]
    environ = {each["name"]: each.get("value", "") for each in gateway["env"]}
    config = load(KUBERNETES / "base" / "config" / "gateway.yaml", environ).config
    (endpoint,) = config.upstreams["triton"].endpoints
    assert is_this_host(endpoint)
    bytes_of = {"1Gi": 1 << 30}
    assert 0 < shared_of(config) <= bytes_of[gateway["resources"]["limits"]["memory"]] // 4
    assert volume["medium"] == "Memory"
    assert shared_of(config) <= bytes_of[volume["sizeLimit"]] // 2, "the Python backend has its tensors there, too"
    opened = {
        port["port"]
        for policy in of_kind(objects, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
        for port in rule["ports"]
    }
    assert opened == {"grpc", "admin"}


def test_triton_gets_the_time_that_its_flags_promise(objects: tuple[Object, ...]) -> None:
    for template in selected(TRITON, objects):
        (container,) = template["spec"]["containers"]
        (exit_timeout,) = [int(a.partition("=")[2]) for a in container["args"] if a.startswith("--exit-timeout-secs")]
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert before >= 36, "5 s (x 1.2) between two look-ups and 30 s in CoreDNS' cache"
        assert template["spec"]["terminationGracePeriodSeconds"] >= before + exit_timeout + 5


def test_every_upstream_is_a_headless_service(
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


def _egress(objects: tuple[Object, ...]) -> Iterator[Mapping[str, Any]]:
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "inference-gateway"}}:
            yield from policy["spec"].get("egress", ())


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


# What is there twice


def test_the_labels_in_the_configmap_are_the_models() -> None:
    copied = (KUBERNETES / "base" / "config" / "imagenet-labels.txt").read_text()
    assert copied == (ROOT / "model_repository" / "efficientnet_lite0_onnx" / "labels.txt").read_text()


def test_the_alert_rules_in_kubernetes_are_the_ones_that_are_tested() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    thing = yaml.safe_load((KUBERNETES / "components" / "monitoring" / "alert-rules.yaml").read_text())
    assert thing["spec"] == rules
