"""What Prometheus is answered after calls, alone and with several workers."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from gateway.hooks import (
    AnswersNow,
    ArmGuardrailNow,
    BanditNow,
    BreakerChanged,
    CallStarted,
    ConfigChanged,
    ConnectionFull,
    EndpointChanged,
    EndpointEjected,
    ExperimentNow,
    GateNow,
    GuardrailNow,
    HedgesNow,
    MemoryNow,
    ParityNow,
    PipelinesNow,
    QuotasNow,
    RetryRefused,
    RolloutNow,
    ShadowNow,
    SharedMemoryNow,
    SharedNow,
    StepNow,
    StoreNow,
    UsageNow,
    VerdictNow,
    Watched,
)
from gateway.status import Code, Meaning
from gateway.telemetry.metrics import Metrics, MetricsSettings, Scrape
from gateway.telemetry.shared_values import SharedDirectory, prepare_directory, worker_ended

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
ROOT = Path(__file__).parents[2]


class Scraped:
    """The samples of one scrape, asked for by name and labels."""

    def __init__(self, scrape: Scrape) -> None:
        body, self.content_type = scrape.render("")
        self.families = list(parse_prometheus(body.decode()))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name, **labels):
        """The sum over samples that have these labels; None if there is none."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found) if found else None

    def labels(self, name, label):
        return {s.labels[label] for s in self.samples if s.name == name}


@pytest.fixture
def metrics():
    return Metrics(MetricsSettings(version="1.2.3"))


@pytest.mark.parametrize(
    ("attempts", "code", "where"),
    [
        ([(Code.UNAVAILABLE, Meaning.OVERLOADED)], Code.RESOURCE_EXHAUSTED, {"upstream": 1}),
        ([(Code.UNAVAILABLE, Meaning.OVERLOADED)] * 2, Code.RESOURCE_EXHAUSTED, {"upstream": 2}),
        ([(Code.UNAVAILABLE, Meaning.OVERLOADED), (Code.OK, None)], Code.OK, {"upstream": 1}),
        ([], Code.RESOURCE_EXHAUSTED, {"gateway": 1}),
        ([(Code.OK, None)], Code.RESOURCE_EXHAUSTED, {"gateway": 1}),
        ([(Code.RESOURCE_EXHAUSTED, Meaning.SERVER)], Code.RESOURCE_EXHAUSTED, {}),
    ],
    ids=["an upstream's", "two of them", "one, then an answer", "before a step", "after a call", "answer too large"],
)
def test_full_queues_are_counted_where_they_are(attempts, code, where, metrics, call, attempt):
    made = [attempt(code=code, meaning=meaning) for code, meaning in attempts]
    call(attempts=made, code=code).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    name = "gateway_queue_full_total"
    counted = {place: scraped(name, model="photos", where=place) for place in scraped.labels(name, "where")}
    assert counted == where


def test_calls_are_counted_by_model_variant_method_and_code(metrics, call, attempt):
    down = attempt(code=Code.UNAVAILABLE, meaning=Meaning.UNREACHABLE)
    for _ in range(3):
        call().report_to(metrics)
    call(method="Classify").report_to(metrics)
    call(attempts=[down], code=Code.UNAVAILABLE).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    name = "gateway_requests_total"
    assert scraped(name, model="photos", variant="onnx", method="ModelInfer", code="OK") == 3
    assert scraped(name, method="Classify", code="OK") == 1
    assert scraped(name, variant="onnx", code="UNAVAILABLE") == 1
    assert scraped("gateway_request_duration_seconds_count", outcome="ok") == 4
    assert scraped("gateway_request_duration_seconds_count", outcome="error") == 1
    assert scraped("gateway_request_bytes_total", model="photos") == 5_000
    assert scraped("gateway_response_bytes_total", model="photos") == 200


