"""Telemetry: the last hour, a point a minute, for the plots of the admin page. Pure: numbers in, JSON values out.

It is kept in memory and bounded: so many points, and in each the models that were called most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Final

POINTS: Final = 60
SECONDS: Final = 60.0  # that a point is about
MODELS: Final = 100  # in one point, and in a report: as many as the page shows
VARIANTS: Final = 20  # of one model, those that answered most
LIMITS: Final = 200

Numbers = list[float | None]
"""One for each point; None where there is nothing to say."""


@dataclass(frozen=True, slots=True)
class ModelPoint:
    """What became of a model's calls in one point's time."""

    calls: float = 0.0
    errors: float = 0.0  # of these
    p50: float | None = None  # milliseconds
    p99: float | None = None
    in_flight: float = 0.0  # the most that was seen
    variants: Mapping[str, float] = field(default_factory=dict)  # calls by the variant that answered


@dataclass(frozen=True, slots=True)
class Point:
    """One point's time, which ends `at` (Unix time)."""

    at: float
    seconds: float
    models: Mapping[str, ModelPoint]
    limits: Mapping[str, float]  # of calls in flight, by `UPSTREAM/MODEL`; 0 is none


class History:
    """The last points."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=POINTS)

    def add(self, point: Point) -> None:
        """Keep a point, and of its models those that matter most."""
        most = nlargest(MODELS, point.models.items(), key=lambda item: (item[1].calls, item[1].in_flight))
        limits = dict(list(point.limits.items())[:LIMITS])
        self._points.append(Point(point.at, point.seconds, dict(most), limits))

    def report(self) -> Mapping[str, object]:
        """JSON values, oldest first. docs/metrics.md has the keys."""
        points = list(self._points)
        return {
            "times": [round(point.at) for point in points],
            "seconds": [round(point.seconds, 1) for point in points],
            "models": {name: _model(name, points) for name in self._names(points)},
            "limits": _limits(points),
        }

    @staticmethod
    def _names(points: list[Point]) -> list[str]:
        calls: dict[str, float] = {}
        for point in points:
            for name, model in point.models.items():
                calls[name] = calls.get(name, 0.0) + model.calls
        return sorted(nlargest(MODELS, calls, key=lambda name: calls[name]))


def _model(name: str, points: list[Point]) -> Mapping[str, object]:
    idle = ModelPoint()
    found = [point.models.get(name, idle) for point in points]
    answered: dict[str, float] = {}
    for model in found:
        for variant, calls in model.variants.items():
            answered[variant] = answered.get(variant, 0.0) + calls
    variants = sorted(nlargest(VARIANTS, answered, key=lambda variant: answered[variant]))
    return {
        "calls": [model.calls for model in found],
        "errors": [model.errors for model in found],
        "p50_ms": [model.p50 for model in found],
        "p99_ms": [model.p99 for model in found],
        "in_flight": [model.in_flight for model in found],
        "variants": {variant: [model.variants.get(variant, 0.0) for model in found] for variant in variants},
    }


def _limits(points: list[Point]) -> Mapping[str, Numbers]:
    """Those that were set at some time."""
    names = dict.fromkeys(name for point in points for name, limit in point.limits.items() if limit)
    return {name: [point.limits.get(name) or None for point in points] for name in names}
