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
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, exposition
from prometheus_client.process_collector import ProcessCollector

from gateway.forwarding.metadata import REPLAYED
from gateway.hooks import (
    BreakerChanged,
    CallHistory,
    CallStarted,
    ConfigChanged,
    ConnectionFull,
    EndpointChanged,
    EndpointEjected,
    Listener,
    QuotasNow,
    RetryRefused,
    ShadowNow,
    UsageNow,
    VerdictNow,
    Watched,
)
from gateway.process.garbage import no_collections
from gateway.telemetry.families import Families
from gateway.telemetry.series import OTHER, REPLAYED_LABEL, BoundedLabel, Series
from gateway.telemetry.shared_values import SharedDirectory, SharedValues, keep_values_in
from gateway.telemetry.worker_notes import Notes, note

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


class Metrics(Listener):
    """The listener that counts. There is one per process: prometheus_client keeps its storage per process."""

    def __init__(self, settings: MetricsSettings) -> None:
        """:raises RuntimeError: if this process already shares another directory or worker name."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series for nothing here
        if settings.shared:
            keep_values_in(settings.shared)
            note(settings.shared)
        registry = CollectorRegistry()
        self._families = Families(registry)
        self._families.build.labels(settings.version, platform.python_version()).set(1)
        self._families.in_flight.labels(OTHER).set(0)  # an idle gateway shows 0 in flight, and not no series
        for result in ("accepted", "refused"):  # `increase` misses a first increment that does not start at 0
            self._families.reloads.labels(result)
        self._models = BoundedLabel(settings.max_models)
        self._endpoints = BoundedLabel(settings.max_endpoints)
        self._ejectable = BoundedLabel(settings.max_models)  # Tritons' models that an endpoint was ejected for
        self._ejected: set[tuple[str, str, str]] = set()  # labels
        self._tried: set[tuple[str, str, str]] = set()  # likewise
        self._series: dict[tuple[str, str], Series] = {}
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

    def _of(self, event: CallStarted) -> Series:
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
                series = self._series[model, event.method] = Series(
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
