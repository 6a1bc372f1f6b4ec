"""What the gateway has to reach, line by line, and whether it did. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.summary import DIRECT, ENVOY, GATEWAY, GRPC_AIO, KSERVE, MERGING, NGINX, NULL, SHARING, Sample, Spread, ratio


@dataclass(frozen=True, slots=True)
class Line:
    """One bar: must and aim as text, and what was measured. `met`: "aim", "must", "no", or "" if nothing is asked."""

    what: str
    must: str
    aim: str
    measured: str
    met: str


@dataclass(frozen=True, slots=True)
class _Bar:
    """A ratio of a system to another. must, aim: None if it has none. at_least: or at most?"""

    what: str
    field: str
    against: str
    scenarios: tuple[str, ...]
    must: float | None
    aim: float | None
    at_least: bool
    turned: bool = False  # `against` ÷ `system`
    system: str = GATEWAY


TINY = ("tiny-1", "tiny-16", "tiny-64")
LARGE = ("in-1", "in-8", "out-1", "out-8", "both-1", "both-8")


def _merging(
    what: str, field: str, against: str, scenario: str, must: float | None, aim: float | None, *, at_least: bool = False
) -> _Bar:
    """Of the gateway that merges small requests."""
    return _Bar(f"merging, {what}", field, against, (scenario,), must, aim, at_least, system=MERGING)


def _sharing(
    what: str, field: str, against: str, scenario: str, must: float | None, aim: float | None, *, at_least: bool = False
) -> _Bar:
    """Of the gateway that shares memory with Triton."""
    return _Bar(f"shared memory, {what}", field, against, (scenario,), must, aim, at_least, system=SHARING)


_BARS = (
    _Bar("throughput ÷ Envoy", "rate", ENVOY, TINY, 1.0, 1.2, True),
    _Bar("p50 ÷ Envoy", "p50", ENVOY, TINY, 1.0, 0.8, False),
    _Bar("p99 ÷ Envoy", "p99", ENVOY, TINY, 1.0, 0.8, False),
    _Bar("CPU per request ÷ Envoy", "cpu", ENVOY, TINY, 0.7, 0.45, False),
    _Bar("throughput ÷ direct", "rate", DIRECT, ("tiny-16",), 0.75, 0.9, True),
    _Bar("throughput ÷ the null server", "rate", NULL, TINY, None, None, True),
    _Bar("throughput ÷ a grpc.aio relay", "rate", GRPC_AIO, ("tiny-16",), 2.5, 4.0, True),
    _Bar("CPU per request of a grpc.aio relay ÷ this", "cpu", GRPC_AIO, TINY, None, None, True, True),
    _Bar("large tensors, throughput ÷ Envoy", "rate", ENVOY, LARGE, 1.0, None, True),
    _Bar("large tensors, throughput ÷ nginx", "rate", NGINX, LARGE, None, 1.0, True),
    _Bar("large tensors, p50 ÷ Envoy", "p50", ENVOY, LARGE, 1.0, None, False),
    _Bar("large tensors, p50 ÷ nginx", "p50", NGINX, LARGE, None, 1.0, False),
    _Bar("messages/s on one ModelStreamInfer ÷ Envoy", "rate", ENVOY, ("stream-16",), 1.0, None, True),
    _Bar("CPU per JPEG call, KServe transformer ÷ gateway", "cpu", KSERVE, ("picture", "phone"), 3.0, None, True, True),
    _merging("throughput ÷ direct", "rate", DIRECT, "tiny-16", 1.3, 2.0, at_least=True),
    _merging("throughput ÷ direct", "rate", DIRECT, "tiny-64", 1.6, 3.0, at_least=True),
    _merging("throughput ÷ the null server", "rate", NULL, "tiny-16", None, None, at_least=True),
    _merging("throughput ÷ the null server", "rate", NULL, "tiny-64", None, None, at_least=True),
    _merging("p50 ÷ direct", "p50", DIRECT, "tiny-16", 0.9, 0.6),
    _merging("p99 ÷ direct", "p99", DIRECT, "tiny-16", 1.0, 0.6),
    _merging("CPU with Triton's ÷ Triton's, direct", "served_cpu", DIRECT, "tiny-16", 0.8, 0.5),
    _merging("throughput ÷ not merging", "rate", GATEWAY, "single", 0.97, 1.0, at_least=True),
    _merging("p50 ÷ not merging", "p50", GATEWAY, "single", 1.03, 1.0),
    _merging("p99 ÷ direct", "p99", DIRECT, "open-loop", 1.0, 0.5),
    _merging("answers ÷ direct", "rate", DIRECT, "open-loop", None, None, at_least=True),
    _merging("throughput ÷ direct", "rate", DIRECT, "efficientnet-8", 0.95, 1.0, at_least=True),
    _sharing("throughput ÷ direct", "rate", DIRECT, "in-1", 0.9, 1.1, at_least=True),
    _sharing("throughput ÷ direct", "rate", DIRECT, "in-8", 1.0, 1.3, at_least=True),
    _sharing("throughput ÷ direct", "rate", DIRECT, "both-1", 1.0, 1.5, at_least=True),
    _sharing("throughput of a small request ÷ not sharing", "rate", GATEWAY, "small", 0.98, 1.0, at_least=True),
    _sharing("CPU per small request ÷ not sharing", "cpu", GATEWAY, "small", 1.02, 1.0),
    _sharing("CPU per request ÷ not sharing", "cpu", GATEWAY, "in-1", 0.6, 0.4),
    _sharing("CPU per request ÷ not sharing", "cpu", GATEWAY, "in-8", 0.6, 0.4),
    _sharing("CPU per JPEG call ÷ not sharing", "cpu", GATEWAY, "picture", 0.8, 0.6),
    _sharing("throughput ÷ direct", "rate", DIRECT, "efficientnet-8", 1.0, 1.1, at_least=True),
)


def lines(samples: Sequence[Sample]) -> list[Line]:
    """Every bar in every scenario that was measured."""
    return [line for bar in _BARS for line in _lines(bar, samples)]


def _lines(bar: _Bar, samples: Sequence[Sample]) -> Iterator[Line]:
    for scenario in bar.scenarios:
        above, below = (bar.against, bar.system) if bar.turned else (bar.system, bar.against)
        measured = ratio(samples, scenario, bar.field, above, below)
        if measured is not None:
            yield Line(
                f"{bar.what} · {scenario}",
                _asked(bar, bar.must),
                _asked(bar, bar.aim),
                _told(measured),
                met(bar, measured),
            )


def met(bar: _Bar, measured: Spread) -> str:
    """By the median."""
    if bar.aim is not None and _reaches(bar, measured.middle, bar.aim):
        return "aim"
    if bar.must is not None:
        return "must" if _reaches(bar, measured.middle, bar.must) else "no"
    return "" if bar.aim is None else "no"


def _reaches(bar: _Bar, value: float, wanted: float) -> bool:
    return value >= wanted if bar.at_least else value <= wanted


def _asked(bar: _Bar, wanted: float | None) -> str:
    return "" if wanted is None else f"{'≥' if bar.at_least else '≤'} {wanted:g}"


def _told(measured: Spread) -> str:
    return f"{measured.middle:.2f} ({measured.low:.2f}–{measured.high:.2f})"
