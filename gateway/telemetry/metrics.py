"""Telemetry: Prometheus metrics of the events of the core. docs/metrics.md describes all names, which stay stable.

May depend on values and prometheus_client. Label values are bounded whatever callers send. Worker processes of one pod
write into files of one directory and so add up to one scrape (prometheus_client's multiprocess mode).

Calls are counted in plain numbers (`tally`) and reach prometheus_client when it is read, or by `flush`: its own
counters take a lock for each of the ten or so numbers that a call changes, a fifth of a small call's whole cost.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, exposition
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.process_collector import ProcessCollector

from gateway.access.principal import REFUSALS
from gateway.forwarding.metadata import REPLAYED
from gateway.hooks import (
    AttemptEnded,
    AttemptStarted,
    BreakerChanged,
    CallHistory,
    CallStarted,
    ConfigChanged,
    ConnectionFull,
    EndpointChanged,
    EndpointEjected,
    QuotasNow,
    RetryRefused,
    ShadowNow,
    StepEnded,
    UsageNow,
    VerdictNow,
    Watched,
)
from gateway.process.garbage import no_collections
from gateway.status import OK, Code, Meaning, is_server_fault
from gateway.telemetry.shared_values import SharedDirectory, SharedValues, keep_values_in
from gateway.telemetry.tally import Count, Times
from gateway.telemetry.worker_notes import CONFIG_INFO, CONFIG_INFO_HELP, Notes, note
from gateway.transport.tls import REASONS

OTHER: Final = "other"
REPLAYED_LABEL: Final = "replayed"  # model label of requests that were captured and are sent again
"""Label of models that are not configured, and of all values beyond a limit."""

ADDRESS: Final = "address"
"""Label of an endpoint's address. The Prometheus operator sets `endpoint` itself, which would replace ours."""

# 1-2-5 steps: a quantile read from the buckets is wrong by a factor of 2.5 at most. A tiny model answers in half a
# millisecond, and nobody waits interactively beyond 30 s.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# The gateway's own share of a call is tens of microseconds when all is well.
OVERHEAD_SECONDS: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


_BREAKER: Final = {"admitting": 0, "probing": 1, "tripped": 2}


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """How the metrics of one process are kept."""

    version: str = ""  # the gateway's version, for gateway_build_info
    shared: SharedDirectory | None = None  # None: this process has no fellow workers
    max_models: int = 2_000  # most distinct model labels; a large Triton repository has hundreds of models
    max_endpoints: int = 1_000  # most distinct endpoint labels; pods get new addresses with every rollout


