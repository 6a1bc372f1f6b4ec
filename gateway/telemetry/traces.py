"""Telemetry: OpenTelemetry traces of calls, pipeline steps and attempts.

May depend on values and opentelemetry-sdk. Configured by the standard OTEL_* variables and by nothing else; what an
unsampled call costs here is a few microseconds, and nothing of it is sent upstream. docs/metrics.md has the attributes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from types import TracebackType

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.access.door import CALLER
from gateway.hooks import (
    AttemptEnded,
    AttemptMerged,
    AttemptStarted,
    CallEnded,
    CallObserver,
    CallStarted,
    NoListener,
    StepEnded,
)
from gateway.status import Code, Meaning, is_server_fault
from gateway.telemetry.compose import TracedCall
from gateway.telemetry.ending import finish
from gateway.telemetry.otel import exporters, resource
from gateway.telemetry.w3c import is_unsampled
from gateway.types import EXPERIMENT, ROLLOUT, Metadata
from gateway.v2.names import SERVICE_NAME

_SERVICES = {
    "ModelInfer": SERVICE_NAME,
    "ModelStreamInfer": SERVICE_NAME,
    "Classify": "gateway.v1.ClassificationService",
    "StreamClassify": "gateway.v1.ClassificationService",
    "Predict": "gateway.v1.PredictionService",
    "StreamPredict": "gateway.v1.PredictionService",
    "Read": "gateway.v1.ReadingService",
    "Rank": "gateway.v1.RankingService",
    "Translate": "gateway.v1.TextService",
    "TranslateStream": "gateway.v1.TextService",
}
_W3C = TraceContextTextMapPropagator()
_NO_PARENT = Context()  # None would mean the context of the running task
_LAST_SECONDS = 2.5  # for the last spans at the end
_TEXT_LIMIT = 500  # most characters of an error text in a span's status


class Traces(NoListener):
    """The listener that traces. Entering it starts the exporter's thread, and leaving it sends the last spans.

    Do not make one unless traces are configured (`otel.is_configured`); one that has not been entered hears nothing.
    """

    def __init__(self, environ: Mapping[str, str], version: str = "") -> None:
        """
        environ: the process's own environment; opentelemetry-sdk reads more of it by itself.
        version: the gateway's, for the resource.
        """
        self.traces = True
        self._environ = environ
        self._version = version
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        # The specification says that these samplers never record what a remote caller does not.
        sampler = environ.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
        self._follows_caller = sampler.strip().lower().startswith("parentbased_")
        ratio = _maybe_ratio(sampler, environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
        self._bound = ratio.bound if ratio else 0  # a trace is recorded if its id is below
        self._rate = ratio.rate if ratio else 1.0  # part of the traces that begin here; 1: the SDK decides
        self._ids = _DrawnIds()

    async def __aenter__(self) -> Traces:
        """:raises BadTelemetrySettings: if an exporter that the environment names is not installed."""
        named = exporters("traces", self._environ)
        self._provider = TracerProvider(
            resource=resource(self._version), id_generator=self._ids, shutdown_on_exit=False
        )
        for exporter in named:
            # A person reads text on a terminal, and does not want to wait for a batch.
            is_console = isinstance(exporter, ConsoleSpanExporter)
            self._provider.add_span_processor((SimpleSpanProcessor if is_console else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("gateway", self._version)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        provider, self._provider, self._tracer = self._provider, None, None
        if provider:
            await finish(provider.shutdown, _LAST_SECONDS, "the last spans")  # its own timeout is 30 s

    def call_started(self, event: CallStarted) -> CallObserver | None:
        if self._tracer is None:
            return None
        traceparent = event.facts.metadata.get("traceparent")
        if traceparent and self._follows_caller and is_unsampled(traceparent):
            return None
        if not traceparent and self._rate < 1.0:
            if random.random() >= self._rate:  # noqa: S311  # no secret, as the SDK's
                return None
            self._ids.draw(self._bound)
        context = _W3C.extract(event.facts.metadata, _NO_PARENT) if traceparent else _NO_PARENT
        clock_offset = time.time_ns() - time.monotonic_ns()
        service = _SERVICES.get(event.method)
        span = self._tracer.start_span(
            f"{service}/{event.method}" if service else event.method,
            context,
            SpanKind.SERVER,
            start_time=clock_offset + int(event.at * 1e9),
        )
        if not span.is_recording():
            return None
        return _Call(self._tracer, span, service, event, clock_offset)


class _DrawnIds(RandomIdGenerator):
    """Draws a trace id before there is a span: a span that the SDK does not record would cost 10 µs."""

    def __init__(self) -> None:
        self._drawn: int | None = None

    def draw(self, bound: int) -> None:
        """Draw the id of the next trace: one that the ratio's sampler records."""
        self._drawn = random.getrandbits(64) << 64 | random.randrange(bound)  # noqa: S311

    def generate_trace_id(self) -> int:
        drawn, self._drawn = self._drawn, None
        return super().generate_trace_id() if drawn is None else drawn


def _maybe_ratio(sampler: str, argument: str) -> TraceIdRatioBased | None:
    """The sampling ratio of traces that begin here; None if the SDK has to decide."""
    if sampler.strip().lower() not in ("traceidratio", "parentbased_traceidratio"):
        return None
    try:
        return TraceIdRatioBased(float(argument))
    except ValueError:
        return None  # the SDK logs the fault, and records all traces


