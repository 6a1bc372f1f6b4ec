"""Telemetry: the process that exports spans. It reads them from stdin, a line each, until its gateway closes the pipe.

Run as `python -m gateway.telemetry.span_exporter VERSION LEVEL`. It is a process of its own because to encode and send
spans costs more than the calls that they are of, and in a thread holds up the event loop for Python's lock. The OTEL_*
variables say where spans go. May depend on values and opentelemetry-sdk.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import Attributes

from gateway.telemetry.otel import BadTelemetrySettings, exporters, resource
from gateway.telemetry.process_log import log_to_stderr
from gateway.telemetry.spans import FinishedSpan, from_line

_log = logging.getLogger(__name__)

_LAST_SECONDS: Final = 2.0  # for the last spans, once the gateway has closed the pipe
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


class _AsTold(IdGenerator, Sampler):
    """Gives the SDK's next span the ids and the trace state that the gateway has already sent to others."""

    span: FinishedSpan

    def generate_span_id(self) -> int:
        return self.span.span_id

    def generate_trace_id(self) -> int:
        return self.span.trace_id

    def is_trace_id_random(self) -> bool:
        return True

    def should_sample(  # noqa: PLR0917  # the SDK's order
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, _state(self.span))

    def get_description(self) -> str:
        return "as the gateway has decided"


class SpanExporter:
    """Makes finished spans the SDK's own, with its limits, and exports them as the environment says."""

    def __init__(self, version: str) -> None:
        """version: the gateway's, for the resource.

        :raises BadTelemetrySettings: if an exporter that the environment names is not installed.
        """
        self._as_told = _AsTold()
        self._provider = TracerProvider(
            self._as_told, resource(version), shutdown_on_exit=False, id_generator=self._as_told
        )
        for exporter in exporters("traces", os.environ):
            # A person reads text on a terminal, and does not want to wait for a batch.
            is_console = isinstance(exporter, ConsoleSpanExporter)
            self._provider.add_span_processor((SimpleSpanProcessor if is_console else BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("gateway", version)

    def export(self, told: FinishedSpan) -> None:
        self._as_told.span = told
        parent = Context()  # None would mean the context of the running thread
        if told.parent_id:
            place = SpanContext(told.trace_id, told.parent_id, told.is_parent_remote, _SAMPLED, _state(told))
            parent = set_span_in_context(NonRecordingSpan(place), parent)
        links = [Link(SpanContext(each.trace_id, each.span_id, True, _SAMPLED), each.attributes) for each in told.links]
        span = self._tracer.start_span(
            told.name, parent, SpanKind[told.kind], told.attributes, links, start_time=told.start
        )
        if told.error is not None:
            span.set_status(Status(StatusCode.ERROR, told.error))
        span.end(told.end)

    def shutdown(self) -> None:
        """Send what is left. The SDK may take half a minute for it."""
        self._provider.shutdown()


def _state(span: FinishedSpan) -> TraceState:
    return TraceState.from_header([span.trace_state]) if span.trace_state else TraceState()


def main(version: str, level: str) -> None:
    # The gateway ends this process by closing the pipe, when its own last call has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_to_stderr(level)
    try:
        exporter = SpanExporter(version)
    except BadTelemetrySettings as error:
        _log.error("%s", error)
        sys.exit(1)
    for line in sys.stdin.buffer:
        exporter.export(from_line(line))
    ending = threading.Thread(target=exporter.shutdown, daemon=True)
    ending.start()
    ending.join(_LAST_SECONDS)
    if ending.is_alive():
        _log.warning("the last spans could not be sent within %g s and are given up", _LAST_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