class Scrape:
    """What Prometheus reads, from one registry."""

    def __init__(
        self, registry: CollectorRegistry, is_shared: bool = False, flush: Callable[[], None] = lambda: None
    ) -> None:
        """flush: brings the registry up to date."""
        self._registry = registry
        self._is_shared = is_shared
        self._flush = flush

    @classmethod
    def of_directory(cls, path: Path) -> Scrape:
        """The sum over all workers that share the directory `path`; any process may ask."""
        registry = CollectorRegistry()
        registry.register(SharedValues(path))
        registry.register(Notes(path))
        return cls(registry, is_shared=True)

    def collect(self, names: Collection[str] = ()) -> Iterable[Metric]:
        """The current metric families. This takes milliseconds: call it in a thread.

        names: samples that are wanted; there may be others too. None given are all.
        """
        self._flush()
        if names and not self._is_shared:
            return self._registry.restricted_registry(names).collect()
        return self._registry.collect()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Body and content type for an Accept header. This takes milliseconds: call it in a thread."""
        self._flush()
        encode, content_type = exposition.choose_encoder(accept)
        with no_collections():  # ten thousand series make half a million objects, all freed soon
            return encode(self._registry), content_type


class Metrics:
    """The listener that counts. There is one per process: prometheus_client keeps its storage per process."""

    def __init__(self, settings: MetricsSettings) -> None:
        """:raises RuntimeError: if this process already shares another directory or worker name."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series for nothing here
        if settings.shared:
            keep_values_in(settings.shared)
            note(settings.shared)
        registry = CollectorRegistry()
        self._families = _Families(registry)
        self._families.build.labels(settings.version, platform.python_version()).set(1)
        self._families.in_flight.labels(OTHER).set(0)  # an idle gateway shows 0 in flight, and not no series
        for result in ("accepted", "refused"):  # `increase` misses a first increment that does not start at 0
            self._families.reloads.labels(result)
        for why in ("max_connections", "descriptors", "memory", "admin"):
            self._families.refused.labels(why)
        self._models = _Bounded(settings.max_models)
        self._endpoints = _Bounded(settings.max_endpoints)
        self._ejectable = _Bounded(settings.max_models)  # Tritons' models that an endpoint was ejected for
        self._ejected: set[tuple[str, str, str]] = set()  # labels
        self._tried: set[tuple[str, str, str]] = set()  # likewise
        self._series: dict[tuple[str, str], _Series] = {}
        self._flushing = threading.Lock()
        self._digest = ""  # of the config in force
        self._ready: dict[str, set[str]] = {}  # usable endpoints by upstream
        self._upstreams: set[str] = set()  # upstreams in the config
        self._certificates: set[str] = set()  # config keys of certificates
        self._watched: Watched | None = None
        self._counted: dict[tuple[str, ...], float] = {}  # what was told of these last, by name and labels
        self._gauged: dict[tuple[str, ...], float] = {}  # what was told of pipelines last, by name and labels
        self._shared = settings.shared
        if settings.shared:
            self.scrape = Scrape.of_directory(settings.shared.path)
        else:
            ProcessCollector(registry=registry)
            self.scrape = Scrape(registry, flush=self.flush)

    def flush(self) -> None:
        """Bring prometheus_client up to date, from any thread. Workers that share a directory do this often."""
        with self._flushing:
            for series in list(self._series.values()):
                if series.has_moved:
                    series.flush()
            if self._watched is not None:
                for model in self._watched.forgotten():
                    self._forget_model(model)
                self._tell_now(self._watched)
                self._tell_shadows(self._watched.shadows())
                for answers in self._watched.answers():
                    for result, count in answers.results.items():
                        self._tell_count(self._families.answers, count, answers.model, answers.variant, result)
                self._tell_experiments(self._watched)
                self._tell_quotas(self._watched.quotas(), self._watched.usage())

    def watch(self, watched: Watched) -> None:
        """Have these asked at each reading."""
        self._watched = watched

    def _tell_shadows(self, shadows: Sequence[ShadowNow]) -> None:
        families = self._families
        for shadow in shadows:
            names = shadow.model, shadow.variant
            for result, count in shadow.results.items():
                self._tell_count(families.shadows, count, *names, result)
            for reason, count in shadow.dropped.items():
                self._tell_count(families.shadows_dropped, count, *names, reason)
            if shadow.parity is not None:
                families.parity.labels(*names).set(shadow.parity.is_open)
            for whose, count in (("shadow", shadow.wrong), ("caller", shadow.wrong_here)):
                self._tell_count(families.not_finite, count, *names, whose)

    def _tell_experiments(self, watched: Watched) -> None:
        families = self._families
        for experiment in watched.experiments():
            self._tell_count(families.exposures, experiment.exposures, experiment.name)
        store = None if watched.store is None else watched.store()
        if store is None:
            return
        counts = (
            ("accepted", store.reports),
            ("refused", store.reports_refused),
            ("duplicate", store.duplicates),
        )
        for result, count in counts:
            self._tell_count(families.reports, count, result)
        for reason, count in store.dropped.items():
            self._tell_count(families.records_dropped, count, reason)

    def _tell_quotas(self, quotas: QuotasNow, usage: Sequence[UsageNow]) -> None:
        families = self._families
        for caller, model, reason, count in quotas.refused:
            self._tell_count(families.quota_refusals, count, caller, model, reason)
        for used in usage:
            names = used.caller, used.model
            self._tell_count(families.used_requests, used.requests, *names)
            self._tell_count(families.used_rows, used.rows, *names)
            self._tell_count(families.used_request_bytes, used.request_bytes, *names)
            self._tell_count(families.used_response_bytes, used.response_bytes, *names)
            self._tell_count(families.used_seconds, used.upstream_seconds, *names)

    def _tell_now(self, watched: Watched) -> None:
        now = watched.pipelines()
        told: dict[tuple[str, ...], float] = {("held",): now.memory_held, ("most",): now.memory_most}
        told["quota_store_away",] = int(watched.quotas().is_store_away)
        told |= {("retries_left", model): left for model, left in watched.retries_left().items()}
        for step in now.steps:
            told["running", step.pipeline, step.step] = step.running
            told["waiting", step.pipeline, step.step] = step.waiting
            told["oldest", step.pipeline, step.step] = step.oldest
        for model, faults in now.faults.items():
            told["faults", model] = faults
        for gate in watched.gates():
            told["limit", gate.upstream, gate.model] = gate.limit
            told["limited", gate.upstream, gate.model] = gate.in_flight
            told["limit_waiting", gate.upstream, gate.model] = gate.waiting
            told["limit_latency", gate.upstream, gate.model] = gate.latency
            for reason, count in gate.refused.items():
                self._tell_count(self._families.refusals, count, gate.upstream, gate.model, reason)
        for share in watched.shares():
            told["answers", share.model] = share.answers
            told["answer_bytes", share.model] = share.held
            told["answer_bytes_most", share.model] = share.most
            self._tell_count(self._families.evictions, share.evictions, share.model)
            for how, count in (("hit", share.hits), ("coalesced", share.coalesced), ("executed", share.executed)):
                self._tell_count(self._families.shared, count, share.model, how)
        for hedge in watched.hedges():
            told["hedge_after", hedge.model] = hedge.after
            for what, count in (("sent", hedge.sent), ("won", hedge.won), ("refused", hedge.refused)):
                self._tell_count(self._families.hedges, count, hedge.model, what)
        self._tell_shared_memory(watched, told)
        if watched.memory is not None:
            memory = watched.memory()
            told["memory_step",] = memory.step
            told["memory_used",] = memory.used
            told["memory_limit",] = memory.limit
            self._tell_count(self._families.memory_resets, memory.resets)
        told.update(_of_experiments(watched))
        told.update(_of_rollouts(watched))
        gauges = self._families.pipelines
        for key in [key for key, value in self._gauged.items() if value and key not in told]:
            told[key] = 0
        for key, value in told.items():
            if self._gauged.get(key) != value:
                gauge = gauges[key[0]]
                (gauge.labels(*key[1:]) if len(key) > 1 else gauge).set(value)
        self._gauged.update(told)

    def _tell_shared_memory(self, watched: Watched, told: dict[tuple[str, ...], float]) -> None:
        for shared in watched.shared_memory():
            where = shared.upstream, shared.address
            told["shared_bytes", where[0], where[1]] = shared.size
            told["shared_taken", where[0], where[1]] = shared.taken
            told["shared_slots", where[0], where[1]] = shared.slots
            told["shared_given_up", where[0], where[1]] = shared.given_up
            for what, count in shared.requests.items():
                self._tell_count(self._families.laid, count, *where, what)
            for what, count in shared.registrations.items():
                self._tell_count(self._families.regions, count, *where, what)

    def _tell_count(self, counter: Counter, count: float, *labels: str) -> None:
        """count: since whoever counts began, which a reload may make anew."""
        key = (counter._name, *labels)
        before = self._counted.get(key, 0)
        (counter.labels(*labels) if labels else counter).inc(count - before if count >= before else count)
        self._counted[key] = count

    def call_started(self, event: CallStarted) -> None:
        series = self._of(event)
        series.started += 1
        series.has_moved = True

    def call_ended(self, call: CallHistory) -> None:
        series = self._of(call.start)
        series.call_ended(call)
        series.has_moved = True

    def _of(self, event: CallStarted) -> _Series:
        """The label of a model: one for all unknown names, for names beyond the limit, and for replayed requests."""
        name = event.model if event.known else OTHER
        if REPLAYED in event.facts.metadata:
            name = REPLAYED_LABEL
        key = (name, event.method)
        series = self._series.get(key)
        if series is None:
            model = self._models(name) if event.known and name is not REPLAYED_LABEL else name
            series = self._series.get((model, event.method))
            if series is None:
                series = self._series[model, event.method] = _Series(
                    self._families, self._endpoints, model, event.method
                )
            self._series[key] = series
        return series

    def endpoint_changed(self, event: EndpointChanged) -> None:
        ready = self._ready.setdefault(event.upstream, set())
        if event.ready and not event.gone:
            ready.add(event.endpoint)
        else:
            ready.discard(event.endpoint)
        if event.upstream in self._upstreams:
            self._families.usable.labels(event.upstream).set(len(ready))
        labels = event.upstream, self._endpoints(event.endpoint)
        if not event.gone:
            self._families.endpoint_up.labels(*labels).set(int(event.ready))
        elif self._shared or labels[1] != OTHER:
            self._forget(self._families.endpoint_up, *labels)
        for model, is_well in event.tried.items():
            tried = (*labels, self._ejectable(model))
            self._families.probed.labels(*tried).set(int(is_well))
            self._tried.add(tried)
        known = {self._ejectable(model) for model in event.tried}
        for tried in [each for each in self._tried if each[:2] == labels and each[2] not in known]:
            self._forget(self._families.probed, *tried)
            self._tried.discard(tried)
        if event.gone:
            for ejected in [each for each in self._ejected if each[:2] == labels]:
                self._families.ejected.labels(*ejected).set(0)
                self._ejected.discard(ejected)

    def endpoint_ejected(self, event: EndpointEjected) -> None:
        labels = event.upstream, self._endpoints(event.endpoint), self._ejectable(event.model)
        self._families.ejected.labels(*labels).set(event.seconds)
        if event.seconds:
            self._families.ejections.labels(*labels).inc()
            self._ejected.add(labels)
        else:
            self._ejected.discard(labels)

    def breaker_changed(self, event: BreakerChanged) -> None:
        self._families.breaker.labels(self._models(event.model), event.variant).set(_BREAKER[event.state])

    def retry_refused(self, event: RetryRefused) -> None:
        self._families.retries_refused.labels(self._models.known(event.model)).inc()

    def config_changed(self, event: ConfigChanged) -> None:
        self._families.reloads.labels("accepted" if event.accepted else "refused").inc()
        if not event.accepted:
            return
        self._families.reloaded_at.set(time.time())
        self._tell_config(event.digest)
        for upstream in self._upstreams.difference(event.upstreams):
            self._forget(self._families.usable, upstream)
            self._ready.pop(upstream, None)
        self._upstreams = set(event.upstreams)
        for upstream in event.upstreams:  # shows 0 too: an alert must see an upstream whose name was never resolved
            self._families.usable.labels(upstream).set(len(self._ready.get(upstream, ())))
        for key in self._certificates - event.expiries.keys():
            self._forget(self._families.expiry, key)
        for key, at in event.expiries.items():
            self._families.expiry.labels(key).set(at)
        self._certificates = set(event.expiries)

    def _tell_config(self, digest: str) -> None:
        """Each config has a digest of its own, so that of the one before must not stay as a series."""
        if self._shared:
            note(self._shared, digest)
            return
        if self._digest and self._digest != digest:
            self._families.config.remove(self._digest)
        self._digest = digest
        self._families.config.labels(digest).set(1)

    def connection_full(self, event: ConnectionFull) -> None:
        self._families.connections_full.inc()

    def connection_refused(self, why: str) -> None:
        self._families.refused.labels(why).inc()

    def connection_turned_away(self, why: str) -> None:
        self._families.turned_away.labels(why).inc()

    def call_refused(self, why: str) -> None:
        self._families.calls_refused.labels(why).inc()

    def span_dropped(self) -> None:
        self._families.spans_dropped.inc()

    def _forget_model(self, model: str) -> None:
        """End its series, and give its label to another. Shared files can't: there they stay while the gateway runs."""
        for key in [key for key in list(self._series) if key[0] == model]:
            del self._series[key]
        if not self._shared:
            self._models.forget(model)
            self._families.end(model)

    def _forget(self, family: Gauge, *labels: str) -> None:
        if self._shared:
            family.labels(*labels).set(math.nan)  # shared files can't remove a series
        else:
            family.remove(*labels)


