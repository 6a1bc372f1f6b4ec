"""Makes the Helm chart's templates, values and schema from deploy/kubernetes, so that there is one source for both.

`python deploy/helm/generate.py` after a change there; `--check` only says whether it was forgotten. kustomize builds
the base with both pools, and that with each component added. What a component adds is in the chart under its condition;
so is what it changes in an object, down to the entry of a list. Components must not change the same entry in different
ways unless their conditions exclude each other, which tests/deploy/test_helm.py finds by comparing whole overlays.

A value of the chart is a place in those objects (`_PLACES`), and its default is what kustomize has there. What the
parameters of deploy/kubernetes/parameters reach needs no place: they are built with marks in place of their values.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

HERE: Final = Path(__file__).resolve().parent
CHART: Final = HERE / "inference-gateway"
KUBERNETES: Final = HERE.parent / "kubernetes"

Node = Any
"""A part of a Kubernetes object: mapping, list or scalar, or a `_Value` in its place."""

_POOLS: Final = ("triton-cpu", "triton-gpu")
FEATURES: Final[Mapping[str, str]] = {
    "triton-cpu": ".Values.triton.cpu.enabled",
    "triton-gpu": ".Values.triton.gpu.enabled",
    "models-embedded": '(eq .Values.models.delivery "embedded")',
    "models-image-volume": '(eq .Values.models.delivery "image-volume")',
    "models-pvc": '(eq .Values.models.delivery "pvc")',
    "models-object-store": '(eq .Values.models.delivery "object-store")',
    "gateway-model-files": ".Values.gateway.modelFiles",
    "sidecar": ".Values.gateway.sidecar",
    "tensorrt-build": ".Values.tensorrt.enabled",
    "autoscale-hpa": '(eq .Values.gateway.autoscaling.by "hpa")',
    "autoscale-keda-gateway": '(eq .Values.gateway.autoscaling.by "keda")',
    "autoscale-keda-cpu": ".Values.triton.cpu.autoscaling.enabled",
    "autoscale-keda-gpu": ".Values.triton.gpu.autoscaling.enabled",
    "monitoring": ".Values.monitoring.enabled",
    "tls-cert-manager": ".Values.tls.enabled",
    "gateway-api": ".Values.gatewayApi.enabled",
    "gateway-api-tls": "(and .Values.gatewayApi.enabled .Values.tls.enabled)",
    "traces": ".Values.traces.enabled",
    "experiment-store": ".Values.experimentStore.enabled",
    "grafana": ".Values.dashboard.enabled",
}
"""Component → when the chart has it. `grafana` is deploy/grafana, which is no component."""

_NEEDS: Final = {"autoscale-keda-cpu": "triton-cpu", "autoscale-keda-gpu": "triton-gpu"}

_MARKS: Final[Mapping[str, str]] = {
    "mark-namespace": ".Release.Namespace",
    "mark-prometheus-namespace": ".Values.monitoring.namespace",
    "mark-prometheus-address": ".Values.monitoring.prometheusAddress",
    "mark-prometheus-release": ".Values.monitoring.release",
    "mark-gateway-name": ".Values.gateway.image.repository",
    "mark-gateway-tag": ".Values.gateway.image.tag",
    "mark-models-name": ".Values.models.image.repository",
    "mark-models-tag": ".Values.models.image.tag",
    "mark-tensorrt-name": ".Values.tensorrt.image.repository",
    "mark-tensorrt-tag": ".Values.tensorrt.image.tag",
    "http://otel-collector.observability.svc:4318": ".Values.traces.endpoint",
}
"""Text that is built in place of a value → the value."""


@dataclass(frozen=True)
class _Value:
    """Stands in an object where the chart has a value."""

    key: str  # such as gateway.replicas
    form: str
    """text, number; block: a mapping or a list; optional: one that is left out if empty; more: entries to add; range:
    an entry for each; file, rules: the content of a file of the chart."""

    @property
    def path(self) -> str:
        return f".Values.{self.key}"


@dataclass(frozen=True)
class _Place:
    """Where a value stands: in the object KIND/NAME, at a path whose [parts] are names in lists."""

    key: str
    owner: str
    path: str
    form: str = "scalar"


def _pool(pool: str) -> list[_Place]:
    deployment, where = f"Deployment/triton-{pool}", "spec/template/spec"
    scaler = f"ScaledObject/triton-{pool}"
    return [
        _Place(f"triton.{pool}.replicas", deployment, "spec/replicas"),
        _Place(f"triton.{pool}.image", deployment, f"{where}/containers/[triton]/image"),
        _Place(f"triton.{pool}.models", deployment, f"{where}/containers/[triton]/args", "range --load-model="),
        _Place(f"triton.{pool}.resources", deployment, f"{where}/containers/[triton]/resources", "block"),
        _Place(f"triton.{pool}.nodeSelector", deployment, f"{where}/nodeSelector", "optional"),
        _Place(f"triton.{pool}.tolerations", deployment, f"{where}/tolerations", "optional"),
        _Place(
            f"triton.{pool}.serviceAccount.annotations",
            f"ServiceAccount/triton-{pool}",
            "metadata/annotations",
            "optional",
        ),
        _Place(f"triton.{pool}.podLabels", deployment, "spec/template/metadata/labels", "more"),
        _Place(f"triton.{pool}.autoscaling.min", scaler, "spec/minReplicaCount"),
        _Place(f"triton.{pool}.autoscaling.max", scaler, "spec/maxReplicaCount"),
        _Place(f"triton.{pool}.autoscaling.fallback", scaler, "spec/fallback/replicas"),
        _Place(f"triton.{pool}.autoscaling.queueMilliseconds", scaler, "spec/triggers/0/metadata/threshold"),
    ]


def _volume(part: str, claim: str) -> list[_Place]:
    owner, key = f"PersistentVolumeClaim/{claim}", f"{part}.volume"
    return [
        _Place(f"{key}.size", owner, "spec/resources/requests/storage"),
        _Place(f"{key}.accessModes", owner, "spec/accessModes", "block"),
        _Place(f"{key}.storageClassName", owner, "spec/storageClassName", "optional"),
    ]


_GATEWAY: Final = "spec/template/spec/containers/[gateway]"
_PLACES: Final[Sequence[_Place]] = (
    _Place("gateway.replicas", "Deployment/inference-gateway", "spec/replicas"),
    _Place("gateway.resources", "Deployment/inference-gateway", f"{_GATEWAY}/resources", "block"),
    _Place(
        "gateway.gracePeriodSeconds", "Deployment/inference-gateway", "spec/template/spec/terminationGracePeriodSeconds"
    ),
    _Place("gateway.callers", "NetworkPolicy/inference-gateway", "spec/ingress/0/from", "block"),
    _Place("gateway.tritons", "NetworkPolicy/inference-gateway", "spec/egress/1/to", "block"),
    _Place("gateway.autoscaling.min", "ScaledObject/inference-gateway", "spec/minReplicaCount"),
    _Place("gateway.autoscaling.max", "ScaledObject/inference-gateway", "spec/maxReplicaCount"),
    _Place("gateway.autoscaling.min", "HorizontalPodAutoscaler/inference-gateway", "spec/minReplicas"),
    _Place("gateway.autoscaling.max", "HorizontalPodAutoscaler/inference-gateway", "spec/maxReplicas"),
    _Place("gateway.autoscaling.fallback", "ScaledObject/inference-gateway", "spec/fallback/replicas"),
    _Place("gateway.autoscaling.inFlight", "ScaledObject/inference-gateway", "spec/triggers/0/metadata/threshold"),
    _Place("gateway.autoscaling.cpu", "ScaledObject/inference-gateway", "spec/triggers/1/metadata/value"),
    _Place(
        "gateway.autoscaling.cpu",
        "HorizontalPodAutoscaler/inference-gateway",
        "spec/metrics/0/resource/target/averageValue",
    ),
    *_pool("cpu"),
    *_pool("gpu"),
    *_volume("models", "model-repository"),
    *_volume("tensorrt", "tensorrt-plans"),
    *(
        _Place("imagePullSecrets", owner, "spec/template/spec/imagePullSecrets", "optional")
        for owner in (
            "Deployment/inference-gateway",
            *(f"Deployment/{pool}" for pool in _POOLS),
            "Job/publish-models",
            "Job/build-tensorrt",
        )
    ),
    *(
        _Place(
            f"models.objectStore.{key}",
            f"Deployment/{pool}",
            f"spec/template/spec/containers/[triton]/env/{name}/value",
        )
        for pool in _POOLS
        for key, name in (("url", "[MODEL_REPOSITORY]=s3"), ("region", "[AWS_DEFAULT_REGION]"))
    ),
    _Place("triton.gpu.nodeSelector", "Job/build-tensorrt", "spec/template/spec/nodeSelector", "optional"),
    _Place("triton.gpu.tolerations", "Job/build-tensorrt", "spec/template/spec/tolerations", "optional"),
    _Place("tls.issuerRef", "Certificate/inference-gateway", "spec/issuerRef", "block"),
    _Place("gatewayApi.parentRefs", "GRPCRoute/inference-gateway", "spec/parentRefs", "block"),
    _Place("gatewayApi.hostnames", "GRPCRoute/inference-gateway", "spec/hostnames", "block"),
    _Place(
        "gatewayApi.namespace",
        "NetworkPolicy/calls-from-gateway-system",
        "spec/ingress/0/from/0/namespaceSelector/matchLabels/kubernetes.io~1metadata.name",
    ),
    _Place(
        "traces.namespace",
        "NetworkPolicy/traces-to-collector",
        "spec/egress/0/to/0/namespaceSelector/matchLabels/kubernetes.io~1metadata.name",
    ),
    _Place("experimentStore.databases", "NetworkPolicy/experiments-to-database", "spec/egress/0/to", "block"),
    _Place("experimentStore.port", "NetworkPolicy/experiments-to-database", "spec/egress/0/ports/0/port"),
    _Place("traces.share", "Deployment/inference-gateway", f"{_GATEWAY}/env/[OTEL_TRACES_SAMPLER_ARG]/value"),
)

_GIVEN: Final[Mapping[str, Node]] = {
    "gateway.config": "",
    "gateway.autoscaling.by": "",
    "gateway.modelFiles": False,
    "gateway.sidecar": False,
    "triton.cpu.enabled": True,
    "triton.gpu.enabled": False,
    "triton.cpu.autoscaling.enabled": False,
    "triton.gpu.autoscaling.enabled": False,
    "models.delivery": "embedded",
    "tensorrt.enabled": False,
    "monitoring.enabled": False,
    "monitoring.runbooks": "",
    "tls.enabled": False,
    "gatewayApi.enabled": False,
    "traces.enabled": False,
    "experimentStore.enabled": False,
    "traces.endpoint": "http://otel-collector.observability.svc:4318",
    "dashboard.enabled": False,
}
"""Values that stand at no place, or whose default is none there."""

_CHOICES: Final = {
    "gateway.autoscaling.by": ["", "hpa", "keda"],
    "models.delivery": ["embedded", "image-volume", "pvc", "object-store"],
}

_SAID: Final[Mapping[str, str]] = {
    "gateway.config": "As text: --set-file gateway.config=gateway.yaml. If empty, files/gateway.yaml.",
    "gateway.modelFiles": "Labels and tables of the models in the gateway's pods, for pipelines.",
    "gateway.sidecar": "A Triton in each gateway's pod, by shared memory; docs/shared-memory.md (Kubernetes 1.29).",
    "gateway.gracePeriodSeconds": "At least drain_delay + drain of the config, and some to spare.",
    "gateway.callers": "Who may call: peers of a NetworkPolicy.",
    "gateway.tritons": "Whom it may call on port 8001, for Tritons that this chart does not bring.",
    "gateway.autoscaling.by": "keda: by calls in flight (KEDA 2.18); hpa: by CPU; empty: not at all.",
    "gateway.autoscaling.fallback": "Replicas while Prometheus can't say.",
    "gateway.autoscaling.inFlight": "Calls in flight for each replica; docs/scaling.md.",
    "triton.cpu.models": "What the pool loads.",
    "triton.gpu.models": "What the pool loads.",
    "triton.cpu.serviceAccount.annotations": "An identity of your cloud, for reading models without keys.",
    "triton.gpu.serviceAccount.annotations": "An identity of your cloud, for reading models without keys.",
    "triton.cpu.autoscaling.queueMilliseconds": "The mean wait in queues beyond which more are wanted (KEDA 2.18).",
    "triton.gpu.autoscaling.queueMilliseconds": "The mean wait in queues beyond which more are wanted (KEDA 2.18).",
    "models.delivery": "embedded: copied from an image; image-volume: that image, mounted; pvc; object-store.",
    "models.volume.storageClassName": "One that can do the access mode; empty: the cluster's default.",
    "tensorrt.volume.storageClassName": "One that can do the access mode; empty: the cluster's default.",
    "imagePullSecrets": "Names of Secrets, [{name: …}], for the pods of this chart.",
    "models.objectStore.url": "Credentials: the Secret model-store, or the identity of the pods.",
    "tensorrt.enabled": "Builds plans on the GPUs that serve them, into a volume of their own.",
    "monitoring.namespace": "Whose pods may scrape.",
    "monitoring.release": "The label by which kube-prometheus-stack finds what to scrape: its own release's name.",
    "monitoring.runbooks": "Where docs/operations.md is read.",
    "tls.enabled": "A certificate from cert-manager; the config must name it: server.tls.",
    "experimentStore.enabled": "The Secret experiment-store (url, unit-key) as GATEWAY_STORE and GATEWAY_UNIT_KEY.",
    "experimentStore.databases": "Where the PostgreSQL is: peers of a NetworkPolicy.",
    "gatewayApi.enabled": "A GRPCRoute; with TLS a BackendTLSPolicy too, whose CA is in the ConfigMap internal-ca.",
}


_IMAGES: Final = {
    "gateway": "inference-gateway",
    "models": "inference-gateway-models",
    "tensorrt": "inference-gateway-tensorrt",
}


# Building


def _kustomize(components: Sequence[str], grafana: bool = False) -> dict[str, Node]:
    """Objects by KIND/NAME, with marks in place of what the chart has values for."""
    with tempfile.TemporaryDirectory() as folder:
        up = Path(*[".."] * len(Path(folder).resolve().parts[1:]))
        root = up / KUBERNETES.relative_to("/")
        images = [
            {"name": name, "newName": f"mark-{mark}-name", "newTag": f"mark-{mark}-tag"}
            for mark, name in _IMAGES.items()
        ]
        names = [root / "components" / component / "job-name" for component in components]
        literals = [f"{key}=mark-{key}" for key in ("prometheus-namespace", "prometheus-address", "prometheus-release")]
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "mark-namespace",
            "resources": [str(root / "base"), *([str(root.parent / "grafana")] if grafana else [])],
            "components": [str(root / "components" / name) for name in components],
            "transformers": [
                *(str(folder) for folder in names if (KUBERNETES / folder.relative_to(root)).is_dir()),
                str(root / "parameters"),
            ],
            "images": images,
            "configMapGenerator": [{"name": "parameters", "behavior": "merge", "literals": literals}],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        command = [str(Path(sys.executable).with_name("kubectl")), "kustomize", folder]
        built = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    objects = {f"{each['kind']}/{each['metadata']['name']}": each for each in yaml.safe_load_all(built)}
    return {name: thing for name, thing in objects.items() if thing["kind"] != "Namespace"}  # Helm's --create-namespace


class _Values:
    """The chart's values: puts them into objects, and gathers their defaults there."""

    def __init__(self) -> None:
        self.defaults: dict[str, Node] = dict(_GIVEN)
        self.unused = set(_PLACES)

    def put_into(self, objects: dict[str, Node]) -> dict[str, Node]:
        for place in _PLACES:
            for name, thing in objects.items():
                if name.partition("--")[0] == place.owner:  # a Job's name ends in its image's tag
                    self._put(place, thing)
        for name, thing in objects.items():
            if thing["kind"] == "ConfigMap":
                thing["data"] = {key: _Value(key, "file") for key in thing["data"]}
            if name == "PrometheusRule/inference-gateway":
                thing["spec"] = _Value("alerts.yaml", "rules")
        return objects

    def _put(self, place: _Place, thing: Node) -> None:
        *way, last = place.path.split("/")
        for part in way:
            thing = _step(thing, part)
            if thing is None:
                return
        last = last.replace("~1", "/")
        if place.form == "optional" or last in thing:
            self.unused.discard(place)
        if place.form == "more":
            self.defaults.setdefault(place.key, {})
            thing[last] = {**thing[last], "~": _Value(place.key, "more")}  # "~" comes after all other keys
        elif place.form.startswith("range "):
            prefix = place.form.removeprefix("range ")
            found = [item.removeprefix(prefix) for item in thing[last] if item.startswith(prefix)]
            first = next(index for index, item in enumerate(thing[last]) if item.startswith(prefix))
            self.defaults.setdefault(place.key, found)
            rest = [item for item in thing[last] if not item.startswith(prefix)]
            thing[last] = [*rest[:first], _Value(place.key, place.form), *rest[first:]]
        elif last in thing or place.form == "optional":
            default = thing.get(
                last, "" if last.endswith("Name") else [] if last in ("tolerations", "imagePullSecrets") else {}
            )
            self.defaults.setdefault(place.key, default)
            form = ("number" if isinstance(default, int) else "text") if place.form == "scalar" else place.form
            thing[last] = _Value(place.key, form)