def test_the_time_of_a_call_is_told_apart_into_upstream_steps_and_gateway(metrics, call, attempt):
    steps = [("decode", 0.020, ""), ("resize", 0.010, "")]
    attempts = [attempt(seconds=0.300), attempt(seconds=0.100)]
    call(steps=steps, attempts=attempts, overhead=0.007, waited=0.5).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    assert scraped("gateway_request_duration_seconds_sum") == pytest.approx(0.937)
    assert scraped("gateway_upstream_duration_seconds_sum", variant="onnx", upstream="cpu") == pytest.approx(0.4)
    assert scraped("gateway_step_duration_seconds_sum", step="decode") == pytest.approx(0.02)
    assert scraped("gateway_overhead_duration_seconds_sum", model="photos") == pytest.approx(0.007)


def test_the_series_of_a_model_that_is_forgotten_end_and_another_gets_its_label(call, fallen_back):
    metrics = Metrics(MetricsSettings(max_models=2))
    forgotten: list[str] = []
    metrics.watch(
        Watched(lambda: PipelinesNow((), 0, 0, {}), forgotten=lambda: [forgotten.pop() for _ in forgotten[:]])
    )
    for model in ("gone", "stays", "late", "late"):
        call(model=model, attempts=fallen_back).report_to(metrics)
    metrics.retry_refused(RetryRefused("gone"))
    scraped = Scraped(metrics.scrape)
    assert scraped.labels("gateway_requests_total", "model") == {"gone", "stays", "other"}
    assert scraped("gateway_requests_total", model="other") == 2

    forgotten.append("gone")
    assert "gone" not in {sample.labels.get("model") for sample in Scraped(metrics.scrape).samples}
    metrics.retry_refused(RetryRefused("gone"))
    call(model="gone", known=False).report_to(metrics)  # it is nobody's name now
    call(model="new", attempts=fallen_back).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    assert scraped("gateway_fallbacks_total", model="new") == 1
    assert scraped("gateway_requests_total", model="stays") == 1
    assert scraped("gateway_requests_total", model="other") == 3


def test_a_failed_step_is_counted(metrics, call):
    call(steps=[("decode", 0.001, "not an image")], attempts=[], code=Code.INVALID_ARGUMENT).report_to(metrics)
    assert Scraped(metrics.scrape)("gateway_step_failures_total", model="photos", step="decode") == 1


def test_a_fallback_is_counted_with_both_attempts(metrics, call, fallen_back):
    call(attempts=fallen_back).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    names = {"model": "photos", "from_variant": "tensorrt", "variant": "onnx"}
    assert scraped("gateway_fallbacks_total", **names, reason="unreachable") == 1
    assert scraped("gateway_attempts_total", address="gpu-0:8001", meaning="unreachable") == 1
    assert scraped("gateway_attempts_total", address="cpu-0:8001", meaning="ok") == 1
    assert scraped("gateway_requests_total", variant="onnx", code="OK") == 1


def test_a_variant_known_to_be_unavailable_counts_as_a_fallback_of_every_call(metrics, call, attempt):
    for _ in range(3):
        call(attempts=[attempt("onnx", why="fallback", instead_of="tensorrt")]).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    assert scraped("gateway_fallbacks_total", model="photos", from_variant="tensorrt", variant="onnx") == 3


def test_a_certificate_has_its_expiry_as_long_as_the_config_names_it(metrics):
    name = "gateway_certificate_expiry_timestamp_seconds"
    metrics.config_changed(ConfigChanged("g.yaml", "d1", True, (), 1.0, {"server.tls.cert": 2e9}))
    assert Scraped(metrics.scrape)(name, key="server.tls.cert") == 2e9
    metrics.config_changed(ConfigChanged("g.yaml", "d2", True, (), 2.0))
    assert Scraped(metrics.scrape)(name) is None


def test_a_retry_on_the_same_variant_is_no_fallback(metrics, call, attempt):
    call(attempts=[attempt(code=Code.UNAVAILABLE, meaning=Meaning.DRAINING), attempt(why="retry")]).report_to(metrics)
    assert Scraped(metrics.scrape)("gateway_fallbacks_total") is None


