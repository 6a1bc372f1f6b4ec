"""Telemetry: sends the numbers of `/metrics` by OTLP, at intervals. Only the OTEL_* variables configure it.

May depend on opentelemetry-sdk and on `metrics`. It counts nothing itself: it turns what the registry says into
OpenTelemetry's data model, so both ways tell the same. One process of a pod sends, for all of its workers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import Metric as Family
from prometheus_client.samples import Sample

from gateway.telemetry.ending import finish
from gateway.telemetry.otel import exporters, resource

_log = logging.getLogger(__name__)

_SECONDS = 60.0  # OTEL_METRIC_EXPORT_INTERVAL's default
_LAST_SECONDS = 1.5  # for the last export at the end; a collector that hangs must not hold up a drained process
_UNITS = {"seconds": "s", "bytes": "By"}  # UCUM units, by the last word of a metric's name
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class MetricsExport:
    """Sends between enter and exit, and once more at the end."""

    def __init__(self, collect: Callable[[], Iterable[Family]], environ: Mapping[str, str], version: str) -> None:
        """
        collect: reads the registry (`Scrape.collect`); it is called in a thread.
        environ: the process's own environment; opentelemetry-sdk reads more of it by itself.
        """
        self._collect = collect
        self._environ = environ
        self._version = version
        self._started = time.time_ns()
        self._fails = False

    async def __aenter__(self) -> MetricsExport:
        """:raises BadTelemetrySettings: if an exporter that the environment names is not installed."""
        self._exporters = exporters("metrics", self._environ)
        self._resource = resource(self._version)
        self._sending = asyncio.ensure_future(self._run(_interval(self._environ)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        await finish(self._send_the_last, _LAST_SECONDS, "the last metrics")

    async def _run(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(self._send, interval)

    def _send(self, seconds: float) -> None:
        """Read and send once. The first failure in a row is logged; the next export repeats the sums."""
        try:
            data = self._read()
            results = [each.export(data, timeout_millis=seconds * 1000) for each in self._exporters]
            failed = any(result is not MetricExportResult.SUCCESS for result in results)
        except Exception:  # exporters are other people's code, and none of their errors may end the gateway
            failed = True
            _log.debug("a metrics export failed", exc_info=True)
        if failed and not self._fails:
            _log.warning("metrics could not be exported; it is tried again at every interval")
        self._fails = failed

    def _send_the_last(self) -> None:
        self._send(_LAST_SECONDS)
        for exporter in self._exporters:
            exporter.shutdown()

    def _read(self) -> MetricsData:
        scope = InstrumentationScope("gateway", self._version)
        metrics = to_otel(self._collect(), self._started, time.time_ns())
        return MetricsData([ResourceMetrics(self._resource, [ScopeMetrics(scope, metrics, "")], "")])


def _interval(environ: Mapping[str, str]) -> float:
    """Seconds between two exports."""
    try:
        seconds = float(environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")) / 1000
    except ValueError:
        return _SECONDS
    return seconds if seconds > 0 else _SECONDS


def to_otel(families: Iterable[Family], started: int, now: int) -> list[Metric]:
    """A registry's families in OpenTelemetry's data model: sums are cumulative, and buckets are not.

    Names stay, without the `_total` that Prometheus adds to sums; so whoever stores them as Prometheus does gets the
    names of `/metrics` again.

    started, now:  Unix time in nanoseconds.
    """
    metrics = []
    for family in families:
        data: Sum | Gauge | Histogram
        if family.type == "histogram":
            data = Histogram(_histogram_points(family.samples, started, now), _CUMULATIVE)
        elif family.type == "counter":
            data = Sum(_points(family.samples, f"{family.name}_total", started, now), _CUMULATIVE, is_monotonic=True)
        else:
            data = Gauge(_points(family.samples, family.name, started, now))
        unit = _UNITS.get(family.name.rpartition("_")[2], "")
        metrics.append(Metric(family.name, family.documentation, unit, data))
    return metrics


def _points(samples: Iterable[Sample], name: str, started: int, now: int) -> list[NumberDataPoint]:
    return [NumberDataPoint(sample.labels, started, now, sample.value) for sample in samples if sample.name == name]


def _histogram_points(samples: Iterable[Sample], started: int, now: int) -> list[HistogramDataPoint]:
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in samples:
        key = tuple((label, value) for label, value in sample.labels.items() if label != "le")
        if sample.name.endswith("_bucket"):
            buckets.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[key] = sample.value
    return [_histogram_point(dict(key), sorted(each), sums[key], started, now) for key, each in buckets.items()]


def _histogram_point(
    labels: Mapping[str, str], upto: list[tuple[float, float]], total: float, started: int, now: int
) -> HistogramDataPoint:
    """A point of a histogram. upto: (bound, observations up to it), and the last bound is infinite."""
    counts = [int(upto[0][1]), *(int(b - a) for (_, a), (_, b) in itertools.pairwise(upto))]
    bounds = [bound for bound, _ in upto[:-1]]
    unknown: Any = None  # Any: the SDK's type wants numbers, though OTLP leaves out extremes that were not recorded
    return HistogramDataPoint(labels, started, now, int(upto[-1][1]), total, counts, bounds, unknown, unknown)