def _step(thing: Node, part: str) -> Node:
    """Into a mapping, to a place in a list, or to the entry with a name (and a value that begins as after `=`)."""
    if named := re.fullmatch(r"\[(.+)\](?:=(.*))?", part):
        for item in thing:
            if item["name"] == named[1] and str(item.get("value", "")).startswith(named[2] or ""):
                return item
        return None
    if isinstance(thing, list):
        return thing[int(part)]
    return thing.get(part)


# Writing: a node as it is in the base, and as it is under conditions

_Under = list[tuple[str, Node]]
"""What a node is when a condition holds, for those where it differs."""


def _any_of(conditions: Sequence[str]) -> str:
    return conditions[0] if len(conditions) == 1 else f"(or {' '.join(conditions)})"


def _wrapped(condition: str, lines: list[str]) -> list[str]:
    return [f"{{{{- if {_bare(condition)} }}}}", *lines, "{{- end }}"]


def _bare(condition: str) -> str:
    return condition[1:-1] if condition.startswith("(") else condition


def _mapping(base: Mapping[str, Node], under: _Under, indent: int) -> list[tuple[bool, list[str]]]:
    """The lines of each entry, and whether they are there whatever holds."""
    entries = []
    keys = sorted({*base, *(key for _, node in under for key in node)}, key=lambda key: (key != "name", key))
    for key in keys:
        if key in base:
            gone = [condition for condition, node in under if key not in node]
            changed = [(c, node[key]) for c, node in under if key in node and node[key] != base[key]]
            lines = _entry(key, base[key], changed, indent)
            always = not gone and not isinstance(base[key], _Value)
            entries.append((always, _wrapped(f"(not {_any_of(gone)})", lines) if gone else lines))
        else:
            for value, conditions in _by_value((c, node[key]) for c, node in under if key in node):
                entries.append((False, _wrapped(_any_of(conditions), _entry(key, value, [], indent))))
    return entries