def test_calls_under_way_are_in_flight_until_they_end(metrics, call):
    metrics.call_started(CallStarted("ModelInfer", "photos", True, "", "", 0.0))
    call().report_to(metrics)
    assert Scraped(metrics.scrape)("gateway_requests_in_flight", model="photos") == 1


def test_names_that_callers_invent_share_one_label(metrics, call):
    for number in range(500):
        call(model=f"invented-{number}", known=False, attempts=[], code=Code.NOT_FOUND).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    assert scraped.labels("gateway_requests_total", "model") == {"other"}
    assert scraped("gateway_requests_total", model="other", variant="", code="NOT_FOUND") == 500


def test_names_that_callers_invent_make_no_series_by_way_of_their_variants(metrics, call, attempt):
    """A transparent gateway asks Triton for any name, under a variant that is named after it."""
    for number in range(50):
        down = attempt(f"invented-{number}", code=Code.UNAVAILABLE, meaning=Meaning.UNREACHABLE)
        up = attempt(f"other-{number}", why="fallback", instead_of=f"invented-{number}")
        call(model=f"invented-{number}", known=False, attempts=[down, up]).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    for name in ("gateway_requests_total", "gateway_attempts_total", "gateway_fallbacks_total"):
        assert scraped.labels(name, "variant") == {"other"}
    assert scraped("gateway_attempts_total", model="other") == 100


def test_labels_stay_bounded_when_a_cluster_is_larger_than_the_limit(call, attempt):
    metrics = Metrics(MetricsSettings(max_models=2, max_endpoints=3))
    for number in range(5):
        call(model=f"m{number}", attempts=[attempt(endpoint=f"e{number}")]).report_to(metrics)
    scraped = Scraped(metrics.scrape)
    assert scraped.labels("gateway_requests_total", "model") == {"m0", "m1", "other"}
    assert scraped.labels("gateway_attempts_total", "address") == {"e0", "e1", "e2", "other"}


def test_an_endpoint_is_up_until_it_is_not(metrics):
    for ready in (True, False):
        metrics.endpoint_changed(EndpointChanged("cpu", "cpu-0:8001", ready, (), "probe", 1.0))
        up = Scraped(metrics.scrape)("gateway_endpoint_up", upstream="cpu", address="cpu-0:8001")
        assert up == int(ready)


def test_an_endpoint_that_has_left_is_no_series_until_it_comes_back(metrics):
    up = EndpointChanged("cpu", "10.0.0.1:8001", True, (), "probe", 1.0)
    metrics.endpoint_changed(up)
    metrics.endpoint_changed(EndpointChanged("cpu", "10.0.0.1:8001", False, (), "left", 2.0, gone=True))
    assert Scraped(metrics.scrape)("gateway_endpoint_up", address="10.0.0.1:8001") is None
    metrics.endpoint_changed(up)
    assert Scraped(metrics.scrape)("gateway_endpoint_up", address="10.0.0.1:8001") == 1


def test_an_upstream_of_the_config_has_a_number_of_usable_endpoints_also_before_its_name_is_found(metrics):
    name = "gateway_upstream_usable_endpoints"

    def config(*upstreams: str) -> ConfigChanged:
        return ConfigChanged("g.yaml", "d1", True, (), 1.0, upstreams=upstreams)

    def endpoint(address: str, ready: bool, gone: bool = False) -> EndpointChanged:
        return EndpointChanged("cpu", address, ready, (), "", 1.0, gone)

    metrics.endpoint_changed(endpoint("cpu-0:8001", True))
    metrics.config_changed(config("cpu", "gpu"))
    scraped = Scraped(metrics.scrape)
    assert (scraped(name, upstream="cpu"), scraped(name, upstream="gpu")) == (1, 0)
    for event, usable in (
        (endpoint("cpu-1:8001", True), 2),
        (endpoint("cpu-1:8001", True), 2),
        (endpoint("cpu-0:8001", False), 1),
        (endpoint("cpu-1:8001", False, gone=True), 0),
    ):
        metrics.endpoint_changed(event)
        assert Scraped(metrics.scrape)(name, upstream="cpu") == usable
    metrics.config_changed(config("gpu"))
    assert Scraped(metrics.scrape).labels(name, "upstream") == {"gpu"}


