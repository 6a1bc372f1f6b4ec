"""Telemetry: the metrics of the last minute and the last quarter of an hour, for the admin page; and its last hour.

May depend on `metrics` and `history`. Only increments are kept, and only of series that moved, so what nobody calls
costs nothing. Reading takes a thread 0.5 ms for each model that is called; it never takes more than one hundredth of
the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from prometheus_client import Metric as Family

from gateway.telemetry.families import ADDRESS, OVERHEAD_SECONDS, SECONDS
from gateway.telemetry.history import SECONDS as POINT_SECONDS
from gateway.telemetry.history import History, ModelPoint, Point

_log = logging.getLogger(__name__)

_TICK = 5.0  # seconds
_SHARE = 0.01  # part of the time that reading may take at most
_MINUTE, _QUARTER = 60.0, 900.0  # seconds; windows of increments, kept by the tick and by the minute

_LABELS: Mapping[str, tuple[str, ...]] = {
    "gateway_requests_total": ("model", "variant", "code"),
    "gateway_request_duration_seconds_bucket": ("model", "variant", "le"),
    "gateway_overhead_duration_seconds_bucket": ("model", "le"),
    "gateway_fallbacks_total": ("model",),
    "gateway_queue_full_total": ("model",),
    "gateway_attempts_total": ("upstream", ADDRESS, "meaning"),
    "gateway_pipeline_attempts_total": ("model", "called", "variant", "meaning"),
}
_IN_FLIGHT = "gateway_requests_in_flight"
_LIMIT = "gateway_limit_calls"
_NAMES = (*_LABELS, _IN_FLIGHT, _LIMIT)

Key = tuple[str, ...]
"""A sample's name, then the values of the labels that count here."""


