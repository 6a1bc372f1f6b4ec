"""Telemetry: OpenTelemetry traces of calls, pipeline steps and attempts.

May depend on values and opentelemetry-sdk. Configured by the standard OTEL_* variables and by nothing else. Which calls
are recorded is decided here; what ended goes to a process that exports it (`span_pipe`). An unsampled call costs about
a microsecond, and nothing of it is sent upstream. docs/metrics.md has the attributes.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, ParentBasedTraceIdRatio, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanKind, get_current_span
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
from gateway.telemetry.otel import check_exporters
from gateway.telemetry.span_pipe import SpanPipe
from gateway.telemetry.spans import FinishedSpan, Link
from gateway.telemetry.w3c import is_unsampled
from gateway.types import EXPERIMENT, ROLLOUT, Metadata
from gateway.v2.names import SERVICE_NAME

_log = logging.getLogger(__name__)

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
_W3C: Final = TraceContextTextMapPropagator()
_NO_PARENT: Final = Context()  # None would mean the context of the running task
_ATTEMPT: Final = f"{SERVICE_NAME}/ModelInfer"  # the name of its span
_TEXT_LIMIT: Final = 500  # most characters of an error text in a span's status
_DEFAULT_RATIO: Final = 0.01  # of calls that bring no trace, unless a sampler is named


class Traces(NoListener):
    """The listener that traces. Entering it starts the process that exports, and leaving it sends the last spans.

    Do not make one unless traces are configured (`otel.is_configured`); one that has not been entered hears nothing.
    """

    def __init__(
        self, environ: Mapping[str, str], version: str = "", dropped: Callable[[], None] = lambda: None
    ) -> None:
        """
        environ: the process's own environment; opentelemetry-sdk reads more of it by itself.
        version: the gateway's, for the resource.
        dropped: is called for each span that could not be exported in time.
        """
        self.traces = True
        self._environ = environ
        self._pipe = SpanPipe(environ, version, dropped)
        self._is_open = False
        # The specification says that these samplers never record what a remote caller does not.
        named = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
        self._follows_caller = not named or named.startswith("parentbased_")
        self._sampler = _sampler(named, environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
        ratio = _maybe_ratio(named, environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
        self._bound = ratio.bound if ratio else 0  # a trace is recorded if its id is below
        self._rate = ratio.rate if ratio else 1.0  # part of the traces that begin here; 1: the sampler is asked

    async def __aenter__(self) -> Traces:
        """:raises BadTelemetrySettings: if an exporter that the environment names is not installed."""
        check_exporters("traces", self._environ)
        await self._pipe.__aenter__()
        self._is_open = True
        _log.info("traces are exported; sampler: %s", self._sampler.get_description())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._is_open = False
        await self._pipe.aclose()

    def call_started(self, event: CallStarted) -> CallObserver | None:
        if not self._is_open:
            return None
        traceparent = event.facts.metadata.get("traceparent")
        if traceparent and self._follows_caller and is_unsampled(traceparent):
            return None
        if not traceparent and self._rate < 1.0:
            if random.random() >= self._rate:  # noqa: S311  # no secret, as the SDK's
                return None
            trace_id = random.getrandbits(64) << 64 | random.randrange(self._bound)  # noqa: S311
            return _Call(self._pipe, event, trace_id, 0, "")
        context = _W3C.extract(event.facts.metadata, _NO_PARENT) if traceparent else _NO_PARENT
        parent = get_current_span(context).get_span_context()
        trace_id = parent.trace_id or random.getrandbits(128) or 1
        sampled = self._sampler.should_sample(context, trace_id, _name(event.method), SpanKind.SERVER)
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        state = sampled.trace_state.to_header() if sampled.trace_state else ""
        return _Call(self._pipe, event, trace_id, parent.span_id, state)


def _sampler(named: str, argument: str) -> Sampler:
    """The one that the environment names, read by the SDK; without a name a part of what the caller does not decide."""
    if named:
        return TracerProvider(resource=Resource.get_empty(), shutdown_on_exit=False).sampler
    return ParentBasedTraceIdRatio(_ratio_of(argument, _DEFAULT_RATIO))


def _ratio_of(argument: str, otherwise: float) -> float:
    try:
        ratio = float(argument)
    except ValueError:
        return otherwise
    return ratio if 0.0 <= ratio <= 1.0 else otherwise


def _maybe_ratio(named: str, argument: str) -> TraceIdRatioBased | None:
    """The sampling ratio of traces that begin here; None if the sampler has to decide."""
    if not named:
        return TraceIdRatioBased(_ratio_of(argument, _DEFAULT_RATIO))
    if named not in ("traceidratio", "parentbased_traceidratio"):
        return None
    try:
        return TraceIdRatioBased(float(argument))
    except ValueError:
        return None  # the SDK logs the fault, and records all traces


def _name(method: str) -> str:
    service = _SERVICES.get(method)
    return f"{service}/{method}" if service else method


def _drawn_span_id() -> int:
    return random.getrandbits(64) or 1  # no secret, and 0 means none


class _Open:
    """A span within a call's, which has not ended."""

    def __init__(self, kind: SpanKind, name: str, start: int, attributes: dict[str, str | int]) -> None:
        """start: Unix time, nanoseconds."""
        self.kind = kind
        self.name = name
        self.span_id = _drawn_span_id()
        self.start = start
        self.attributes = attributes
        self.links: list[Link] = []