def _by_value(pairs: Iterator[tuple[str, Node]]) -> list[tuple[Node, list[str]]]:
    found: list[tuple[Node, list[str]]] = []
    for condition, value in pairs:
        for known, conditions in found:
            if known == value:
                conditions.append(condition)
                break
        else:
            found.append((value, [condition]))
    return found


def _entry(key: str, base: Node, changed: _Under, indent: int) -> list[str]:
    margin = " " * indent
    name = yaml.safe_dump(key, width=1000).removesuffix("\n...\n").strip()
    if isinstance(base, _Value) and not changed:
        return _value(name, base, indent)
    nodes = [base, *(node for _, node in changed)]
    if all(isinstance(node, dict) and node for node in nodes):
        return [f"{margin}{name}:", *(line for _, lines in _mapping(base, changed, indent + 2) for line in lines)]
    if all(isinstance(node, list) and node for node in nodes):
        return [f"{margin}{name}:", *_list(base, changed, indent)]
    if base == [] and changed and all(isinstance(node, list) for _, node in changed):
        some = _bare(_any_of([condition for condition, _ in changed]))
        filled = [f"{margin}{name}:", *_list([], changed, indent)]
        return [f"{{{{- if {some} }}}}", *filled, "{{- else }}", f"{margin}{name}: []", "{{- end }}"]
    lines = []
    for number, (condition, node) in enumerate(changed):
        lines += [f"{{{{- {'else ' if number else ''}if {_bare(condition)} }}}}", *_entry(key, node, [], indent)]
    if lines:
        return [*lines, "{{- else }}", *_entry(key, base, [], indent), "{{- end }}"]
    return _scalar(f"{margin}{name}: ", base, indent + 2)


