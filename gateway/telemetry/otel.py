"""Telemetry: the settings in OTEL_* variables, the same for traces and metrics. docs/metrics.md lists them.

May depend on opentelemetry-sdk. Any exporter that is installed can be named; "otlp" is the one that comes along.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from gateway.errors import Misused

Signal = Literal["traces", "metrics"]

_SERVICE = "inference-gateway"


class BadTelemetrySettings(Misused):
    """An OTEL_* variable asks for what is not installed; the text names the variable and what would be right."""


def is_configured(signal: Signal, environ: Mapping[str, str]) -> bool:
    """Does the environment ask for this signal, by an exporter or an OTLP endpoint for it?

    The endpoint for all signals counts for traces alone: metrics are at `/metrics` anyway, and many receivers of traces
    take no metrics, or read them there.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    own_endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    return bool(own_endpoint or (signal == "traces" and environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")))


def exporters(signal: Signal, environ: Mapping[str, str]) -> list[Any]:
    """The exporters that the environment names. Any: their classes share nothing but `shutdown`.

    :raises BadTelemetrySettings: if an exporter is not installed.
    """
    return [found.load()() for found in check_exporters(signal, environ)]


def check_exporters(signal: Signal, environ: Mapping[str, str]) -> list[EntryPoint]:
    """Where the exporters are that the environment names.

    :raises BadTelemetrySettings: if an exporter is not installed.
    """
    names = environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip() or "otlp"
    return [_exporter(signal, name.strip().lower(), environ) for name in names.split(",") if name.strip()]


def _exporter(signal: Signal, name: str, environ: Mapping[str, str]) -> EntryPoint:
    """Find an exporter by its registered name; "otlp" follows OTEL_EXPORTER_OTLP_PROTOCOL."""
    if name == "otlp":
        own = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL")
        protocol = own or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or ""
        name = "otlp_proto_grpc" if protocol.strip() == "grpc" else "otlp_proto_http"
    group = f"opentelemetry_{signal}_exporter"
    for found in entry_points(group=group, name=name):
        return found
    installed = sorted(entry.name for entry in entry_points(group=group))
    raise BadTelemetrySettings(
        f"OTEL_{signal.upper()}_EXPORTER or OTEL_EXPORTER_OTLP_PROTOCOL asks for the {signal} exporter '{name}', which "
        f"is not installed; installed are {', '.join(installed)} (OTLP: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf)"
    )


def resource(version: str) -> Resource:
    """What identifies this process; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win. The host's name (in Kubernetes
    the pod's) tells the numbers of several pods apart."""
    ours = {"service.name": _SERVICE, "service.version": version, "service.instance.id": socket.gethostname()}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})
