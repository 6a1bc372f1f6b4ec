"""What the gateway has to reach, line by line, and whether it did. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perf.summary import DIRECT, ENVOY, GRPCIO, KSERVE, NGINX, WIRE, Sample, Spread, ratio


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
    """A ratio of the gateway to another system. must, aim: None if it has none. at_least: or at most?"""

    what: str
    field: str
    against: str
    scenarios: tuple[str, ...]
    must: float | None
    aim: float | None
    at_least: bool
    turned: bool = False  # other ÷ gateway


TINY = ("tiny-1", "tiny-16", "tiny-64")
LARGE = ("in-1", "in-8", "out-1", "out-8", "both-1", "both-8")

_BARS = (
    _Bar("throughput ÷ Envoy", "rate", ENVOY, TINY, 1.0, 1.2, True),
    _Bar("p50 ÷ Envoy", "p50", ENVOY, TINY, 1.0, 0.8, False),
    _Bar("p99 ÷ Envoy", "p99", ENVOY, TINY, 1.0, 0.8, False),
    _Bar("CPU per request ÷ Envoy", "cpu", ENVOY, TINY, 0.7, 0.45, False),
    _Bar("throughput ÷ direct", "rate", DIRECT, ("tiny-16",), 0.75, 0.9, True),
    _Bar("throughput ÷ the gateway on grpcio", "rate", GRPCIO, ("tiny-16",), 2.5, 4.0, True),
    _Bar("CPU per request of the gateway on grpcio ÷ this", "cpu", GRPCIO, TINY, None, None, True, True),
    _Bar("large tensors, throughput ÷ Envoy", "rate", ENVOY, LARGE, 1.0, None, True),
    _Bar("large tensors, throughput ÷ nginx", "rate", NGINX, LARGE, None, 1.0, True),
    _Bar("large tensors, p50 ÷ Envoy", "p50", ENVOY, LARGE, 1.0, None, False),
    _Bar("large tensors, p50 ÷ nginx", "p50", NGINX, LARGE, None, 1.0, False),
    _Bar("messages/s on one ModelStreamInfer ÷ Envoy", "rate", ENVOY, ("stream-16",), 1.0, None, True),
    _Bar("CPU per JPEG call, KServe transformer ÷ gateway", "cpu", KSERVE, ("picture",), 3.0, None, True, True),
)


def lines(samples: Sequence[Sample]) -> list[Line]:
    """Every bar in every scenario that was measured."""
    return [line for bar in _BARS for line in _lines(bar, samples)]


def _lines(bar: _Bar, samples: Sequence[Sample]) -> Iterator[Line]:
    for scenario in bar.scenarios:
        above, below = (bar.against, WIRE) if bar.turned else (WIRE, bar.against)
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