class _Families:
    """All metrics by name, labels and meaning. docs/metrics.md says more."""

    def __init__(self, registry: CollectorRegistry) -> None:  # noqa: PLR0915  (a table)
        self._registry = registry

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, labels, registry=registry)

        def seconds(name: str, help_text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, help_text, labels, registry=registry, buckets=buckets)

        self.requests = counter(
            "gateway_requests", "Calls and stream messages ended.", "model", "variant", "method", "code"
        )
        self.duration = seconds(
            "gateway_request_duration_seconds", "From arrival to end.", "model", "variant", "outcome"
        )
        self.overhead = seconds(
            "gateway_overhead_duration_seconds",
            "The part of a call that neither an upstream, nor a pipeline step, nor waiting for a place took.",
            "model",
            buckets=OVERHEAD_SECONDS,
        )
        self.upstream = seconds(
            "gateway_upstream_duration_seconds", "One attempt, from sending to its end.", "model", "variant", "upstream"
        )
        self.step = seconds("gateway_step_duration_seconds", "One pipeline step.", "model", "step")
        self.step_failures = counter("gateway_step_failures", "Pipeline steps that failed.", "model", "step")
        self.attempts = counter(
            "gateway_attempts",
            "Attempts ended, by what the answer meant.",
            *("model", "variant", "upstream", ADDRESS, "meaning"),
        )
        self.pipeline_attempts = counter(
            "gateway_pipeline_attempts",
            "Attempts that a pipeline's calls of another public model made, by what the answer meant.",
            *("model", "called", "variant", "meaning"),
        )
        self.fallbacks = counter(
            "gateway_fallbacks",
            "Times a variant was asked in place of one that failed the call or was known to be unavailable.",
            *("model", "from_variant", "variant", "reason"),
        )
        self.queue_full = counter(
            "gateway_queue_full",
            "Times a bounded queue had no room, at an upstream or in the gateway.",
            "model",
            "where",
        )
        self.server_faults = counter(
            "gateway_server_faults",
            "Calls and stream messages that failed and not by their callers' doing.",
            "model",
            "code",
        )
        self.connections_full = counter(
            "gateway_connections_full",
            "Times a connection had as many calls at once as it may, and its client waits.",
        )
        self.request_bytes = counter("gateway_request_bytes", "Message bytes received from callers.", "model")
        self.response_bytes = counter("gateway_response_bytes", "Message bytes sent to callers.", "model")
        self.refusals = counter(
            "gateway_limit_refusals",
            "Calls refused since a model's servers could not answer them (in time).",
            *("upstream", "upstream_model", "reason"),
        )
        self.quota_refusals = counter(
            "gateway_quota_refusals",
            "Calls and stream messages refused since a quota was used up: of a caller, of a model, or of both.",
            *("caller", "model", "reason"),
        )
        by_use = ("caller", "model")
        self.used_requests = counter("gateway_usage_requests", "Calls and stream messages that were answered.", *by_use)
        self.used_rows = counter("gateway_usage_rows", "Rows of these.", *by_use)
        self.used_request_bytes = counter("gateway_usage_request_bytes", "Message bytes of these.", *by_use)
        self.used_response_bytes = counter("gateway_usage_response_bytes", "Message bytes of their answers.", *by_use)
        self.used_seconds = counter(
            "gateway_usage_upstream_seconds", "Seconds that attempts at upstreams took for callers.", *by_use
        )
        self.shared = counter(
            "gateway_shared_requests",
            "Requests of models that share answers, by how they were answered.",
            *("model", "how"),
        )
        self.laid = counter(
            "gateway_shared_memory_requests",
            "Requests of at least 128 KiB to endpoints with shared memory, by what became of them: placed, or why not.",
            *("upstream", "address", "what"),
        )
        self.regions = counter(
            "gateway_shared_memory_registrations",
            "How regions of shared memory came and went.",
            *("upstream", "address", "what"),
        )
        self.hedges = counter("gateway_hedges", "Second attempts beside a slow one.", "model", "what")
        self.shadows = counter(
            "gateway_shadow_copies",
            "Copies of requests that a shadow got, by what came of them.",
            *("model", "variant", "result"),
        )
        self.shadows_dropped = counter(
            "gateway_shadow_dropped",
            "Copies that were not sent or compared, by reason.",
            *("model", "variant", "reason"),
        )
        self.parity = Gauge(
            "gateway_variant_parity",
            "1 if the variant has agreed with others so often that calls may fall back to it.",
            ["model", "variant"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.not_finite = counter(
            "gateway_not_finite_answers",
            "Compared answers with NaN or infinity, by who got them: the shadow's or the caller's.",
            *("model", "variant", "whose"),
        )
        self.answers = counter(
            "gateway_answers_checked",
            "Answers of models whose answers are looked at, by what was found.",
            *("model", "variant", "result"),
        )
        self.exposures = counter(
            "gateway_experiment_exposures", "Units that met an arm of an experiment, told to the store.", "experiment"
        )
        self.reports = counter(
            "gateway_experiment_reports", "Outcomes that were reported, by what came of them.", "result"
        )
        self.records_dropped = counter(
            "gateway_experiment_records_dropped", "Records of experiments that were not written, by reason.", "reason"
        )
        self.evictions = counter("gateway_cache_evictions", "Answers forgotten to make room for others.", "model")
        self.refused = counter(
            "gateway_connections_refused",
            "Callers' connections closed as they came, by what there were too many of.",
            "reason",
        )
        for reason in ("descriptors", "max_connections", "memory", "admin"):
            self.refused.labels(reason)  # 0 from the start, so that `increase` sees the first one
        self.spans_dropped = counter(
            "gateway_trace_spans_dropped", "Spans of traces that the process which exports them did not take in time."
        )
        self.turned_away = counter(
            "gateway_connections_turned_away",
            "Callers' connections that ended before a call, since TLS failed or the client speaks no HTTP/2.",
            "reason",
        )
        for reason in REASONS:
            self.turned_away.labels(reason)
        self.calls_refused = counter(
            "gateway_access_refused", "Calls that were not let in, by what was wrong with who made them.", "reason"
        )
        for reason in REFUSALS:
            self.calls_refused.labels(reason)
        self.memory_resets = counter("gateway_memory_resets", "Callers' connections closed because memory was scarce.")
        self.in_flight = Gauge(
            "gateway_requests_in_flight",
            "Calls and stream messages not yet ended.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.endpoint_up = Gauge(
            "gateway_endpoint_up",
            "1 if the endpoint is usable; 0 if any worker finds it is not.",
            ["upstream", ADDRESS],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.probed = Gauge(
            "gateway_endpoint_probe_inference_ok",
            "1 if the probe inferences of a model at an endpoint go well; 0 if any worker finds they do not.",
            ["upstream", ADDRESS, "model"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.ejected = Gauge(
            "gateway_endpoint_ejected_seconds",
            "For how long an endpoint is left alone, because it failed calls of a model that its peers answer.",
            ["upstream", ADDRESS, "model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.breaker = Gauge(
            "gateway_variant_breaker",
            "0 if a variant gets its calls, 1 if it gets some to prove itself, 2 if its fallback gets them all.",
            ["model", "variant"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.ejections = counter(
            "gateway_endpoint_ejections", "Times an endpoint was ejected for a model.", "upstream", ADDRESS, "model"
        )
        self.retries_refused = counter(
            "gateway_retries_refused", "Calls not sent again, because retries have used up their budget.", "model"
        )
        self.usable = Gauge(
            "gateway_upstream_usable_endpoints",
            "How many endpoints of an upstream of the config are usable; 0 also when its name was never found.",
            ["upstream"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.reloads = counter("gateway_config_reloads", "Config files taken over or refused.", "result")
        self.reloaded_at = Gauge(
            "gateway_config_last_success_timestamp_seconds",
            "When the config in force was taken over (Unix time; of the worker that is furthest behind).",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.config = Gauge(CONFIG_INFO, CONFIG_INFO_HELP, ["digest"], registry=registry)  # of one worker: see `Notes`
        self.expiry = Gauge(
            "gateway_certificate_expiry_timestamp_seconds",
            "Until when a certificate of the gateway is valid (Unix time), by the config key that names it.",
            ["key"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.pipelines = self._of_pipelines(registry)
        self.build = Gauge(
            "gateway_build_info",
            "Always 1; the labels say what runs.",
            ["version", "python"],
            registry=registry,
            multiprocess_mode="livemax",
        )

    def end(self, model: str) -> None:
        """Remove all series of a model. Not for shared files: the library can't remove a series there.

        The library has no public way to ask a registry for its families, nor a family for its labels and series.
        """
        for family in list(self._registry._collector_to_names):
            if isinstance(family, MetricWrapperBase) and "model" in family._labelnames:
                at = family._labelnames.index("model")
                for labels in [labels for labels in list(family._metrics) if labels[at] == model]:
                    family.remove(*labels)

    def _of_pipelines(self, registry: CollectorRegistry) -> dict[str, Gauge]:
        """Gauges of what `PipelinesNow`, `GateNow`, `SharedNow`, `HedgesNow`, `MemoryNow` and so on say."""
        by_step = ["model", "step"]
        at_endpoint = ["upstream", "address"]
        by_limit = ["upstream", "upstream_model"]

        def gauge(name: str, help_text: str, labels: list[str], mode: str) -> Gauge:
            return Gauge(name, help_text, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        return {
            "limit": gauge(
                "gateway_limit_calls", "How many calls may be in flight; 0 if it is not limited.", by_limit, "livesum"
            ),
            "limited": gauge("gateway_limit_in_flight", "How many of these are.", by_limit, "livesum"),
            "limit_waiting": gauge("gateway_limit_waiting", "Calls that wait for a place.", by_limit, "livesum"),
            "limit_latency": gauge(
                "gateway_limit_latency_seconds",
                "How long an answer takes, by which it is decided whether a call comes too late.",
                by_limit,
                "livemax",
            ),
            "quota_store_away": gauge(
                "gateway_quota_store_away",
                "1 if any worker finds that the store that gateways share quotas by does not answer.",
                [],
                "livemax",
            ),
            "retries_left": gauge(
                "gateway_retries_left",
                "Calls that may be sent to another endpoint of their variant now; of the worker that may the fewest.",
                ["model"],
                "livemin",
            ),
            "mismatched": gauge(
                "gateway_experiment_sample_ratio_mismatch",
                "1 if units do not come to an experiment's arms as planned.",
                ["experiment"],
                "livemax",
            ),
            "arm_share": gauge(
                "gateway_experiment_share",
                "The share of units of a bandit's latest epoch that get an arm.",
                ["experiment", "arm"],
                "livemostrecent",
            ),
            "epoch": gauge(
                "gateway_experiment_epoch", "How many epochs of a bandit have begun.", ["experiment"], "livemax"
            ),
            "epoch_overdue": gauge(
                "gateway_experiment_epoch_overdue_seconds",
                "For how long another epoch of a bandit has been due.",
                ["experiment"],
                "livemax",
            ),
            "verdict": gauge(
                "gateway_experiment_verdict",
                "1 for what is known of an arm beside the baseline, by the outcome that decides.",
                ["experiment", "arm", "outcome", "verdict"],
                "livemostrecent",
            ),
            "guardrail_state": gauge(
                "gateway_experiment_guardrail_state",
                "1 for the state that a guardrail of an arm is in.",
                ["experiment", "arm", "outcome", "state"],
                "livemostrecent",
            ),
            "guardrail_distance": gauge(
                "gateway_experiment_guardrail_distance",
                "What is left until a guardrail of an arm is breached, as its limit is stated.",
                ["experiment", "arm", "outcome"],
                "livemostrecent",
            ),
            "verdict_age": gauge(
                "gateway_experiment_verdict_age_seconds",
                "How long ago it was found what an experiment says so far; of the worker that is furthest behind.",
                ["experiment"],
                "livemax",
            ),
            "rollout_state": gauge(
                "gateway_rollout_state",
                "1 for the state that a rollout is in.",
                ["rollout", "model", "state"],
                "livemax",
            ),
            "rollout_step": gauge(
                "gateway_rollout_step", "The step that a rollout is in, from 1 on.", ["rollout"], "livemax"
            ),
            "rollout_share": gauge(
                "gateway_rollout_share", "The share of units that get the new variant.", ["rollout"], "livemax"
            ),
            "rollout_decides": gauge(
                "gateway_rollout_decides", "1 if this gateway decides about a rollout now.", ["rollout"], "livemax"
            ),
            "rollout_distance": gauge(
                "gateway_rollout_guardrail_distance",
                "What is left until a guardrail is breached, as its limit is stated; of the gateway that decides.",
                ["rollout", "guardrail"],
                "livemostrecent",
            ),
            "rollout_overdue": gauge(
                "gateway_rollout_overdue_seconds",
                "How long a rollout has been in its step beyond the soak time.",
                ["rollout"],
                "livemax",
            ),
            "rollout_age": gauge(
                "gateway_rollout_store_age_seconds",
                "How long ago a rollout's state was read from the store.",
                ["rollout"],
                "livemax",
            ),
            "store_away": gauge("gateway_store_away", "1 if the store of experiments can't be used.", [], "livemax"),
            "store_waiting": gauge("gateway_store_waiting", "Records that wait to be written there.", [], "livesum"),
            "hedge_after": gauge(
                "gateway_hedge_after_seconds",
                "How long a call may take before it is sent a second time; 0 if that is not known yet.",
                ["model"],
                "livemax",
            ),
            "shared_bytes": gauge(
                "gateway_shared_memory_bytes", "Memory that endpoints share with the gateway.", at_endpoint, "livesum"
            ),
            "shared_taken": gauge(
                "gateway_shared_memory_used_bytes", "How much of it has tensors in it.", at_endpoint, "livesum"
            ),
            "shared_slots": gauge(
                "gateway_shared_memory_slots", "Requests whose tensors are in it.", at_endpoint, "livesum"
            ),
            "shared_given_up": gauge(
                "gateway_shared_memory_given_up",
                "Those that nobody waits for any more, and that the endpoint still computes.",
                at_endpoint,
                "livesum",
            ),
            "answers": gauge("gateway_cache_answers", "Answers that are remembered.", ["model"], "livesum"),
            "answer_bytes": gauge("gateway_cache_bytes", "Memory that they take.", ["model"], "livesum"),
            "answer_bytes_most": gauge("gateway_cache_limit_bytes", "How much they may take.", ["model"], "livesum"),
            "running": gauge("gateway_step_threads", "Threads that run a pipeline's step now.", by_step, "livesum"),
            "waiting": gauge("gateway_step_queued", "Tasks of a step that wait for a thread.", by_step, "livesum"),
            "oldest": gauge(
                "gateway_step_oldest_seconds",
                "For how long the longest-running thread of a step has been at it.",
                by_step,
                "livemax",
            ),
            "faults": gauge(
                "gateway_pipeline_faults",
                "What is wrong between a pipeline's config and the models that it calls.",
                ["model"],
                "livemax",
            ),
            "held": gauge(
                "gateway_step_memory_bytes", "Memory that is taken for decoding pictures now.", [], "livesum"
            ),
            "most": gauge("gateway_step_memory_limit_bytes", "How much of it may be taken.", [], "livesum"),
            "memory_step": gauge(
                "gateway_memory_step",
                "What is done without as memory gets scarce: 0 nothing, 1 large messages and remembered answers, "
                "2 also new connections and the batch class, 3 also the connections that hold the most.",
                [],
                "livemax",
            ),
            "memory_used": gauge(
                "gateway_memory_bytes",
                "Memory in use: of the container, or of the largest process where nothing limits it.",
                [],
                "livemax",
            ),
            "memory_limit": gauge("gateway_memory_limit_bytes", "How much of it there is.", [], "livemax"),
        }


class _Bounded:
    """Passes on the first `limit` distinct values, and replaces all others by `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value

    def forget(self, value: str) -> None:
        self._seen.discard(value)

    def known(self, value: str) -> str:
        """Passes a value on if it has been before: callers may have invented it."""
        return value if value in self._seen else OTHER


def _of_experiments(watched: Watched) -> dict[tuple[str, ...], float]:
    told: dict[tuple[str, ...], float] = {}
    for experiment in watched.experiments():
        told["mismatched", experiment.name] = int(experiment.is_mismatched)
        if experiment.verdict is not None:
            told.update(_of_verdict(experiment.name, experiment.verdict))
        bandit = experiment.bandit
        if bandit is not None:
            told["epoch", experiment.name] = bandit.epoch
            told["epoch_overdue", experiment.name] = bandit.overdue
            for arm, share in bandit.shares.items():
                told["arm_share", experiment.name, arm] = share
    store = None if watched.store is None else watched.store()
    if store is not None:
        told["store_away",] = int(store.is_away)
        told["store_waiting",] = store.waiting
    return told


def _of_verdict(experiment: str, verdict: VerdictNow) -> dict[tuple[str, ...], float]:
    told: dict[tuple[str, ...], float] = {("verdict_age", experiment): verdict.age}
    for arm, outcome, word in verdict.judgements:
        told["verdict", experiment, arm, outcome, word] = 1
    for each in verdict.guardrails:
        told["guardrail_state", experiment, each.arm, each.outcome, each.state] = 1
        if math.isfinite(each.distance):
            told["guardrail_distance", experiment, each.arm, each.outcome] = each.distance
    return told


def _of_rollouts(watched: Watched) -> dict[tuple[str, ...], float]:
    told: dict[tuple[str, ...], float] = {}
    for rollout in watched.rollouts():
        name = rollout.name
        told["rollout_state", name, rollout.model, rollout.phase] = 1
        told["rollout_step", name] = rollout.step
        told["rollout_share", name] = rollout.share
        told["rollout_decides", name] = int(rollout.decides)
        told["rollout_overdue", name] = rollout.overdue
        told["rollout_age", name] = rollout.age
        for guardrail in rollout.guardrails:
            if math.isfinite(guardrail.distance):
                told["rollout_distance", name, guardrail.name] = guardrail.distance
    return told


class _Series:
    """All counts of one model and method."""

    def __init__(self, families: _Families, endpoints: _Bounded, model: str, method: str) -> None:
        self._families = families
        self._endpoints = endpoints
        self._model = model
        self._method = method
        self._is_other = model in (OTHER, REPLAYED_LABEL)  # then callers may have invented the names of variants too
        self.has_moved = False  # since the last flush
        self.started = self._ended = self._shown_in_flight = 0  # calls
        self._in_flight = families.in_flight.labels(model)
        self._overhead = Times(families.overhead.labels(model))
        self._request_bytes = Count(families.request_bytes.labels(model))
        self._response_bytes = Count(families.response_bytes.labels(model))
        self._ends: dict[tuple[str, Code], tuple[Count, Times]] = {}
        self._attempts: dict[tuple[str, str, str, Meaning | None], tuple[Count, Times]] = {}

    def call_ended(self, call: CallHistory) -> None:
        start, end, attempts, outcomes = call.start, call.end, call.attempts, call.outcomes
        self._ended += 1
        elsewhere = end.waited  # seconds spent in upstreams and steps, and waiting
        for attempt, outcome in zip(attempts, outcomes):  # noqa: B905  # the last one may have no outcome
            took = outcome.at - attempt.at
            elsewhere += took
            variant = attempt.variant if not self._is_other else OTHER
            where = (variant, attempt.upstream, attempt.endpoint, outcome.meaning)
            count, times = self._attempts.get(where) or self._attempt(*where)
            count.total += 1
            times.observe(took)
        if attempts and attempts[0].model != self._model and not self._is_other:
            self._called(attempts, outcomes)
        took = end.at - start.at
        variant = end.served.variant if end.served else attempts[-1].variant if attempts else ""
        if self._is_other:
            variant = OTHER if variant else ""
        count, times = self._ends.get((variant, end.code)) or self._end(variant, end.code)
        count.total += 1
        times.observe(took)
        if call.steps:
            elsewhere += self._steps(call.steps)
        self._overhead.observe(took - elsewhere if took > elsewhere else 0.0)
        self._request_bytes.total += end.request_bytes
        self._response_bytes.total += end.response_bytes
        if len(attempts) > 1 or end.code is not OK or (attempts and attempts[0].instead_of):
            self._unusual(call)

    def _unusual(self, call: CallHistory) -> None:
        """Count fallbacks, full queues, and failures by who is at fault."""
        for attempt in call.attempts:
            if attempt.instead_of:
                names = (OTHER, OTHER) if self._is_other else (attempt.instead_of, attempt.variant)
                self._families.fallbacks.labels(self._model, *names, attempt.reason).inc()
        for outcome in call.outcomes:
            if outcome.meaning is Meaning.OVERLOADED:
                self._families.queue_full.labels(self._model, "upstream").inc()
        meaning = call.outcomes[-1].meaning if call.outcomes else None
        failed = meaning is not None
        if is_server_fault(call.end.code, meaning) and not call.end.callers_fault:
            self._families.server_faults.labels(self._model, call.end.code.name).inc()
        if call.end.code is Code.RESOURCE_EXHAUSTED and not failed and not call.end.callers_fault:
            # No upstream reported it, and it is no quota.
            self._families.queue_full.labels(self._model, "gateway").inc()

    def _called(self, attempts: Sequence[AttemptStarted], outcomes: Sequence[AttemptEnded]) -> None:
        """Count a pipeline's attempts by the model that it called: its variants may have names of other models' too."""
        for attempt, outcome in zip(attempts, outcomes):  # noqa: B905  # the last one may have no outcome
            told = outcome.meaning.value if outcome.meaning else "ok"
            self._families.pipeline_attempts.labels(self._model, attempt.model, attempt.variant, told).inc()

    def _steps(self, steps: Iterable[StepEnded]) -> float:
        """Count the steps. Returns the seconds that they took."""
        seconds = 0.0
        for step in steps:
            took = step.at - step.started
            if took or not step.error:  # a failure between two steps takes no time: see `PipelineModel`
                seconds += took
                self._families.step.labels(self._model, step.step).observe(took)
            if step.error:
                self._families.step_failures.labels(self._model, step.step).inc()
        return seconds

    def _end(self, variant: str, code: Code) -> tuple[Count, Times]:
        """The counters of an end (variant and code), at its first use."""
        made = self._ends[variant, code] = (
            Count(self._families.requests.labels(self._model, variant, self._method, code.name)),
            Times(self._families.duration.labels(self._model, variant, "ok" if code is OK else "error")),
        )
        return made

    def _attempt(self, variant: str, upstream: str, endpoint: str, meaning: Meaning | None) -> tuple[Count, Times]:
        """The counters of an attempt, at its first use, or for an endpoint beyond the limit."""
        endpoint = self._endpoints(endpoint)  # pods get new addresses without end, so only some have labels
        key = (variant, upstream, endpoint, meaning)
        found = self._attempts.get(key)
        if found is None:
            told = meaning.value if meaning else "ok"
            found = self._attempts[key] = (
                Count(self._families.attempts.labels(self._model, variant, upstream, endpoint, told)),
                Times(self._families.upstream.labels(self._model, variant, upstream)),
            )
        return found

    def flush(self) -> None:
        """Give the counts since the last flush to prometheus_client."""
        self.has_moved = False  # first, since calls go on: their changes set it again
        ended = self._ended  # read before `started`, which is never smaller
        in_flight = self.started - ended
        self._in_flight.inc(in_flight - self._shown_in_flight)  # all methods of the model share the gauge
        self._shown_in_flight = in_flight
        for number in (self._request_bytes, self._response_bytes, self._overhead):
            number.flush()
        for count, times in (*self._ends.values(), *self._attempts.values()):
            count.flush()
            times.flush()
