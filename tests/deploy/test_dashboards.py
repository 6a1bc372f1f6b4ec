"""Alerts fire when they should, and every query of alerts, dashboard and autoscalers asks for numbers that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser
import pytest
import yaml
from deployment_files import KUBERNETES, ROOT

from gateway.triton import LocalTriton

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "inference-gateway.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text(encoding="utf-8"))
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}

OPERATORS_OWN = {"namespace", "pod", "container", "endpoint", "service", "job", "instance"}
"""Labels that the Prometheus operator sets on whatever a ServiceMonitor or PodMonitor names, over a metric's own."""

ADDED = (OPERATORS_OWN - {"endpoint"}) | {"pool"}
"""Those that a query may ask for, with what deploy/ adds itself. `endpoint` is the scraped port's name there and
nothing at all in compose: who asks for it takes it for something else."""

RUNBOOKS = "https://git.example.com/inference-gateway/docs/operations.md"

INCIDENTS = {
    "gateways-gone", "gpu-pool-gone", "one-triton-slow", "one-triton-fails", "probe-fails",
    "bad-model-version", "pipeline-broken", "overload", "memory-scarce",
    "certificate-expired", "config-rejected", "sequence-lost", "triton-restart-loop", "disk-full", "clock-skew",
    "experiment-invalid", "experiment-guardrail", "rollout-rolled-back", "rollout-stuck", "bandit-stuck", "store-away",
    "quota-store-away",
}  # fmt: skip

OTHERS: Mapping[str, set[str]] = {
    # Of others, by their documentation: Prometheus, kubelet, node exporter, kube-state-metrics, prometheus_client.
    "ALERTS": {"alertname", "alertstate"},
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
    "node_timex_offset_seconds": set(),
    "kube_deployment_status_replicas_available": {"deployment"},
    "kube_deployment_spec_replicas": {"deployment"},
    "process_cpu_seconds_total": {"worker"},
    # Of Triton on a machine with a GPU (docs/user_guide/metrics.md there).
    "nv_gpu_utilization": {"gpu_uuid"},
    "nv_gpu_memory_used_bytes": {"gpu_uuid"},
    # Of NVIDIA's DCGM exporter (etc/default-counters.csv there); GPU_I_ID where there is MIG.
    **{
        f"DCGM_FI_DEV_{name}": {"Hostname", "gpu", "GPU_I_ID"}
        for name in ("GPU_UTIL", "FB_USED", "FB_FREE", "XID_ERRORS", "GPU_TEMP", "SM_CLOCK", "POWER_USAGE")
    },
}


def documented() -> dict[str, set[str]]:
    """Metric → labels, from docs/metrics.md, which a test of its own compares with a real scrape."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(gateway_\w+)` \| (\w+) \|([^|]*)\|", page, re.MULTILINE)
    metrics: dict[str, set[str]] = {}
    for name, kind, labels in rows:
        names = [name + suffix for suffix in ("_bucket", "_sum", "_count")] if kind == "histogram" else [name]
        for each in names:
            metrics[each] = set(re.findall(r"`(\w+)`", labels)) | ({"le"} if each.endswith("_bucket") else set())
    return metrics


def triton_metrics(triton: LocalTriton) -> str:
    """What Triton shows; its metrics come up a little after it is ready for requests."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://{triton.metrics_address}/metrics", timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("Triton shows no metrics")


@pytest.fixture(scope="module")
def known(triton: LocalTriton) -> Mapping[str, set[str]]:
    """Every metric there is, with its labels; Triton's as a real one shows them."""
    metrics = {**documented(), **OTHERS}
    for line in triton_metrics(triton).splitlines():
        if found := re.fullmatch(r"(nv_\w+)(?:\{(.*)\})? \S+", line):
            metrics.setdefault(found[1], set()).update(re.findall(r"(\w+)=", found[2] or ""))
    return metrics