def _value(name: str, value: _Value, indent: int) -> list[str]:
    margin = " " * indent
    if value.form in ("text", "number"):
        return [f"{margin}{name}: {{{{ {value.path} | {'quote' if value.form == 'text' else 'int'} }}}}"]
    if value.form == "block":
        return [f"{margin}{name}:", f"{{{{- toYaml {value.path} | nindent {indent + 2} }}}}"]
    if value.form == "optional" and name.endswith("Name"):
        return _wrapped(value.path, [f"{margin}{name}: {{{{ {value.path} }}}}"])
    if value.form == "optional":
        return [
            f"{{{{- with {value.path} }}}}",
            f"{margin}{name}:",
            f"{{{{- toYaml . | nindent {indent + 2} }}}}",
            "{{- end }}",
        ]
    if value.form == "more":
        return [f"{{{{- with {value.path} }}}}", f"{{{{- toYaml . | nindent {indent} }}}}", "{{- end }}"]
    if value.form == "rules":
        replaced = f'replace "{_RUNBOOKS}" (.Values.monitoring.runbooks | default "{_RUNBOOKS}")'
        return [f"{margin}{name}:", f'{{{{ .Files.Get "files/{value.key}" | {replaced} | indent {indent + 2} }}}}']
    content = f'.Files.Get "files/{value.key}"'
    if value.key == "gateway.yaml":
        content = f".Values.gateway.config | default ({content})"
    return [f"{margin}{name}: |", f"{{{{ {content} | indent {indent + 2} }}}}"]


