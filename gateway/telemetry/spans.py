"""Telemetry: a finished span as a value, and as the line of JSON that goes to the process that exports it. Pure."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Link(NamedTuple):
    """A span of another trace that belongs to this one."""

    trace_id: int
    span_id: int
    attributes: dict[str, str | int]


class FinishedSpan(NamedTuple):
    """What OpenTelemetry knows of a span that has ended and is to be exported."""

    name: str
    kind: str  # the name of an opentelemetry.trace.SpanKind
    trace_id: int  # 128 bits
    span_id: int  # 64 bits
    parent_id: int  # 0: the trace begins here
    is_parent_remote: bool
    trace_state: str  # as the header `tracestate` has it
    start: int  # Unix time, nanoseconds
    end: int
    attributes: dict[str, str | int]
    links: list[Link]
    error: str | None  # why it failed; None: it did not


def to_line(span: FinishedSpan) -> str:
    """One line, without its end."""
    return json.dumps(span)


def from_line(line: str | bytes) -> FinishedSpan:
    """:raises ValueError, TypeError: if `to_line` has not made the line."""
    fields: list[Any] = json.loads(line)
    *first, links, error = fields
    return FinishedSpan._make([*first, [Link(*each) for each in links], error])