def test_what_is_judged_by_being_there_is_there_before_anything_has_happened(metrics):
    """An autoscaler takes no series for no answer, and `increase` does not see the step from nothing to 1."""
    scraped = Scraped(metrics.scrape)
    assert scraped("gateway_requests_in_flight") == 0
    assert scraped("gateway_config_reloads_total", result="refused") == 0
    assert scraped("gateway_config_reloads_total", result="accepted") == 0
    assert scraped.labels("gateway_connections_refused_total", "reason") == {
        *("max_connections", "descriptors", "memory", "admin")
    }


# What a scraper sets: Prometheus itself, its operator for ServiceMonitors and PodMonitors, and what people add to
# tell clusters and replicas apart.
SCRAPERS_OWN = {
    "job", "instance", "namespace", "pod", "container", "endpoint", "service", "node", "cluster", "region", "zone",
    "environment", "env", "replica", "prometheus", "prometheus_replica", "monitor", "host", "target", "app", "release",
    "pool",  # deploy/kubernetes/components/monitoring
}  # fmt: skip


def test_no_label_is_one_that_scrapers_set_themselves() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    labels = re.findall(r"^\| `gateway_\w+` \| \w+ \|([^|]*)\|", page, re.MULTILINE)
    assert not set(re.findall(r"`(\w+)`", " ".join(labels))) & SCRAPERS_OWN


def test_a_connection_on_which_calls_wait_is_counted(metrics):
    for _ in range(3):
        metrics.connection_full(ConnectionFull("ipv4:10.0.0.1:5000", 1000))
    assert Scraped(metrics.scrape)("gateway_connections_full_total") == 3


def test_a_refused_config_is_counted_and_changes_nothing_else(metrics):
    metrics.config_changed(ConfigChanged("gateway.yaml", "d1", True, (), 1.0))
    taken_over_at = Scraped(metrics.scrape)("gateway_config_last_success_timestamp_seconds")
    metrics.config_changed(ConfigChanged("gateway.yaml", "d2", False, ("line 3: …",), 2.0))
    scraped = Scraped(metrics.scrape)
    assert scraped("gateway_config_reloads_total", result="accepted") == 1
    assert scraped("gateway_config_reloads_total", result="refused") == 1
    assert scraped("gateway_config_last_success_timestamp_seconds") == taken_over_at > 1.7e9
    assert scraped("gateway_config_info", digest="d1") == 1
    assert scraped("gateway_config_info", digest="d2") is None


def test_the_config_in_force_is_the_only_one_with_a_series(metrics):
    for digest in ("d1", "d2", "d2", "d1"):
        metrics.config_changed(ConfigChanged("gateway.yaml", digest, True, (), 1.0))
        scraped = Scraped(metrics.scrape)
        assert scraped.labels("gateway_config_info", "digest") == {digest}
        assert scraped("gateway_config_info") == 1


def test_openmetrics_is_answered_to_those_who_accept_it(metrics, call):
    call().report_to(metrics)
    body, content_type = metrics.scrape.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert "gateway_requests" in {family.name for family in parse_openmetrics(body.decode())}
    assert Scraped(metrics.scrape).content_type.startswith("text/plain")


def _tried_out(metrics: Metrics) -> int:
    (family,) = [
        each for each in Scraped(metrics.scrape).families if each.name == "gateway_endpoint_probe_inference_ok"
    ]
    return len(family.samples)


