"""quotas (pure): who used how much of which model, counted as calls end."""

from __future__ import annotations

from typing import Final

from gateway.hooks import CallHistory, NoListener, UsageNow
from gateway.quotas.quotas import OTHERS, Quotas
from gateway.status import OK, Code

_MOST_PAIRS: Final = 20_000  # callers times models in one interval; further callers are counted together, by model
_MOST_SERIES: Final = 5_000  # of metrics; further ones are counted together

Pair = tuple[str, str]
"""A caller and a model; "" for a caller without a name, and for a model that the config does not know."""


class Used:
    """By one caller, of one model."""

    __slots__ = ("failed", "refused", "request_bytes", "requests", "response_bytes", "rows", "seconds")

    def __init__(self) -> None:
        self.requests = 0  # answered
        self.failed = 0
        self.refused = 0  # by a quota
        self.rows = 0
        self.request_bytes = 0
        self.response_bytes = 0
        self.seconds = 0.0  # of attempts at upstreams

    def add(self, other: Used) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.refused += other.refused
        self.rows += other.rows
        self.request_bytes += other.request_bytes
        self.response_bytes += other.response_bytes
        self.seconds += other.seconds


class UsageCounts(NoListener):
    """Counts; only the event loop's thread does."""

    def __init__(self, quotas: Quotas) -> None:
        """quotas: that know a caller by its metadata."""
        self._quotas = quotas
        self._total: dict[Pair, Used] = {}  # of what was taken, by labels
        self._interval: dict[Pair, Used] = {}

    def call_ended(self, call: CallHistory) -> None:
        start, end = call.start, call.end
        pair = (self._quotas.name_of(start.facts.metadata), start.model if start.known else "")
        used = self._interval.get(pair)
        if used is None:
            if len(self._interval) >= _MOST_PAIRS and not self._quotas.is_named(pair[0]):
                pair = (OTHERS, pair[1])
            used = self._interval.setdefault(pair, Used())
        attempts, outcomes = call.attempts, call.outcomes
        for number in range(min(len(attempts), len(outcomes))):  # the last one may have no outcome
            used.seconds += outcomes[number].at - attempts[number].at
        if end.code is OK:
            used.requests += 1
            used.rows += start.rows
            used.request_bytes += end.request_bytes
            used.response_bytes += end.response_bytes
        elif end.code is Code.RESOURCE_EXHAUSTED and end.callers_fault:
            used.refused += 1
        else:
            used.failed += 1

    def take(self) -> dict[Pair, Used]:
        """What was used since the last time. Only the event loop's thread may do this."""
        interval, self._interval = self._interval, {}
        for pair, used in interval.items():
            self._series(pair).add(used)
        return interval

    def _series(self, pair: Pair) -> Used:
        """The numbers of a pair with a label of its own, or of the others."""
        caller, model = pair
        if caller and not self._quotas.is_named(caller):
            pair = (OTHERS, model)
        if pair not in self._total and len(self._total) >= _MOST_SERIES:
            pair = (OTHERS, OTHERS)
        return self._total.setdefault(pair, Used())

    def now(self) -> list[UsageNow]:
        """What was used since the start, as far as it was taken. May be asked from any thread."""
        return [
            UsageNow(pair[0], pair[1], used.requests, used.rows, used.request_bytes, used.response_bytes, used.seconds)
            for pair, used in list(self._total.items())
        ]
