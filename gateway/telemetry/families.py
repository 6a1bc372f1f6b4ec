"""Telemetry: the metric families by name, labels and meaning, as they are declared to prometheus_client.

May depend on values and prometheus_client. Knows nothing of who counts.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from gateway.access.principal import REFUSALS
from gateway.telemetry.worker_notes import CONFIG_INFO, CONFIG_INFO_HELP
from gateway.transport.tls import REASONS

ADDRESS: Final = "address"
"""Label of an endpoint's address. The Prometheus operator sets `endpoint` itself, which would replace ours."""

# 1-2-5 steps: a quantile read from the buckets is wrong by a factor of 2.5 at most. A tiny model answers in half a
# millisecond, and nobody waits interactively beyond 30 s.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# The gateway's own share of a call is tens of microseconds when all is well.
OVERHEAD_SECONDS: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


class Families:
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
                "Calls that may go to another endpoint of their variant now; of the worker and caller with the fewest.",
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