_RUNBOOKS: Final = "https://git.example.com/inference-gateway/docs/operations.md"


def _scalar(before: str, node: Node, indent: int) -> list[str]:
    """before: what the line begins with."""
    if isinstance(node, str) and "\n" in node:
        assert "{{" not in node, "Helm would take it for its own"
        end = "" if node.endswith("\n") else "-"
        return [f"{before}|{end}", *(" " * indent + line if line else "" for line in node.rstrip("\n").split("\n"))]
    if isinstance(node, str) and (marks := [mark for mark in _MARKS if mark in node]):
        if node in _MARKS:
            return [
                f"{before}{{{{ {_MARKS[node]} }}}}"
                if node == "mark-namespace"
                else f"{before}{{{{ {_MARKS[node]} | quote }}}}"
            ]
        text = node.replace("'", "''")
        for mark in marks:
            text = text.replace(mark, f"{{{{ {_MARKS[mark]} }}}}")
        return [f"{before}'{text}'"]
    if isinstance(node, (dict, list)) and node:
        raise AssertionError(node)
    return [before + yaml.safe_dump(node, width=1000, allow_unicode=True).removesuffix("\n...\n").strip()]


def _identity(item: Node) -> str:
    return item["name"] if isinstance(item, dict) and "name" in item else json.dumps(item, default=str)


