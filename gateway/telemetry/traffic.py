"""Telemetry: what the metrics say of the last minute and the last quarter of an hour, for the admin page.

May depend on `metrics`. Only increments are kept, and only of series that moved, so what nobody calls costs nothing.
Reading a large registry takes milliseconds of a thread; it never takes more than one hundredth of the time.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import Metric as Family

from gateway.telemetry.metrics import OVERHEAD_SECONDS, SECONDS

_TICK = 5.0  # seconds
_SHARE = 0.01  # of the time, at most, that reading may take
_FINE, _COARSE = 12, 15  # a minute of ticks, and of minutes a quarter of an hour

_LABELS: Mapping[str, tuple[str, ...]] = {
    "gateway_requests_total": ("model", "variant", "code"),
    "gateway_request_duration_seconds_bucket": ("model", "variant", "le"),
    "gateway_overhead_duration_seconds_bucket": ("model", "le"),
    "gateway_fallbacks_total": ("model",),
    "gateway_queue_full_total": ("model",),
    "gateway_attempts_total": ("upstream", "endpoint", "meaning"),
}
_FAMILIES = frozenset(name.removesuffix("_total").removesuffix("_bucket") for name in _LABELS)
_IN_FLIGHT = "gateway_requests_in_flight"

Key = tuple[str, ...]
"""A sample's name, then the values of those of its labels that count here."""


class Traffic:
    """Looks at the registry every few seconds between enter and exit."""

    def __init__(self, collect: Callable[[], Iterable[Family]], clock: Callable[[], float] = time.monotonic) -> None:
        """collect: reads the registry (`Scrape.collect`); it is called in a thread."""
        self._collect = collect
        self._clock = clock
        self._last: dict[Key, float] | None = None  # None: nothing was read yet
        self._last_at = clock()
        self._in_flight: dict[str, float] = {}
        self._minute: deque[_Increments] = deque(maxlen=_FINE)
        self._quarter: deque[_Increments] = deque(maxlen=_COARSE)
        self._ticks = 0

    async def __aenter__(self) -> Traffic:
        self._looking = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            began = self._clock()
            await asyncio.to_thread(self.look)
            await asyncio.sleep(max(_TICK, (self._clock() - began) / _SHARE))

    def look(self) -> None:
        """Read the registry, and keep what has been added since the last look."""
        values, in_flight = _read(self._collect())
        now = self._clock()
        if self._last is not None:
            last = self._last
            added = {key: value - last.get(key, 0.0) for key, value in values.items() if value != last.get(key, 0.0)}
            self._add(_Increments(now - self._last_at, added))
        self._last, self._last_at, self._in_flight = values, now, in_flight

    def _add(self, increments: _Increments) -> None:
        if self._ticks % _FINE == 0:
            self._quarter.append(_Increments(0.0, {}))
        self._ticks += 1
        self._quarter[-1] = _together((self._quarter[-1], increments))
        self._minute.append(increments)

    def report(self) -> Mapping[str, object]:
        """JSON values: what was called in each window; docs/metrics.md has the keys."""
        return {
            "in_flight": dict(self._in_flight),
            "windows": [
                {"name": name, **_window(_together(tuple(ring)))}
                for name, ring in (("1m", self._minute), ("15m", self._quarter))
            ],
        }


class _Increments:
    """What was added to counters within some time."""

    __slots__ = ("added", "seconds")

    def __init__(self, seconds: float, added: Mapping[Key, float]) -> None:
        self.seconds = seconds
        self.added = added


def _together(parts: Sequence[_Increments]) -> _Increments:
    added: defaultdict[Key, float] = defaultdict(float)
    for part in parts:
        for key, value in part.added.items():
            added[key] += value
    return _Increments(sum(part.seconds for part in parts), added)


def _read(families: Iterable[Family]) -> tuple[dict[Key, float], dict[str, float]]:
    """Counters by key, and calls in flight by model."""
    values: defaultdict[Key, float] = defaultdict(float)
    in_flight: dict[str, float] = {}
    for family in families:
        if family.name == _IN_FLIGHT:
            in_flight = {sample.labels["model"]: sample.value for sample in family.samples}
        elif family.name in _FAMILIES:
            for sample in family.samples:
                labels = _LABELS.get(sample.name)
                if labels:
                    values[(sample.name, *(sample.labels[label] for label in labels))] += sample.value
    return dict(values), in_flight


def _window(increments: _Increments) -> dict[str, object]:
    seconds, of = increments.seconds, _by_name(increments.added)
    codes, buckets = of["gateway_requests_total"], of["gateway_request_duration_seconds_bucket"]
    models = {
        model: {
            **_calls(codes, buckets, seconds, model),
            "overhead_ms": _quantiles(OVERHEAD_SECONDS, of["gateway_overhead_duration_seconds_bucket"], model),
            "fallbacks": of["gateway_fallbacks_total"].get((model,), 0.0),
            "queue_full": of["gateway_queue_full_total"].get((model,), 0.0),
            "variants": {
                variant: _calls(codes, buckets, seconds, model, variant)
                for variant in sorted({key[1] for key in codes if key[0] == model})
            },
        }
        for model in sorted({key[0] for key in codes})
    }
    endpoints: dict[str, dict[str, dict[str, float]]] = {}
    for (upstream, endpoint, meaning), count in of["gateway_attempts_total"].items():
        endpoints.setdefault(upstream, {}).setdefault(endpoint, {})[meaning] = count
    return {"seconds": round(seconds, 1), "models": models, "endpoints": endpoints}


def _by_name(added: Mapping[Key, float]) -> dict[str, dict[Key, float]]:
    of: dict[str, dict[Key, float]] = {name: {} for name in _LABELS}
    for (name, *labels), value in added.items():
        of[name][tuple(labels)] = value
    return of


def _calls(codes: Mapping[Key, float], buckets: Mapping[Key, float], seconds: float, *labels: str) -> dict[str, object]:
    """What callers of one model, or of one variant of it, got. labels: the model, and the variant."""
    ended: defaultdict[str, float] = defaultdict(float)
    for key, count in codes.items():
        if key[: len(labels)] == labels:
            ended[key[-1]] += count
    calls = sum(ended.values())
    return {
        "calls": calls,
        "per_second": round(calls / seconds, 3) if seconds else 0.0,
        "errors": {code: count for code, count in sorted(ended.items()) if code != "OK"},
        "ms": _quantiles(SECONDS, buckets, *labels),
    }


def _quantiles(bounds: Sequence[float], buckets: Mapping[Key, float], *labels: str) -> dict[str, float] | None:
    """Milliseconds within which half, 95 and 99 of 100 calls ended; None if there was none."""
    upto = dict.fromkeys((*bounds, float("inf")), 0.0)  # a bucket to which nothing was added is not in `buckets`
    for key, count in buckets.items():
        if key[: len(labels)] == labels:
            upto[float(key[-1])] += count
    steps = tuple(upto.items())
    if steps[-1][1] <= 0:
        return None
    return {name: round(quantile(steps, q) * 1000, 3) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def quantile(steps: Sequence[tuple[float, float]], q: float) -> float:
    """A quantile of a histogram, as Prometheus' histogram_quantile gives it: even within a bucket.

    steps:   (upper bound, observations up to it) in order, the last bound infinite and its count not 0.
    returns: the highest finite bound if the quantile is beyond that.
    """
    wanted = q * steps[-1][1]
    low = below = 0.0
    for bound, count in steps:
        if count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below) if count > below else bound
        low, below = bound, count
    return low