class Traffic:
    """Reads the registry every few seconds between enter and exit."""

    def __init__(
        self, collect: Callable[[Collection[str]], Iterable[Family]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """collect: reads at least these samples (`Scrape.collect`); it is called in a thread."""
        self._collect = collect
        self._clock = clock
        self._last: dict[Key, float] | None = None  # None: the registry was not read yet
        self._last_at = clock()
        self._minute: deque[_Increments] = deque()
        self._quarter: deque[_Increments] = deque()
        self._history = History()
        self._point: list[_Increments] = []  # of the point that has not ended
        self._most_in_flight: dict[str, float] = {}  # in its time
        self._report = self._summed_up({})

    async def __aenter__(self) -> Traffic:
        self._looking = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            began = self._clock()
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # reading again may succeed, and a fault of the page must not end the gateway
                _log.exception("the metrics could not be read for the page")
            await asyncio.sleep(max(_TICK, (self._clock() - began) / _SHARE))

    def look(self) -> None:
        """Read the registry, and add up the increments of each window."""
        values, in_flight, limits = _read(self._collect(_NAMES))
        now = self._clock()
        if self._last is not None:
            last = self._last
            added = {key: value - last.get(key, 0.0) for key, value in values.items() if value != last.get(key, 0.0)}
            tick = _Increments(self._last_at, now, added)
            self._add(tick)
            self._remember(tick, in_flight, limits)
        self._last, self._last_at = values, now
        self._report = self._summed_up(in_flight)

    def _add(self, tick: _Increments) -> None:
        self._minute.append(tick)
        if self._quarter and tick.until - self._quarter[-1].since <= _MINUTE:
            self._quarter.append(_together((self._quarter.pop(), tick)))
        else:
            self._quarter.append(tick)
        for ring, seconds in ((self._minute, _MINUTE), (self._quarter, _QUARTER)):
            while tick.until - ring[0].since > seconds and len(ring) > 1:
                ring.popleft()

    def _remember(self, tick: _Increments, in_flight: Mapping[str, float], limits: Mapping[str, float]) -> None:
        """Make a point of the last hour, once its time has passed."""
        self._point.append(tick)
        for model, count in in_flight.items():
            if count > self._most_in_flight.get(model, 0.0):
                self._most_in_flight[model] = count
        if tick.until - self._point[0].since < POINT_SECONDS:
            return
        whole = _together(self._point)
        self._history.add(Point(time.time(), whole.until - whole.since, _points(whole, self._most_in_flight), limits))
        self._point, self._most_in_flight = [], {}

    def history(self) -> Mapping[str, object]:
        """JSON values: the last hour, a point a minute. docs/metrics.md has the keys."""
        return self._history.report()

    def _summed_up(self, in_flight: Mapping[str, float]) -> Mapping[str, object]:
        rings = (("1m", self._minute), ("15m", self._quarter))
        return {"in_flight": in_flight, "windows": [{"name": name, **_window(_together(ring))} for name, ring in rings]}

    def report(self) -> Mapping[str, object]:
        """JSON values: the calls of each window, as of the last reading. docs/metrics.md has the keys."""
        return self._report


class _Increments:
    """Increments of counters between two instants."""

    __slots__ = ("added", "since", "until")

    def __init__(self, since: float, until: float, added: Mapping[Key, float]) -> None:
        self.since = since
        self.until = until
        self.added = added


def _together(parts: Iterable[_Increments]) -> _Increments:
    """The sum of increments. parts: in order and without gaps."""
    added: defaultdict[Key, float] = defaultdict(float)
    since, until = 0.0, 0.0
    for index, part in enumerate(parts):
        since, until = (since if index else part.since), part.until
        for key, value in part.added.items():
            added[key] += value
    return _Increments(since, until, added)


def _read(families: Iterable[Family]) -> tuple[dict[Key, float], dict[str, float], dict[str, float]]:
    """The counters by key, the calls in flight by model, and the limits of these by `UPSTREAM/MODEL`."""
    values: defaultdict[Key, float] = defaultdict(float)
    in_flight: dict[str, float] = {}
    limits: dict[str, float] = {}
    for family in families:
        if family.name == _IN_FLIGHT:
            in_flight = {sample.labels["model"]: sample.value for sample in family.samples}
        elif family.name == _LIMIT:
            limits = {f"{s.labels['upstream']}/{s.labels['upstream_model']}": s.value for s in family.samples}
        else:
            for sample in family.samples:
                labels = _LABELS.get(sample.name)
                if labels:
                    key = (sample.name, *(sample.labels[label] for label in labels))
                    values[key] += sample.value
    return dict(values), in_flight, limits


def _points(increments: _Increments, in_flight: Mapping[str, float]) -> dict[str, ModelPoint]:
    """Each model that had calls, ended or not. in_flight: the most of each."""
    of = _by_name_and_first_label(increments.added)
    ended, buckets = of["gateway_requests_total"], of["gateway_request_duration_seconds_bucket"]
    points = {}
    for model in dict.fromkeys([*ended, *(model for model, count in in_flight.items() if count)]):
        codes = ended.get(model, {})
        variants: defaultdict[str, float] = defaultdict(float)
        for (variant, code), count in codes.items():
            if code == "OK" and variant:
                variants[variant] += count
        calls = sum(codes.values())
        quantiles = _quantiles(SECONDS, buckets.get(model, {})) or {}
        points[model] = ModelPoint(
            calls,
            calls - sum(count for (_, code), count in codes.items() if code == "OK"),
            quantiles.get("p50"),
            quantiles.get("p99"),
            in_flight.get(model, 0.0),
            dict(variants),
        )
    return points


def _window(increments: _Increments) -> dict[str, object]:
    seconds = increments.until - increments.since
    of = _by_name_and_first_label(increments.added)
    models = {}
    for model, codes in sorted(of["gateway_requests_total"].items()):
        buckets = of["gateway_request_duration_seconds_bucket"].get(model, {})
        overhead = of["gateway_overhead_duration_seconds_bucket"].get(model, {})
        models[model] = {
            **_calls(codes, buckets, seconds),
            "overhead_ms": _quantiles(OVERHEAD_SECONDS, overhead),
            "fallbacks": sum(of["gateway_fallbacks_total"].get(model, {}).values()),
            "queue_full": sum(of["gateway_queue_full_total"].get(model, {}).values()),
            "variants": {
                variant: _calls(_of_variant(codes, variant), _of_variant(buckets, variant), seconds)
                for variant in sorted({variant for variant, _ in codes})
            },
            "called": _called(of["gateway_pipeline_attempts_total"].get(model, {})),
        }
    endpoints: dict[str, dict[str, dict[str, float]]] = {}
    for upstream, attempts in of["gateway_attempts_total"].items():
        for (endpoint, meaning), count in attempts.items():
            endpoints.setdefault(upstream, {}).setdefault(endpoint, {})[meaning] = count
    return {"seconds": round(seconds, 1), "models": models, "endpoints": endpoints}


def _by_name_and_first_label(added: Mapping[Key, float]) -> dict[str, dict[str, dict[Key, float]]]:
    of: dict[str, dict[str, dict[Key, float]]] = {name: {} for name in _LABELS}
    for (name, first, *labels), value in added.items():
        of[name].setdefault(first, {})[tuple(labels)] = value
    return of


def _called(attempts: Mapping[Key, float]) -> dict[str, dict[str, dict[str, float]]]:
    """A pipeline's attempts by the model that it called, that one's variant, and what the answer meant."""
    called: dict[str, dict[str, dict[str, float]]] = {}
    for (model, variant, meaning), count in sorted(attempts.items()):
        called.setdefault(model, {}).setdefault(variant, {})[meaning] = count
    return called


def _of_variant(values: Mapping[Key, float], variant: str) -> dict[Key, float]:
    return {key: value for key, value in values.items() if key[0] == variant}


def _calls(codes: Mapping[Key, float], buckets: Mapping[Key, float], seconds: float) -> dict[str, object]:
    """The calls of one model or variant. codes, buckets: the last part of a key is the code, or the bound."""
    ended: defaultdict[str, float] = defaultdict(float)
    for key, count in codes.items():
        ended[key[-1]] += count
    calls = sum(ended.values())
    return {
        "calls": calls,
        "per_second": round(calls / seconds, 3) if seconds else 0.0,
        "errors": {code: count for code, count in sorted(ended.items()) if code != "OK"},
        "ms": _quantiles(SECONDS, buckets),
    }


def _quantiles(bounds: Sequence[float], buckets: Mapping[Key, float]) -> dict[str, float] | None:
    """Milliseconds within which 50, 95 and 99 of 100 calls ended; None if there were none."""
    upto = dict.fromkeys((*bounds, float("inf")), 0.0)  # a bucket without increments is not in `buckets`
    for key, count in buckets.items():
        upto[float(key[-1])] += count
    steps = tuple(upto.items())
    if steps[-1][1] <= 0:
        return None
    return {name: round(quantile(steps, q) * 1000, 3) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def quantile(steps: Sequence[tuple[float, float]], q: float) -> float:
    """A quantile of a histogram, as Prometheus' histogram_quantile: it assumes even spread within a bucket.

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