def test_a_model_that_is_no_longer_tried_out_has_no_metric_of_it(metrics: Metrics) -> None:
    metrics.endpoint_changed(EndpointChanged("u", "a:1", True, (), "", 1.0, tried={"net": False, "other": True}))
    assert _tried_out(metrics) == 2
    metrics.endpoint_changed(EndpointChanged("u", "a:1", True, (), "", 1.0, tried={"net": True}))
    assert _tried_out(metrics) == 1
    metrics.endpoint_changed(EndpointChanged("u", "a:1", False, (), "left", 1.0, gone=True))
    assert _tried_out(metrics) == 0


BANDIT = BanditNow(2, 20, {"a": 0.25, "b": 0.75}, 1.0, 0.5, True, 0.5, "", "", ())
VERDICT = VerdictNow(5.0, True, [("b", "bought", "better")], [ArmGuardrailNow("b", "latency", "breached", -0.1, "")])
ROLLOUT = RolloutNow(
    "int8", "m", "fp32", "int8", "running", 2, 3, 0.1, 1.0, "the step has passed", (),
    [GuardrailNow("errors", "held", 0.04, "")], 500, True, 0.5, 7.0, "", (),
)  # fmt: skip


def test_the_documentation_names_every_metric_and_label_and_no_other(metrics, call, attempt, fallen_back):
    """The names are a promise, so the page that makes it is compared with the scrape."""
    call(steps=[("decode", 0.001, "bad")], attempts=fallen_back).report_to(metrics)
    call(attempts=[], code=Code.RESOURCE_EXHAUSTED).report_to(metrics)
    call(attempts=[], code=Code.INTERNAL).report_to(metrics)
    call(attempts=[attempt(called="scores")]).report_to(metrics)
    metrics.endpoint_changed(EndpointChanged("cpu", "cpu-0:8001", True, (), "probe", 1.0, tried={"net": True}))
    metrics.retry_refused(RetryRefused("m"))
    metrics.breaker_changed(BreakerChanged("m", "gpu", "tripped", 1.0))
    metrics.endpoint_ejected(EndpointEjected("cpu", "cpu-0:8001", "net", 5.0, 1.0))
    metrics.config_changed(ConfigChanged("gateway.yaml", "d1", True, (), 1.0, {"server.tls.cert": 2e9}, ("cpu",)))
    pipelines = PipelinesNow([StepNow("m", "decode", 1, 2, 3.0)], 4, 5, {"m": 1})
    results, dropped = {"agreed": 1, "differed": 1}, {"full": 1}
    metrics.watch(
        Watched(
            lambda: pipelines,
            lambda: [GateNow("cpu", "m", 4, 3, 2, 0.1, 40.0, {"late": 1})],
            lambda: [SharedNow("m", 3, 2, 1, 1, 9, 10, 0)],
            lambda: [HedgesNow("m", 3, 2, 1, 0.5)],
            lambda: [ShadowNow("m", "int8", results, dropped, 1, 1, 0.1, {}, ParityNow(True, 1, 1, 1, 1.0))],
            lambda: [AnswersNow("m", "int8", {"fine": 3, "not_finite": 1})],
            lambda: MemoryNow(1, "large messages", 9, 10, 2),
            lambda: {"m": 7},
            lambda: [ExperimentNow("spring", "m", 3, {"a": 2, "b": 1}, 0.5, False, "", BANDIT, VERDICT)],
            lambda: StoreNow("sqlite", False, "", 1, 2, {"full": 1}, 3, 1, 1),
            lambda: [ROLLOUT],
            lambda: QuotasNow([("acme", "m", "requests", 2)], is_store_away=True),
            lambda: [UsageNow("acme", "m", 3, 4, 5, 6, 0.7)],
            lambda: [SharedMemoryNow("cpu", "cpu-0:8001", "in use", 4, 3, 2, 1, {"placed": 1}, {"registered": 1})],
        )
    )
    real = set()
    for family in Scraped(metrics.scrape).families:
        if family.name.startswith("gateway_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            real.add((name, family.type, frozenset(family.samples[0].labels) - {"le"}))
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(gateway_\w+)` \| (\w+) \|([^|]*)\|", page, re.MULTILINE)
    assert {(name, kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows} == real


WORKER = """
import os, sys
from pathlib import Path
import prometheus_client  # on purpose before the directory is known
from gateway.hooks import CallEnded, CallStarted, ConfigChanged, EndpointChanged
from gateway.status import Code
from gateway.telemetry.compose import compose
from gateway.telemetry.metrics import Metrics, MetricsSettings
from gateway.telemetry.shared_values import SharedDirectory

directory, name, calls, is_up, *digests = sys.argv[1:]
metrics = Metrics(MetricsSettings("1.2.3", SharedDirectory(Path(directory), name)))
for digest in digests or ["d1"]:
    metrics.config_changed(ConfigChanged("gateway.yaml", digest, True, (), 1.0, upstreams=("cpu", "gpu")))
metrics.endpoint_changed(EndpointChanged("cpu", "cpu-0:8001", is_up == "up", (), "probe", 1.0))
metrics.endpoint_changed(EndpointChanged("cpu", "cpu-9:8001", True, (), "probe", 1.0))
metrics.endpoint_changed(EndpointChanged("cpu", "cpu-9:8001", False, (), "left", 1.0, gone=True))
for _ in range(int(calls)):
    observer = compose([metrics]).call_started(CallStarted("ModelInfer", "photos", True, "", "", 1.0))
    observer.ended(CallEnded(Code.OK, "", None, 10, 1, 1.004))
metrics.call_started(CallStarted("ModelInfer", "photos", True, "", "", 1.0))  # one stays in flight
metrics.flush()
print("ready", flush=True)
sys.stdin.read()
"""


class Workers:
    """Real worker processes that share a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, calls: int, endpoint: str = "up", digests: Sequence[str] = ()) -> None:
        given = (str(self.directory), name, str(calls), endpoint, *digests)
        command = [sys.executable, "-W", "error", "-c", WORKER, *given]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.running[name] = process
        assert process.stdout.readline() == "ready\n"

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.communicate()


@pytest.fixture
def workers(tmp_path):
    directory = tmp_path / "metrics"
    prepare_directory(directory)
    workers = Workers(directory)
    yield workers
    for name in list(workers.running):
        workers.kill(name)


def test_workers_add_up_to_one_scrape(workers):
    workers.start("0", calls=30)
    workers.start("1", calls=12, endpoint="down")
    scraped = Scraped(Scrape.of_directory(workers.directory))
    assert scraped("gateway_requests_total", model="photos", code="OK") == 42
    assert scraped("gateway_request_duration_seconds_count", model="photos") == 42
    assert scraped("gateway_request_duration_seconds_bucket", le="0.005") == 42
    assert scraped("gateway_request_duration_seconds_bucket", le="0.002") == 0
    assert scraped("gateway_request_duration_seconds_sum") == pytest.approx(42 * 0.004)
    assert scraped("gateway_requests_in_flight") == 2
    assert scraped("gateway_endpoint_up", address="cpu-0:8001") == 0  # one of them finds it down
    assert scraped.labels("gateway_endpoint_up", "address") == {"cpu-0:8001"}  # the other has left
    assert scraped("gateway_upstream_usable_endpoints", upstream="cpu") == 0  # as one of them finds
    assert scraped.labels("gateway_upstream_usable_endpoints", "upstream") == {"cpu", "gpu"}
    assert scraped("gateway_config_info", digest="d1") == 2
    assert scraped("gateway_build_info", version="1.2.3") == 1
    assert list(parse_openmetrics(Scrape.of_directory(workers.directory).render(OPENMETRICS)[0].decode()))


def test_shared_files_have_their_space_before_it_is_written_to(workers):
    """Writing to a hole on a full disk through a memory map would kill the worker."""
    workers.start("0", calls=3)
    sizes = [(file.stat().st_blocks * 512, file.stat().st_size) for file in workers.directory.glob("*.db")]
    assert sizes
    assert all(on_disk >= size > 0 for on_disk, size in sizes)


def test_a_dead_worker_leaves_its_counts_and_takes_its_gauges(workers):
    workers.start("0", calls=30)
    workers.start("1", calls=12, endpoint="down")
    workers.kill("1")
    worker_ended(SharedDirectory(workers.directory, "1"))
    scraped = Scraped(Scrape.of_directory(workers.directory))
    assert scraped("gateway_requests_total") == 42
    assert scraped("gateway_requests_in_flight") == 1
    assert scraped("gateway_endpoint_up") == 1
    assert scraped("gateway_config_info", digest="d1") == 1


def test_a_replacement_goes_on_counting_in_the_files_of_the_dead(workers):
    counts, files = [], []
    for _ in range(3):
        workers.start("0", calls=10)
        counts.append(Scraped(Scrape.of_directory(workers.directory))("gateway_requests_total"))
        files.append(sorted(file.name for file in workers.directory.iterdir()))
        workers.kill("0")
        worker_ended(SharedDirectory(workers.directory, "0"))
    assert counts == [10, 20, 30]
    assert files[0] == files[1] == files[2]


def test_a_replacement_does_not_inherit_calls_in_flight(workers):
    """Even when nobody said that its predecessor had ended."""
    for _ in range(3):
        workers.start("0", calls=1)
        assert Scraped(Scrape.of_directory(workers.directory))("gateway_requests_in_flight") == 1
        workers.kill("0")


def test_a_process_has_one_name(workers):
    """Its storage is bound to the first directory, so a second would silently count in the wrong place."""
    script = WORKER.replace(
        'print("ready", flush=True)', "Metrics(MetricsSettings(shared=SharedDirectory(Path(directory), 'x')))"
    )
    command = [sys.executable, "-c", script, str(workers.directory), "0", "1", "up"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert "already kept" in done.stderr


def test_a_new_run_starts_from_nothing(workers):
    workers.start("0", calls=10)
    workers.kill("0")
    prepare_directory(workers.directory)
    assert Scraped(Scrape.of_directory(workers.directory)).samples == []


def test_workers_between_two_configs_show_both_and_no_past_one(workers):
    workers.start("0", calls=1, digests=("d1", "d2", "d3"))
    workers.start("1", calls=1, digests=("d1", "d2"))
    workers.start("2", calls=1, digests=("d2", "d3"))
    scraped = Scraped(Scrape.of_directory(workers.directory))
    assert scraped.labels("gateway_config_info", "digest") == {"d2", "d3"}
    assert scraped("gateway_config_info", digest="d3") == 2


def test_each_worker_s_process_has_numbers_until_it_ends(workers):
    workers.start("0", calls=1)
    workers.start("1", calls=1)
    numbers = ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds")
    scraped = Scraped(Scrape.of_directory(workers.directory))
    for number in numbers:
        assert scraped.labels(number, "worker") == {"0", "1"}
        assert scraped(number, worker="1") > 0
    workers.kill("1")  # and nobody has said so yet
    assert Scraped(Scrape.of_directory(workers.directory)).labels(numbers[0], "worker") == {"0"}
    worker_ended(SharedDirectory(workers.directory, "1"))
    scraped = Scraped(Scrape.of_directory(workers.directory))
    assert (scraped.labels(numbers[0], "worker"), scraped("gateway_config_info")) == ({"0"}, 1)


def test_a_scrape_stops_nobody_to_look_for_garbage(call):
    """A collection holds every thread; a scrape of 85,000 lines caused one of 0.3 s."""
    metrics = Metrics(MetricsSettings("1"))
    for number in range(300):
        call(model=f"m{number}").report_to(metrics)
    stops = []

    def collected(phase, told):
        stops.append(told["generation"])

    gc.collect()
    gc.callbacks.append(collected)
    try:
        body, _ = metrics.scrape.render("")
    finally:
        gc.callbacks.remove(collected)
    assert body.count(b"\n") > 10_000
    assert len(stops) <= 2  # one that was due, at its beginning or at its end: a start and a stop
    assert gc.isenabled()