class _Call(TracedCall):
    """Observes one call that is recorded."""

    def __init__(self, pipe: SpanPipe, event: CallStarted, trace_id: int, parent_id: int, trace_state: str) -> None:
        """parent_id: the caller's span; 0 if the trace begins here. trace_state: as the header `tracestate` has it."""
        self._pipe = pipe
        self._clock_offset = time.time_ns() - time.monotonic_ns()  # ns from monotonic to Unix time, for all its spans
        self._name = _name(event.method)
        self._start = self._unix_ns(event.at)
        self._trace_id = trace_id
        self._span_id = _drawn_span_id()
        self._parent_id = parent_id
        self._trace_state = trace_state
        self._attempt: _Open | None = None
        self._meaning: Meaning | None = None  # of the last attempt that ended
        self._attributes: dict[str, str | int] = {"rpc.system": "grpc"}
        service = _SERVICES.get(event.method)
        if service:
            self._attributes["rpc.service"] = service
            self._attributes["rpc.method"] = event.method
        self._attributes["gateway.model"] = event.model[:_TEXT_LIMIT]
        self._attributes["client.address"] = event.peer
        if event.request_id:
            self._attributes["gateway.request_id"] = event.request_id[:_TEXT_LIMIT]
        caller = event.facts.metadata.get(CALLER)
        if caller is not None:
            self._attributes["enduser.id"] = caller
        self.traceparent = self._traceparent(self._span_id)

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        if event.number == 1 and event.planned.startswith((EXPERIMENT, ROLLOUT)):
            # The arm is what the unit was assigned, also where another variant has to stand in for it.
            kind, _, name = event.planned.partition(":")
            self._attributes[f"gateway.{kind}"] = name
            self._attributes["gateway.arm"] = event.instead_of or event.variant
        attributes: dict[str, str | int] = {
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
        }
        self._attempt = _Open(SpanKind.CLIENT, _ATTEMPT, self._unix_ns(event.at), attributes)
        # Triton traces every request with a parent, whatever the flag says, so only sampled requests get one.
        place = ("traceparent", self._traceparent(self._attempt.span_id))
        return (place, ("tracestate", self._trace_state)) if self._trace_state else (place,)

    def attempt_merged(self, event: AttemptMerged) -> None:
        """Of several calls in a batch, one attempt is the parent of what the server records; the others link to it."""
        attempt = self._attempt
        if attempt is None:
            return
        attempt.attributes["gateway.batch.requests"] = event.requests
        if self._traceparent(attempt.span_id) != event.carrier:
            carrier = get_current_span(_W3C.extract({"traceparent": event.carrier}, _NO_PARENT)).get_span_context()
            attempt.links.append(Link(carrier.trace_id, carrier.span_id, {"gateway.link": "batch"}))

    def attempt_ended(self, event: AttemptEnded) -> None:
        self._meaning = event.meaning
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.attributes["rpc.grpc.status_code"] = int(event.code)
        if event.meaning:
            attempt.attributes["gateway.meaning"] = event.meaning.value
        self._send_child(attempt, event.at, None if event.code is Code.OK else event.text)

    def step_ended(self, event: StepEnded) -> None:
        attributes: dict[str, str | int] = {"gateway.step": event.step, "gateway.rows": event.rows}
        step = _Open(SpanKind.INTERNAL, f"step {event.step}", self._unix_ns(event.started), attributes)
        self._send_child(step, event.at, event.error or None)

    def ended(self, event: CallEnded) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt:  # the call ended before its attempt
            self._send_child(attempt, event.at, None)
        attributes = self._attributes
        attributes["rpc.grpc.status_code"] = int(event.code)
        if event.served:
            attributes["gateway.variant"] = event.served.variant
            attributes["gateway.model_version"] = event.served.model_version
            attributes["gateway.endpoint"] = event.served.endpoint
            attributes["gateway.attempts"] = event.served.attempts
            if event.served.fallback_from:
                attributes["gateway.fallback.from"] = event.served.fallback_from
                attributes["gateway.fallback.reason"] = event.served.fallback_reason
            if event.served.reused:
                attributes["gateway.cache"] = event.served.reused
        has_failed = is_server_fault(event.code, self._meaning) and not event.callers_fault
        self._pipe.send(
            FinishedSpan(
                self._name,
                SpanKind.SERVER.name,
                self._trace_id,
                self._span_id,
                self._parent_id,
                True,
                self._trace_state,
                self._start,
                self._unix_ns(event.at),
                attributes,
                [],
                event.text[:_TEXT_LIMIT] if has_failed else None,
            )
        )

    def _send_child(self, span: _Open, at: float, error: str | None) -> None:
        """at: its end, monotonic, seconds. error: why it failed; None if it did not."""
        self._pipe.send(
            FinishedSpan(
                span.name,
                span.kind.name,
                self._trace_id,
                span.span_id,
                self._span_id,
                False,
                self._trace_state,
                span.start,
                self._unix_ns(at),
                span.attributes,
                span.links,
                None if error is None else error[:_TEXT_LIMIT],
            )
        )

    def _traceparent(self, span_id: int) -> str:
        """W3C Trace Context Level 2, section 3.2; all spans here are sampled."""
        return f"00-{self._trace_id:032x}-{span_id:016x}-01"

    def _unix_ns(self, at: float) -> int:
        return self._clock_offset + int(at * 1e9)
