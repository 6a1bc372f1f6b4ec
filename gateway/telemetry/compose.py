"""Telemetry: several listeners behind the one `Hooks` that the core is given.

May depend on values only. It must not know what its listeners do, with one exception: a listener that starts a trace
says so with a `TracedCall`, so that later listeners can name the same trace.

A call is remembered while it runs, and reported as a whole when it has ended. Only a listener that answers
`call_started` with an observer hears of it while it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from mypy_extensions import mypyc_attr

from gateway.hooks import (
    AttemptEnded,
    AttemptMerged,
    AttemptStarted,
    BreakerChanged,
    CallEnded,
    CallHistory,
    CallObserver,
    CallStarted,
    ConfigChanged,
    ConnectionFull,
    EndpointChanged,
    EndpointEjected,
    Hooks,
    Listener,
    NoHooks,
    NoListener,
    NoObserver,
    RetryRefused,
    StepEnded,
)
from gateway.status import Code
from gateway.types import Facts, Metadata

_log = logging.getLogger(__name__)

_UNENDED: Final = CallEnded(Code.UNKNOWN, "", None, 0, 0, 0.0)  # of a call that nobody has seen end


@mypyc_attr(allow_interpreted_subclasses=True)
class TracedCall(NoObserver):
    """An observer that put its call into a trace. `traceparent` is the call's place in the trace, in W3C form."""

    traceparent: str


def compose(listeners: Sequence[Listener]) -> Hooks:
    """Make one listener of several, which hear all events in the given order.

    A listener that raises, against its contract, is logged once and never disturbs the call or the other listeners.
    A listener whose observer is a `TracedCall` must come before those that want to see the traceparent: they get the
    call's facts as if the caller had sent it.
    """
    return _Together(tuple(listeners)) if listeners else NoHooks()


class _Together(Hooks):
    def __init__(self, listeners: tuple[Listener, ...]) -> None:
        self._listeners = listeners
        self.traces = any(isinstance(each, NoListener) and each.traces for each in listeners)
        # Calls are many, so a listener without interest in them is not called.
        self._at_starts = [each for each in listeners if _cares(each, "call_started")]
        self._at_ends = [each for each in listeners if _cares(each, "call_ended")]
        self._reported: set[str] = set()

    def call_started(self, event: CallStarted) -> CallObserver:
        observers: list[CallObserver] | None = None
        for listener in self._at_starts:
            try:
                observer = listener.call_started(event)
            except Exception:
                self.failed(listener)
                continue
            if observer is not None:
                observers = [*(observers or ()), observer]
                if isinstance(observer, TracedCall):
                    event = _with_traceparent(event, observer.traceparent)
        return _Call(self, event, observers)

    def tell_ended(self, call: CallHistory) -> None:
        for listener in self._at_ends:
            try:
                listener.call_ended(call)
            except Exception:
                self.failed(listener)

    def endpoint_changed(self, event: EndpointChanged) -> None:
        self.tell(self._listeners, "endpoint_changed", event)

    def endpoint_ejected(self, event: EndpointEjected) -> None:
        self.tell(self._listeners, "endpoint_ejected", event)

    def breaker_changed(self, event: BreakerChanged) -> None:
        self.tell(self._listeners, "breaker_changed", event)

    def retry_refused(self, event: RetryRefused) -> None:
        self.tell(self._listeners, "retry_refused", event)

    def config_changed(self, event: ConfigChanged) -> None:
        self.tell(self._listeners, "config_changed", event)

    def connection_full(self, event: ConnectionFull) -> None:
        self.tell(self._listeners, "connection_full", event)

    def tell(self, hearers: Iterable[Listener | CallObserver], method: str, event: object) -> None:
        """Call the method of this name of each listener."""
        for hearer in hearers:
            try:
                getattr(hearer, method)(event)
            except Exception:
                self.failed(hearer)

    def failed(self, listener: object) -> None:
        """Log a failure. Called while the exception is handled, so that the log has its stack."""
        name = type(listener).__name__
        if name not in self._reported:
            self._reported.add(name)
            _log.exception("telemetry: %s failed; calls go on, further failures of it are not logged", name)


class _Call(CallHistory, CallObserver):
    """The events of one call, kept until it has ended."""

    __slots__ = ("observers", "owner")

    def __init__(self, owner: _Together, start: CallStarted, observers: list[CallObserver] | None) -> None:
        """observers: hear the events at once; nearly always there are none."""
        self.start = start
        self.attempts = []
        self.outcomes = []
        self.steps = ()
        self.end = _UNENDED
        self.owner = owner
        self.observers = observers

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        self.attempts.append(event)
        if self.observers is None:
            return ()
        metadata: Metadata = ()
        for observer in self.observers:
            try:
                added = observer.attempt_started(event)
            except Exception:
                self.owner.failed(observer)
                continue
            if added:
                metadata = (*metadata, *added)
        return metadata

    def attempt_merged(self, event: AttemptMerged) -> None:
        self.owner.tell(self.observers or (), "attempt_merged", event)

    def attempt_ended(self, event: AttemptEnded) -> None:
        self.outcomes.append(event)
        if self.observers is not None:
            self.owner.tell(self.observers, "attempt_ended", event)

    def step_ended(self, event: StepEnded) -> None:
        self.steps = (*self.steps, event)
        self.owner.tell(self.observers or (), "step_ended", event)

    def ended(self, event: CallEnded) -> None:
        self.end = event
        if self.observers is not None:
            self.owner.tell(self.observers, "ended", event)
        self.owner.tell_ended(self)


def _cares(listener: Listener, method: str) -> bool:
    return getattr(type(listener), method) is not getattr(NoListener, method)


def _with_traceparent(event: CallStarted, traceparent: str) -> CallStarted:
    facts = event.facts
    placed = Facts({**facts.metadata, "traceparent": traceparent}, facts.parameters, facts.version)
    return CallStarted(
        event.method, event.model, event.known, event.request_id, event.peer, event.at, placed, event.rows
    )
