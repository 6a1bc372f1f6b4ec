"""Telemetry: what one model's calls by one method add to its series, counted in plain numbers until they are flushed.

May depend on values and the metric families. What callers invent becomes the label `other`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from gateway.hooks import AttemptEnded, AttemptStarted, CallHistory, StepEnded
from gateway.status import OK, Code, Meaning, is_server_fault
from gateway.telemetry.families import Families
from gateway.telemetry.tally import Count, Times

OTHER: Final = "other"
"""Label of models that are not configured, and of all values beyond a limit."""

REPLAYED_LABEL: Final = "replayed"
"""Model label of requests that were captured and are sent again."""


class BoundedLabel:
    """Passes on the first `limit` distinct values, and replaces all others by `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value

    def forget(self, value: str) -> None:
        self._seen.discard(value)

    def known(self, value: str) -> str:
        """Passes a value on if it has been before: callers may have invented it."""
        return value if value in self._seen else OTHER


class Series:
    """All counts of one model and method."""

    def __init__(self, families: Families, endpoints: BoundedLabel, model: str, method: str) -> None:
        self._families = families
        self._endpoints = endpoints
        self._model = model
        self._method = method
        self._is_other = model in (OTHER, REPLAYED_LABEL)  # then callers may have invented the names of variants too
        self.has_moved = False  # since the last flush
        self.started = self._ended = self._shown_in_flight = 0  # calls
        self._in_flight = families.in_flight.labels(model)
        self._overhead = Times(families.overhead.labels(model))
        self._request_bytes = Count(families.request_bytes.labels(model))
        self._response_bytes = Count(families.response_bytes.labels(model))
        self._ends: dict[tuple[str, Code], tuple[Count, Times]] = {}
        self._attempts: dict[tuple[str, str, str, Meaning | None], tuple[Count, Times]] = {}

    def call_ended(self, call: CallHistory) -> None:
        start, end, attempts, outcomes = call.start, call.end, call.attempts, call.outcomes
        self._ended += 1
        elsewhere = end.waited  # seconds spent in upstreams and steps, and waiting
        for attempt, outcome in zip(attempts, outcomes):  # noqa: B905  # the last one may have no outcome
            took = outcome.at - attempt.at
            elsewhere += took
            variant = attempt.variant if not self._is_other else OTHER
            where = (variant, attempt.upstream, attempt.endpoint, outcome.meaning)
            count, times = self._attempts.get(where) or self._attempt(*where)
            count.total += 1
            times.observe(took)
        if attempts and attempts[0].model != self._model and not self._is_other:
            self._called(attempts, outcomes)
        took = end.at - start.at
        variant = end.served.variant if end.served else attempts[-1].variant if attempts else ""
        if self._is_other:
            variant = OTHER if variant else ""
        count, times = self._ends.get((variant, end.code)) or self._end(variant, end.code)
        count.total += 1
        times.observe(took)
        if call.steps:
            elsewhere += self._steps(call.steps)
        self._overhead.observe(took - elsewhere if took > elsewhere else 0.0)
        self._request_bytes.total += end.request_bytes
        self._response_bytes.total += end.response_bytes
        if len(attempts) > 1 or end.code is not OK or (attempts and attempts[0].instead_of):
            self._unusual(call)

    def _unusual(self, call: CallHistory) -> None:
        """Count fallbacks, full queues, and failures by who is at fault."""
        for attempt in call.attempts:
            if attempt.instead_of:
                names = (OTHER, OTHER) if self._is_other else (attempt.instead_of, attempt.variant)
                self._families.fallbacks.labels(self._model, *names, attempt.reason).inc()
        for outcome in call.outcomes:
            if outcome.meaning is Meaning.OVERLOADED:
                self._families.queue_full.labels(self._model, "upstream").inc()
        meaning = call.outcomes[-1].meaning if call.outcomes else None
        failed = meaning is not None
        if is_server_fault(call.end.code, meaning) and not call.end.callers_fault:
            self._families.server_faults.labels(self._model, call.end.code.name).inc()
        if call.end.code is Code.RESOURCE_EXHAUSTED and not failed and not call.end.callers_fault:
            # No upstream reported it, and it is no quota.
            self._families.queue_full.labels(self._model, "gateway").inc()

    def _called(self, attempts: Sequence[AttemptStarted], outcomes: Sequence[AttemptEnded]) -> None:
        """Count a pipeline's attempts by the model that it called: its variants may have names of other models' too."""
        for attempt, outcome in zip(attempts, outcomes):  # noqa: B905  # the last one may have no outcome
            told = outcome.meaning.value if outcome.meaning else "ok"
            self._families.pipeline_attempts.labels(self._model, attempt.model, attempt.variant, told).inc()

    def _steps(self, steps: Iterable[StepEnded]) -> float:
        """Count the steps. Returns the seconds that they took."""
        seconds = 0.0
        for step in steps:
            took = step.at - step.started
            if took or not step.error:  # a failure between two steps takes no time: see `PipelineModel`
                seconds += took
                self._families.step.labels(self._model, step.step).observe(took)
            if step.error:
                self._families.step_failures.labels(self._model, step.step).inc()
        return seconds

    def _end(self, variant: str, code: Code) -> tuple[Count, Times]:
        """The counters of an end (variant and code), at its first use."""
        made = self._ends[variant, code] = (
            Count(self._families.requests.labels(self._model, variant, self._method, code.name)),
            Times(self._families.duration.labels(self._model, variant, "ok" if code is OK else "error")),
        )
        return made

    def _attempt(self, variant: str, upstream: str, endpoint: str, meaning: Meaning | None) -> tuple[Count, Times]:
        """The counters of an attempt, at its first use, or for an endpoint beyond the limit."""
        endpoint = self._endpoints(endpoint)  # pods get new addresses without end, so only some have labels
        key = (variant, upstream, endpoint, meaning)
        found = self._attempts.get(key)
        if found is None:
            told = meaning.value if meaning else "ok"
            found = self._attempts[key] = (
                Count(self._families.attempts.labels(self._model, variant, upstream, endpoint, told)),
                Times(self._families.upstream.labels(self._model, variant, upstream)),
            )
        return found

    def flush(self) -> None:
        """Give the counts since the last flush to prometheus_client."""
        self.has_moved = False  # first, since calls go on: their changes set it again
        ended = self._ended  # read before `started`, which is never smaller
        in_flight = self.started - ended
        self._in_flight.inc(in_flight - self._shown_in_flight)  # all methods of the model share the gauge
        self._shown_in_flight = in_flight
        for number in (self._request_bytes, self._response_bytes, self._overhead):
            number.flush()
        for count, times in (*self._ends.values(), *self._attempts.values()):
            count.flush()
            times.flush()
