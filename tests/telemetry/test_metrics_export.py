"""What a real OTLP receiver gets is what `/metrics` says."""

from __future__ import annotations

import asyncio
import os

import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE
from patience import wait_until
from receiver import receiving

from gateway.telemetry.metrics import Metrics, MetricsSettings
from gateway.telemetry.metrics_export import MetricsExport
from gateway.telemetry.otel import BadTelemetrySettings, is_configured


@pytest.fixture
async def received():
    """Requests that came to an OTLP/HTTP receiver, whose address the environment has."""
    requests: list[ExportMetricsServiceRequest] = []

    async def post(request: web.Request) -> web.Response:
        requests.append(ExportMetricsServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    async with receiving("/v1/metrics", post) as url:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{url}/v1/metrics")
            yield requests


def values(message):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes}


async def test_every_number_of_the_registry_is_sent(received, call, fallen_back):
    metrics = Metrics(MetricsSettings("1.2.3"))
    call(attempts=fallen_back).report_to(metrics)
    async with MetricsExport(metrics.scrape.collect, os.environ, "1.2.3"):
        pass  # the last export comes with the end
    (request,) = received
    (group,) = request.resource_metrics
    resource = values(group.resource)
    assert (resource["service.name"], resource["service.version"]) == ("inference-gateway", "1.2.3")
    assert resource["service.instance.id"]
    sent = {metric.name: metric for scope in group.scope_metrics for metric in scope.metrics}
    assert sent.keys() == {family.name for family in metrics.scrape.collect()}

    requests = sent["gateway_requests"].sum
    assert requests.is_monotonic
    assert requests.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
    (point,) = requests.data_points
    assert values(point) == {"model": "photos", "variant": "onnx", "method": "ModelInfer", "code": "OK"}
    assert point.as_double == 1
    assert 0 < point.start_time_unix_nano < point.time_unix_nano

    duration = sent["gateway_request_duration_seconds"]
    (histogram,) = duration.histogram.data_points
    assert (duration.unit, sent["gateway_request_bytes"].unit) == ("s", "By")
    assert histogram.sum == pytest.approx(0.006)
    assert len(histogram.bucket_counts) == len(histogram.explicit_bounds) + 1
    assert dict(zip(histogram.explicit_bounds, histogram.bucket_counts, strict=False))[0.01] == 1
    assert sum(histogram.bucket_counts) == histogram.count == 1
    assert not histogram.HasField("min")
    assert sent["gateway_requests_in_flight"].gauge.data_points[0].as_double == 0


async def test_it_is_sent_again_and_again(received, monkeypatch):
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    async with MetricsExport(Metrics(MetricsSettings()).scrape.collect, os.environ, ""):
        await wait_until(lambda: len(received) >= 2)


async def test_a_collector_that_is_gone_holds_up_nobody(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:1/v1/metrics")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")

    async def run() -> None:
        async with MetricsExport(Metrics(MetricsSettings()).scrape.collect, os.environ, ""):
            pass

    await asyncio.wait_for(run(), 45)
    assert "metrics could not be exported" in caplog.text


async def test_an_exporter_that_is_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "statsd")
    with pytest.raises(
        BadTelemetrySettings, match=r"OTEL_METRICS_EXPORTER .*'statsd'.* installed are .*otlp_proto_http"
    ):
        async with MetricsExport(Metrics(MetricsSettings()).scrape.collect, os.environ, ""):
            pass


@pytest.mark.parametrize(
    ("environ", "configured"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318/v1/metrics"}, True),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_metrics_are_sent_only_when_asked_for(environ, configured):
    assert is_configured("metrics", environ) is configured
