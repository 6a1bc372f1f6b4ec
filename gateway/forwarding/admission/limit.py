"""How many calls may be in flight at servers that refuse what is too much: found out by what more, or fewer, bring.

It is the gradient of Envoy's adaptive concurrency filter, with its base found in another way:

    limit' = limit * min(1, TOLERANCE * base / latency) + sqrt(limit)

`base` is the latency at the knee of the throughput, where fewer calls in flight would bring fewer answers. Envoy
measures it with three calls in flight; Vegas (as in Netflix' concurrency-limits) takes the least latency ever seen.
Both take it for queueing when a server that batches is slower at the load it is made for, and hold it far below that.
So here the limit is halved until throughput falls, and what is compared is measured with limits that differ by a third
at least: a lower latency counts if it costs no throughput, a higher one if it brings some. The
search is repeated, because models change. Pure: instants are arguments, in seconds.

sources: Envoy, `envoy.filters.http.adaptive_concurrency` (gradient controller); Netflix concurrency-limits,
`VegasLimit` and `Gradient2Limit`; for the knee Kleinrock (1979), and BBR (Cardwell et al. 2016).
"""

from __future__ import annotations

import math
from typing import Final

_TOLERANCE: Final = 1.5  # times the latency at the knee; Gradient2's
_LEAST_ANSWERS: Final = 20  # in a window; their mean is then off by a quarter, if service times are exponential
_LEAST_SECONDS: Final = 0.1  # of a window: a server that batches answers in bursts
_FOLLOWED: Final = 0.1  # weight of the last answer in what is known of latencies
_LONG_SECONDS: Final = 1.0  # of a window, after which half as many answers must do
_APART: Final = 0.7  # limits that differ by this factor can be compared
_SAME: Final = 0.85  # of the throughput: what noise costs
_MORE: Final = 1.15  # times the throughput: what noise does not bring
_BACK_OFF: Final = 0.95  # when the server refuses; at most once in a window
_RISE: Final = 1.05  # times what was refused, after each window without a refusal: to ask again costs one
_SEARCH_SECONDS: Final = 30.0  # from one search for the knee to the next: it costs a window below the knee
_MOST: Final = 10_000


class AdaptiveLimit:
    """Adapts `limit` for as long as it is reached."""

    __slots__ = (
        "_answers",
        "_base",
        "_began",
        "_ceiling",
        "_deviation",
        "_is_searching",
        "_knee",
        "_knee_rate",
        "_latencies",
        "_reached",
        "_refused",
        "_search_at",
        "_value",
        "latency",
        "limit",
        "long_latency",
        "rate",
    )

    def __init__(self, limit: int, now: float) -> None:
        """limit: with which the servers are known to be busy."""
        self.limit = max(limit, 1)
        self.latency = 0.0  # seconds, mean of the last ones; 0 before there is one
        self._deviation = 0.0  # mean absolute one
        self.long_latency = 0.0  # one in twenty answers takes longer
        self.rate = 0.0  # answers per second in the last window; 0 before it
        self._value = float(self.limit)
        self._ceiling = float(_MOST)  # what servers have refused, and some way back up
        self._base = math.inf
        self._knee = 0.0  # a limit, and the throughput that it brought, to compare with
        self._knee_rate = 0.0
        self._is_searching = True
        self._search_at = now
        # This window
        self._began = now
        self._answers = 0
        self._latencies = 0.0
        self._reached = 0  # calls that had to wait
        self._refused = False

    def reached(self) -> None:
        """A call has to wait."""
        self._reached += 1

    def refused(self) -> None:
        """A server had no room for a call."""
        if not self._refused:
            self._refused = True
            self._ceiling = max(self._value * _BACK_OFF, 1.0)
            self._set(self._value)

    def answered(self, latency: float, now: float) -> None:
        """A call went well."""
        self._answers += 1
        self._latencies += latency
        self._follow(latency)
        seconds = now - self._began
        enough = _LEAST_ANSWERS if seconds < _LONG_SECONDS else _LEAST_ANSWERS // 2
        if self._answers >= max(enough, self.limit) and seconds >= _LEAST_SECONDS:
            if 2 * self._reached >= self._answers:  # else it is the callers' pace that was measured
                self.rate = self._answers / seconds
                self._adapt(self._latencies / self._answers, now)
            self._restart(now)

    def _follow(self, latency: float) -> None:
        """Exponentially weighted mean and deviation, as TCP has them of round trips (RFC 6298)."""
        if not self.latency:
            self.latency, self._deviation = latency, latency / 2.0
        self._deviation += (abs(latency - self.latency) - self._deviation) * _FOLLOWED
        self.latency += (latency - self.latency) * _FOLLOWED
        self.long_latency = self.latency + 2.0 * self._deviation

    def _restart(self, now: float) -> None:
        self._began, self._answers, self._latencies = now, 0, 0.0
        self._reached, self._refused = 0, False

    def _adapt(self, latency: float, now: float) -> None:
        value = self._value
        if not self._refused:
            self._ceiling = min(self._ceiling * _RISE, float(_MOST))
        if self._compare(value, latency):
            return
        if now - self._search_at >= _SEARCH_SECONDS:
            self._is_searching, self._search_at = True, now
            self._knee, self._knee_rate = value, self.rate
        if self._is_searching and value > 1.0:
            self._set(value / 2.0)
            return
        self._is_searching = False
        self._set(value * max(0.5, min(1.0, _TOLERANCE * self._base / latency)) + math.sqrt(value))

    def _compare(self, value: float, latency: float) -> bool:
        """Learn where the knee is. Is the limit set by that?"""
        knee = self._knee
        if not knee:
            self._knee, self._knee_rate, self._base = value, self.rate, latency
        elif value <= knee * _APART:
            if self.rate >= self._knee_rate * _SAME:
                self._knee, self._base = value, latency
                self._knee_rate = max(self._knee_rate, self.rate)
            else:  # too few: the latency of more was no queueing
                self._base = max(self._base, latency)
                was_searching, self._is_searching = self._is_searching, False
                self._knee_rate = self._knee_rate if was_searching else self.rate
                self._set(knee)
                if not was_searching:
                    self._knee = value
                return True
        elif value * _APART >= knee and self.rate >= self._knee_rate * _MORE:
            self._knee, self._knee_rate, self._base = value, self.rate, max(self._base, latency)
        return False

    def _set(self, value: float) -> None:
        self._value = max(min(value, self._ceiling), 1.0)
        self.limit = int(self._value)
