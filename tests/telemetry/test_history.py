"""The last hour, as the page draws it: a point a minute, bounded whatever callers do."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.hooks import CallStarted, GateNow, PipelinesNow, Watched
from gateway.status import Code
from gateway.telemetry.history import MODELS, POINTS, VARIANTS, History, ModelPoint, Point
from gateway.telemetry.metrics import Metrics, MetricsSettings
from gateway.telemetry.traffic import Traffic


def point(at: float, models: dict[str, ModelPoint], limits: dict[str, float] | None = None) -> Point:
    return Point(at, 60.0, models, limits or {})


def test_each_model_has_a_number_for_each_point() -> None:
    history = History()
    history.add(point(60, {"a": ModelPoint(6, 1, 2.0, 9.0, 3, {"x": 5.0})}, {"gpu/net": 4, "cpu/net": 0}))
    history.add(point(120, {"b": ModelPoint(1)}, {"gpu/net": 0}))
    report: Any = history.report()
    assert (report["times"], report["seconds"]) == ([60, 120], [60.0, 60.0])
    assert report["models"]["a"] == {
        "calls": [6, 0.0],
        "errors": [1, 0.0],
        "p50_ms": [2.0, None],
        "p99_ms": [9.0, None],
        "in_flight": [3, 0.0],
        "variants": {"x": [5.0, 0.0]},
    }
    assert report["limits"] == {"gpu/net": [4, None]}


def test_it_is_bounded_and_keeps_what_is_called_most() -> None:
    history = History()
    for at in range(200):
        variants = {f"v{n}": float(n) for n in range(50)}
        history.add(point(at, {f"m{at}-{n}": ModelPoint(n, variants=variants) for n in range(300)}))
    report: Any = history.report()
    assert report["times"] == list(range(140, 200))
    assert len(report["times"]) == POINTS
    assert len(report["models"]) == MODELS
    assert "m199-299" in report["models"]
    assert list(report["models"]["m199-299"]["variants"]) == sorted(f"v{n}" for n in range(50 - VARIANTS, 50))
    assert sum(len(kept.models) for kept in history._points) == POINTS * MODELS


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(MetricsSettings())


def test_a_point_is_what_was_counted_in_its_minute(metrics: Metrics, call: Any) -> None:
    now = [100.0]
    traffic = Traffic(metrics.scrape.collect, lambda: now[0])
    gate = GateNow("cpu", "net", 8, 3, 2, 0.1, 40.0, {})
    metrics.watch(Watched(lambda: PipelinesNow([], 0, 0, {}), lambda: [gate]))
    traffic.look()
    for _ in range(9):
        call().report_to(metrics)
    call(attempts=[], code=Code.UNAVAILABLE).report_to(metrics)
    metrics.call_started(CallStarted("ModelInfer", "photos", True, "", "", 0.0))  # does not end
    for _ in range(12):
        now[0] += 5
        traffic.look()
    report: Any = traffic.history()
    photos = report["models"]["photos"]
    assert (photos["calls"], photos["errors"], photos["in_flight"]) == ([10], [1], [1])
    assert photos["variants"] == {"onnx": [9]}
    assert 2 <= photos["p99_ms"][0] <= 5
    assert report["limits"] == {"cpu/net": [8]}
    for _ in range(12):
        now[0] += 5
        traffic.look()
    assert traffic.history()["models"]["photos"]["calls"] == [10, 0]  # type: ignore[index]