class _Call(TracedCall):
    """Observes one call that is recorded."""

    def __init__(self, tracer: Tracer, span: Span, service: str | None, event: CallStarted, clock_offset: int) -> None:
        self._tracer = tracer
        self._span = span
        self._within = set_span_in_context(span, _NO_PARENT)
        self._clock_offset = clock_offset  # ns from monotonic to Unix time, for all spans of the call
        self._attempt: Span | None = None
        self._meaning: Meaning | None = None  # of the last attempt that ended
        self._rpc: dict[str, str] = {"rpc.system": "grpc"}
        if service:
            self._rpc |= {"rpc.service": service, "rpc.method": event.method}
        span.set_attributes({**self._rpc, "gateway.model": event.model[:_TEXT_LIMIT], "client.address": event.peer})
        if event.request_id:
            span.set_attribute("gateway.request_id", event.request_id[:_TEXT_LIMIT])
        caller = event.facts.metadata.get(CALLER)
        if caller is not None:
            span.set_attribute("enduser.id", caller)
        self.traceparent = _context_of(span).get("traceparent", "")

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        if event.number == 1 and event.planned.startswith((EXPERIMENT, ROLLOUT)):
            # The arm is what the unit was assigned, also where another variant has to stand in for it.
            kind, _, name = event.planned.partition(":")
            self._span.set_attributes({f"gateway.{kind}": name, "gateway.arm": event.instead_of or event.variant})
        self._attempt = self._tracer.start_span(
            f"{SERVICE_NAME}/ModelInfer",
            self._within,
            SpanKind.CLIENT,
            {
                "rpc.system": "grpc",
                "rpc.service": SERVICE_NAME,
                "rpc.method": "ModelInfer",
                "server.address": event.endpoint,
                "gateway.model": event.model,
                "gateway.variant": event.variant,
                "gateway.upstream": event.upstream,
                "gateway.endpoint": event.endpoint,
                "gateway.attempt": event.number,
                "gateway.why": event.why,
            },
            start_time=self._unix_ns(event.at),
        )
        # Triton traces every request with a parent, whatever the flag says, so only sampled requests get one.
        if not self._attempt.get_span_context().trace_flags.sampled:
            return ()
        return tuple(_context_of(self._attempt).items())

    def attempt_merged(self, event: AttemptMerged) -> None:
        """Of several calls in a batch, one attempt is the parent of what the server records; the others link to it."""
        span = self._attempt
        if span is None:
            return
        span.set_attribute("gateway.batch.requests", event.requests)
        if _context_of(span).get("traceparent") != event.carrier:
            carrier = get_current_span(_W3C.extract({"traceparent": event.carrier}, _NO_PARENT)).get_span_context()
            span.add_link(carrier, {"gateway.link": "batch"})

    def attempt_ended(self, event: AttemptEnded) -> None:
        self._meaning = event.meaning
        span, self._attempt = self._attempt, None
        if span is None:
            return
        span.set_attribute("rpc.grpc.status_code", int(event.code))
        if event.meaning:
            span.set_attribute("gateway.meaning", event.meaning.value)
        if event.code is not Code.OK:
            span.set_status(Status(StatusCode.ERROR, event.text[:_TEXT_LIMIT]))
        span.end(self._unix_ns(event.at))

    def step_ended(self, event: StepEnded) -> None:
        span = self._tracer.start_span(
            f"step {event.step}",
            self._within,
            SpanKind.INTERNAL,
            {"gateway.step": event.step, "gateway.rows": event.rows},
            start_time=self._unix_ns(event.started),
        )
        if event.error:
            span.set_status(Status(StatusCode.ERROR, event.error[:_TEXT_LIMIT]))
        span.end(self._unix_ns(event.at))

    def ended(self, event: CallEnded) -> None:
        span, attempt, self._attempt = self._span, self._attempt, None
        if attempt:  # the call ended before its attempt
            attempt.end(self._unix_ns(event.at))
        span.set_attribute("rpc.grpc.status_code", int(event.code))
        if event.served:
            span.set_attributes(
                {
                    "gateway.variant": event.served.variant,
                    "gateway.model_version": event.served.model_version,
                    "gateway.endpoint": event.served.endpoint,
                    "gateway.attempts": event.served.attempts,
                }
            )
            if event.served.fallback_from:
                span.set_attribute("gateway.fallback.from", event.served.fallback_from)
                span.set_attribute("gateway.fallback.reason", event.served.fallback_reason)
            if event.served.reused:
                span.set_attribute("gateway.cache", event.served.reused)
        if is_server_fault(event.code, self._meaning) and not event.callers_fault:
            span.set_status(Status(StatusCode.ERROR, event.text[:_TEXT_LIMIT]))
        span.end(self._unix_ns(event.at))

    def _unix_ns(self, at: float) -> int:
        return self._clock_offset + int(at * 1e9)


def _context_of(span: Span) -> dict[str, str]:
    """The context of `traceparent`, and of `tracestate` if there is one."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, _NO_PARENT))
    return carrier