def _list(base: list[Node], under: _Under, indent: int) -> list[str]:
    """Entries with one name are one entry; what is added comes where it was added."""
    lines = []
    added: dict[int, _Under] = {}
    for condition, node in under:
        after = -1
        there = [_identity(item) for item in base]
        for item in node:
            if _identity(item) in there:
                after = there.index(_identity(item))
            else:
                added.setdefault(after, []).append((condition, item))

    def more(after: int) -> None:
        for item, conditions in _by_value(iter(added.get(after, ()))):
            lines.extend(_wrapped(_any_of(conditions), _item(item, [], indent)))

    more(-1)
    for index, item in enumerate(base):
        same = [(c, [i for i in node if _identity(i) == _identity(item)]) for c, node in under]
        gone = [condition for condition, found in same if not found]
        changed = [(condition, found[0]) for condition, found in same if found and found[0] != item]
        written = _item(item, changed, indent)
        lines += _wrapped(f"(not {_any_of(gone)})", written) if gone else written
        more(index)
    return lines


def _item(item: Node, changed: _Under, indent: int) -> list[str]:
    margin = " " * indent
    if isinstance(item, _Value):
        prefix = item.form.removeprefix("range ")
        return [f"{{{{- range {item.path} }}}}", f"{margin}- {prefix}{{{{ . }}}}", "{{- end }}"]
    if isinstance(item, dict):
        entries = _mapping(item, changed, indent + 2)
        first = next(lines for always, lines in entries if always)
        rest = [line for _, lines in entries if lines is not first for line in lines]
        return [f"{margin}- {first[0].lstrip()}", *first[1:], *rest]
    assert not changed
    return _scalar(f"{margin}- ", item, indent + 2)