def panels() -> Iterator[Mapping[str, Any]]:
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> dict[str, str]:
    """Every query in deploy/, by where it is."""
    found = {f"alert {name}": rule["expr"] for name, rule in RULES.items()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        found[f"annotation {annotation['name']}"] = annotation["expr"]
    for file in KUBERNETES.glob("components/*/scaled-object.yaml"):
        scaled = yaml.safe_load(file.read_text())
        for trigger in scaled["spec"]["triggers"]:
            if "query" in trigger["metadata"]:
                found[f"scaler {scaled['metadata']['name']}"] = trigger["metadata"]["query"]
    return found


def plain(query: str) -> str:
    """A query without Grafana's variables."""
    query = query.replace("$__rate_interval", "1m").replace("$namespace", ".*")
    return query.replace("$model", ".*").replace("$upstream", ".*")


def test_no_metric_loses_a_label_to_the_operator(known: Mapping[str, set[str]]) -> None:
    ours = {name: labels & OPERATORS_OWN for name, labels in known.items() if name.startswith(("gateway_", "nv_"))}
    assert not any(ours.values()), {name: labels for name, labels in ours.items() if labels}


def test_every_alert_and_every_scaler_looks_at_each_namespace_by_itself() -> None:
    """Staging and production share a Prometheus: one must neither hide nor scale the other."""
    for name, query in queries().items():
        if name.startswith("scaler"):
            selectors = re.findall(r"\b(?:gateway|nv)_\w+(?:\{([^}]*)\})?", query)
            assert all('namespace="inference"' in selector for selector in selectors), name
        if name.startswith("alert") and "node_" not in query:  # a node is in no namespace
            groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
            assert groups, name
            assert all("namespace" in re.split(r",\s*", group) for group in groups), name
            wanted = "job" if "gateway_" in query else "namespace"  # two gateways in one namespace, too
            assert all(wanted in re.split(r",\s*", group) for group in groups), name


def test_the_dashboard_shows_the_chosen_namespaces_only() -> None:
    for name, query in queries().items():
        if name.startswith(("panel", "annotation")):
            selectors = re.findall(r"\b(?:gateway|nv|process)_\w+(\{[^}]*\})?", query)
            assert all('namespace=~"$namespace"' in selector for selector in selectors), name


@pytest.mark.parametrize("query", queries().values(), ids=queries())
def test_every_query_is_promql_about_metrics_and_labels_that_exist(query: str, known: Mapping[str, set[str]]) -> None:
    text = plain(query)
    promql_parser.parse(text)
    without_strings = re.sub(r'"[^"]*"', '""', text)
    metrics = set(re.findall(r"\b(?:gateway|nv|process|kubelet|kube|node|DCGM)_\w+|\bALERTS\b", without_strings))
    assert metrics
    assert metrics <= known.keys(), metrics - known.keys()
    allowed = set().union(ADDED, *(known[name] for name in metrics))
    matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", without_strings))
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|on|group_left|group_right|without) \(([^)]*)\)", without_strings)
        for label in labels.split(",")
        if label.strip()
    }
    assert matched | grouped <= allowed, (matched | grouped) - allowed


# Alerts


def test_every_alert_says_what_it_means_and_where_the_way_out_is_written() -> None:
    for name, rule in RULES.items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (page, anchor in INCIDENTS) == (RUNBOOKS, True), name


def test_every_incident_has_an_alert() -> None:
    assert {rule["annotations"]["runbook_url"].partition("#")[2] for rule in RULES.values()} == INCIDENTS


def test_what_an_alert_mentions_is_left_by_its_query() -> None:
    """A label in a text that the query has summed away would be empty."""
    for name, rule in RULES.items():
        mentioned = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        groups = [set(re.split(r",\s*", labels)) for labels in re.findall(r"\bby \(([^)]*)\)", rule["expr"])]
        assert all(any(label in group for group in groups) or not groups for label in mentioned), name


def test_every_alert_is_tested() -> None:
    tests = (PROMETHEUS / "alerts.test.yaml").read_text()
    assert all(re.search(rf"\b{name}\b", tests) for name in RULES)


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not here"
)


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yaml"),
        ("test", "rules", "alerts.test.yaml"),
        ("check", "config", "prometheus.yaml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    """`test rules` plays recorded numbers and compares who is woken."""
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The dashboard


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_has_a_unit_and_asks_the_chosen_source() -> None:
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] == "state-timeline" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_every_documented_metric_is_looked_at_somewhere() -> None:
    """Sums and counts come with their buckets."""
    shown = " ".join(queries().values())
    missing = {name for name in documented() if name not in shown and not name.endswith(("_sum", "_count"))}
    assert not missing
