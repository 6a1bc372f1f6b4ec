"""What the admin page is told of the last minute and quarter of an hour."""

from __future__ import annotations

import asyncio

import pytest

from gateway.status import Code, Meaning
from gateway.telemetry.metrics import Metrics, MetricsSettings
from gateway.telemetry.traffic import Traffic, quantile


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def metrics():
    return Metrics(MetricsSettings())


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def traffic(metrics, clock):
    traffic = Traffic(metrics.scrape.collect, clock)
    traffic.look()
    return traffic


def tick(traffic, clock, times=1):
    for _ in range(times):
        clock.now += 5
        traffic.look()


def windows(traffic):
    return {window["name"]: window for window in traffic.report()["windows"]}


def test_a_model_s_calls_are_counted_with_their_rate_errors_and_latency(metrics, traffic, clock, call, attempt):
    for _ in range(8):
        call().report_to(metrics)  # 5 ms
    refused = attempt(code=Code.INVALID_ARGUMENT, meaning=Meaning.CALLER, seconds=0.0001)
    for _ in range(2):
        call(attempts=[refused], code=Code.INVALID_ARGUMENT).report_to(metrics)
    tick(traffic, clock)
    window = windows(traffic)["1m"]
    photos = window["models"]["photos"]
    assert window["seconds"] == 5
    assert (photos["calls"], photos["per_second"], photos["errors"]) == (10, 2.0, {"INVALID_ARGUMENT": 2})
    assert 2 <= photos["ms"]["p50"] <= 5
    assert 2 <= photos["ms"]["p99"] <= 5
    assert photos["variants"]["onnx"]["calls"] == 10
    assert window["endpoints"] == {"cpu": {"cpu-0:8001": {"ok": 8, "caller": 2}}}


def test_variants_fallbacks_and_full_queues_are_told_apart(metrics, traffic, clock, call, attempt, fallen_back):
    call(attempts=fallen_back).report_to(metrics)
    full = attempt(code=Code.UNAVAILABLE, meaning=Meaning.OVERLOADED)
    call(attempts=[full], code=Code.RESOURCE_EXHAUSTED).report_to(metrics)
    tick(traffic, clock)
    photos = windows(traffic)["1m"]["models"]["photos"]
    assert (photos["fallbacks"], photos["queue_full"]) == (1, 1)
    assert photos["variants"]["onnx"]["calls"] == 2


def test_a_pipeline_s_attempts_are_told_by_the_model_that_it_called(metrics, traffic, clock, call, attempt):
    """Two models that it calls may have variants of one name; what others call is not among them."""
    late = attempt(variant="onnx", called="scores", code=Code.UNAVAILABLE, meaning=Meaning.UNREACHABLE)
    parts = [attempt(called="pages"), late, attempt(variant="int8", called="scores")]
    for _ in range(3):
        call(model="page-text", attempts=parts).report_to(metrics)
    call().report_to(metrics)
    call(model="nobody", known=False).report_to(metrics)
    tick(traffic, clock)
    models = windows(traffic)["1m"]["models"]
    assert models["page-text"]["called"] == {
        "pages": {"onnx": {"ok": 3}},
        "scores": {"int8": {"ok": 3}, "onnx": {"unreachable": 3}},
    }
    assert models["photos"]["called"] == models["other"]["called"] == {}


def test_what_is_older_than_a_window_is_not_in_it(metrics, traffic, clock, call):
    call().report_to(metrics)
    tick(traffic, clock, 13)
    assert windows(traffic)["1m"]["models"] == {}
    assert windows(traffic)["1m"]["seconds"] == 60
    assert windows(traffic)["15m"]["models"]["photos"]["calls"] == 1
    tick(traffic, clock, 12 * 15)
    assert windows(traffic)["15m"]["models"] == {}


def test_what_was_counted_before_the_first_look_is_in_no_window(metrics, clock, call):
    call().report_to(metrics)
    late = Traffic(metrics.scrape.collect, clock)
    assert [window["models"] for window in windows(late).values()] == [{}, {}]
    late.look()
    tick(late, clock)
    assert [window["models"] for window in windows(late).values()] == [{}, {}]


def test_a_window_is_as_long_as_its_name_says_however_rarely_it_is_looked_at(metrics, traffic, clock, call):
    """A registry so large that it is read once in 40 seconds."""
    for _ in range(40):
        call().report_to(metrics)
        clock.now += 40
        traffic.look()
    assert windows(traffic)["1m"]["seconds"] == 40
    assert 840 <= windows(traffic)["15m"]["seconds"] <= 900
    assert windows(traffic)["15m"]["models"]["photos"]["calls"] == windows(traffic)["15m"]["seconds"] / 40


def test_only_what_is_needed_is_read(metrics, call):
    """So the process that serves calls is not kept busy by this."""
    call().report_to(metrics)
    read = {family.name for family in metrics.scrape.collect(["gateway_requests_total"])}
    assert read == {"gateway_requests"}


@pytest.mark.parametrize(
    ("steps", "q", "expected"),
    [
        ([(1.0, 0), (2.0, 10), (float("inf"), 10)], 0.5, 1.5),
        ([(1.0, 10), (2.0, 10), (float("inf"), 10)], 0.5, 0.5),
        ([(1.0, 0), (2.0, 0), (float("inf"), 10)], 0.5, 2.0),
        ([(1.0, 5), (2.0, 5), (float("inf"), 10)], 0.99, 2.0),
        ([(1.0, 10), (2.0, 20), (float("inf"), 20)], 0.5, 1.0),
    ],
    ids=["inside a bucket", "in the first", "beyond all", "partly beyond", "on a bound"],
)
def test_quantiles_are_prometheus_ones(steps, q, expected):
    assert quantile(steps, q) == pytest.approx(expected)


async def test_a_look_that_fails_is_not_the_last(monkeypatch, caplog):
    monkeypatch.setattr("gateway.telemetry.traffic._TICK", 0.01)
    looks = []

    def collect(names):
        looks.append(names)
        if len(looks) == 1:
            raise OSError("a file of a worker is gone")
        return []

    async with Traffic(collect):
        for _ in range(2000):
            if len(looks) >= 3:
                break
            await asyncio.sleep(0.01)
    assert len(looks) >= 3
    assert caplog.text.count("could not be read") == 1