# The chart


def chart() -> dict[str, str]:
    """The generated files by their place in the chart."""
    values = _Values()
    base = values.put_into(_kustomize(_POOLS))
    alone = _kustomize(())
    variants = {
        feature: values.put_into(
            _kustomize([*_POOLS, *([feature] if feature != "grafana" else [])], feature == "grafana")
        )
        for feature in FEATURES
        if feature not in _POOLS
    }
    of_pool = {name: pool for pool in _POOLS for name in base if name not in alone and _belongs(base[name], pool)}
    files: dict[str, list[str]] = {}
    for name, thing in base.items():
        under = [(FEATURES[feature], built[name]) for feature, built in variants.items() if built[name] != thing]
        pool = of_pool.get(name)
        written = _document(thing, under, [FEATURES[pool]] if pool else [])
        files.setdefault(pool or "gateway", []).extend(written)
    for feature, built in variants.items():
        for name, thing in built.items():
            if name not in base:
                needs = [FEATURES[_NEEDS[feature]]] if feature in _NEEDS else []
                files.setdefault(feature, []).extend(_document(thing, [], [*needs, FEATURES[feature]]))
    templates = {
        f"templates/{name}.yaml": "\n".join([_HEAD.format(_source(name)), *_joined(lines), ""])
        for name, lines in files.items()
    }
    if values.unused:
        raise SystemExit("\n".join(f"{place.owner} has no {place.path}, for {place.key}" for place in values.unused))
    _marked_defaults(values)
    return {**templates, "values.yaml": _values_file(values.defaults), "values.schema.json": _schema(values.defaults)}


_HEAD: Final = "{{{{- /* Made by deploy/helm/generate.py from {}, where the comments are. */}}}}"


def _source(name: str) -> str:
    folder = {"gateway": "kubernetes/base", "grafana": "grafana"}.get(name, f"kubernetes/components/{name}")
    return f"deploy/{folder}"


def _joined(lines: Sequence[str]) -> list[str]:
    """Neighbours under one condition become one block."""
    written: list[str] = []
    opened: list[str] = []
    closed = ""  # the condition of the block that has just ended
    for line in lines:
        if line.startswith(("{{- if ", "{{- with ", "{{- range ")):
            if line == closed and line.startswith("{{- if "):
                written.pop()
            else:
                written.append(line)
            opened.append(line)
            closed = ""
        else:
            closed = opened.pop() if line == "{{- end }}" else ""
            if line.startswith("{{- else"):
                opened[-1] = "{{- if"  # no longer a block of one condition
            written.append(line)
    return written


def _belongs(thing: Node, pool: str) -> bool:
    return bool(
        thing["metadata"].get("labels", {}).get("app.kubernetes.io/component") == pool
        or thing["metadata"]["name"] == pool
    )


def _document(thing: Node, under: _Under, conditions: list[str]) -> list[str]:
    lines = ["---", *(line for _, lines in _mapping(thing, under, 0) for line in lines)]
    if not conditions:
        return lines
    return _wrapped(conditions[0] if len(conditions) == 1 else f"(and {' '.join(conditions)})", lines)


