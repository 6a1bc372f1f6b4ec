"""Telemetry: what the standard OTEL_* variables say, the same for traces and metrics. docs/metrics.md lists them.

May depend on opentelemetry-sdk. Any exporter that is installed can be named; "otlp" is the one that comes along.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Literal

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

Signal = Literal["traces", "metrics"]

_SERVICE = "inference-gateway"


class BadTelemetrySettings(Exception):
    """An OTEL_* variable asks for what is not there; the text names it and what would be right."""


def is_configured(signal: Signal, environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for a signal: an exporter is named, or an OTLP endpoint is given for it.

    The endpoint for all signals counts for traces alone. Metrics are at `/metrics` anyway, and many a receiver of
    traces takes no metrics, or has them from there already.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    own_endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return bool(own_endpoint or (signal == "traces" and environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")))


def exporters(signal: Signal, environ: Mapping[str, str]) -> list[Any]:
    """The exporters that the environment names. Any: their classes have nothing in common but `shutdown`.

    :raises BadTelemetrySettings: if one is not installed.
    """
    names = environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip() or "otlp"
    return [_exporter(signal, name.strip().lower(), environ) for name in names.split(",") if name.strip()]


def _exporter(signal: Signal, name: str, environ: Mapping[str, str]) -> Any:
    """Make an exporter by its registered name; "otlp" follows OTEL_EXPORTER_OTLP_PROTOCOL."""
    if name == "otlp":
        own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL")
        protocol = own or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or ""
        name = "otlp_proto_grpc" if protocol.strip() == "grpc" else "otlp_proto_http"
    group = f"opentelemetry_{signal}_exporter"
    for found in entry_points(group=group, name=name):
        return found.load()()
    installed = sorted(entry.name for entry in entry_points(group=group))
    raise BadTelemetrySettings(
        f"OTEL_{signal.upper()}_EXPORTER or OTEL_EXPORTER_OTLP_PROTOCOL asks for the {signal} exporter '{name}', which "
        f"is not installed; installed are {', '.join(installed)} (OTLP: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf)"
    )


def resource(version: str) -> Resource:
    """Who tells this; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win. The host's name is the pod's in Kubernetes:
    without it the numbers of several pods would be taken for one's."""
    ours = {"service.name": _SERVICE, "service.version": version, "service.instance.id": socket.gethostname()}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})