def _marked_defaults(values: _Values) -> None:
    """What is built with marks has its defaults in base/kustomization.yaml and in the files of the components."""
    base = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8"))
    (parameters,) = [each for each in base["configMapGenerator"] if each["name"] == "parameters"]
    given = dict(literal.split("=", 1) for literal in parameters["literals"])
    values.defaults.update(
        {
            "monitoring.namespace": given["prometheus-namespace"],
            "monitoring.prometheusAddress": given["prometheus-address"],
            "monitoring.release": given["prometheus-release"],
            "monitoring.runbooks": given["runbooks"],
        }
    )
    assert given["runbooks"] == _RUNBOOKS
    files = "".join(path.read_text(encoding="utf-8") for path in sorted(KUBERNETES.rglob("*.yaml")))
    for key, name in _IMAGES.items():
        (tag,) = set(re.findall(rf"\b{name}:([0-9][\w.-]*)", files))
        values.defaults[f"{key}.image.repository"] = name
        values.defaults[f"{key}.image.tag"] = tag


def _nested(defaults: Mapping[str, Node]) -> dict[str, Node]:
    tree: dict[str, Node] = {}
    for key in defaults:
        *way, last = key.split(".")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = _Leaf(key)
    return tree


@dataclass(frozen=True)
class _Leaf:
    key: str


def _values_file(defaults: Mapping[str, Node]) -> str:
    lines = [
        "# Made by deploy/helm/generate.py: defaults are those of deploy/kubernetes; values-*.yaml beside the chart",
        "# are the overlays there.",
    ]

    def write(tree: Mapping[str, Node], indent: int) -> None:
        margin = " " * indent
        for name, node in tree.items():
            if not indent:
                lines.append("")
            if not isinstance(node, _Leaf):
                lines.append(f"{margin}{name}:")
                write(node, indent + 2)
                continue
            if node.key in _SAID:
                lines.append(f"{margin}# {_SAID[node.key]}")
            default = yaml.safe_dump(
                {name: defaults[node.key]}, width=1000, sort_keys=True, default_flow_style=False, allow_unicode=True
            )
            lines.extend(margin + line for line in default.rstrip().split("\n"))

    order = [
        "imagePullSecrets",
        "gateway",
        "triton",
        "models",
        "tensorrt",
        "monitoring",
        "dashboard",
        "tls",
        "gatewayApi",
        "traces",
        "experimentStore",
    ]
    tree = _nested(
        dict(sorted(defaults.items(), key=lambda pair: (not pair[0].endswith((".enabled", ".by", ".delivery")), 0)))
    )
    assert sorted(tree) == sorted(order)
    write({name: tree[name] for name in order}, 0)
    return "\n".join([*lines, ""])


def _schema(defaults: Mapping[str, Node]) -> str:
    """A value that nobody reads is a mistake."""

    def of(tree: Node) -> Node:
        if isinstance(tree, _Leaf):
            return _type(tree.key, defaults[tree.key])
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: of(node) for name, node in tree.items()},
        }

    schema = of(_nested(defaults))
    schema["properties"]["global"] = {"type": "object"}  # Helm's own
    return json.dumps({"$schema": "https://json-schema.org/draft-07/schema#", **schema}, indent=2) + "\n"


def _type(key: str, default: Node) -> Node:
    if key in _CHOICES:
        return {"enum": _CHOICES[key]}
    if isinstance(default, str) and re.fullmatch(r"[\d.]+", default):
        return {"type": ["string", "number"]}
    for kind, name in ((bool, "boolean"), (int, "integer"), (str, "string"), (list, "array"), (dict, "object")):
        if isinstance(default, kind):
            return {"type": name}
    raise AssertionError(key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the chart is not up to date"
    )
    check = parser.parse_args().check
    files = chart()
    written = {CHART / name: content for name, content in files.items()}
    stale = [
        path for path, content in written.items() if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    made = [
        path for path in (CHART / "templates").glob("*.yaml") if "Made by deploy/helm/generate.py" in path.read_text()
    ]
    stale += [path for path in made if path not in written]
    for path in stale:
        sys.stdout.write(f"{path.relative_to(HERE)}\n")
        if not check:
            path.unlink(missing_ok=True)
            if path in written:
                path.write_text(written[path], encoding="utf-8")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
