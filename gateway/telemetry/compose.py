"""Telemetry: several listeners behind the one `Hooks` that the core is given.

May depend on values only. It must not know what its listeners do, except for one thing: a listener that starts a trace
says so with a `TracedCall`, so that those after it can name the same trace.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from gateway.hooks import (
    AttemptEnded,
    AttemptStarted,
    CallEnded,
    CallObserver,
    CallStarted,
    ConfigChanged,
    EndpointChanged,
    Hooks,
    NoHooks,
    NoObserver,
    StepEnded,
)
from gateway.types import Metadata

_log = logging.getLogger(__name__)

NOBODY = NoObserver()
"""For a listener that does not care about this call. It is left out, so it costs nothing while the call runs."""


class TracedCall(NoObserver):
    """An observer that gave its call a place in a trace; `traceparent` is that place, in W3C form."""

    traceparent: str


def compose(listeners: Sequence[Hooks]) -> Hooks:
    """Make one listener of several, which hear everything in the given order.

    A listener that raises, against its contract, is logged once and never disturbs the call or the other listeners.
    A listener whose observer is a `TracedCall` must come before those that want to see the traceparent: they get the
    call's facts as if the caller had sent it.
    """
    return _Together(tuple(listeners)) if listeners else NoHooks()


class _Together:
    def __init__(self, listeners: tuple[Hooks, ...]) -> None:
        self._listeners = listeners
        self._reported: set[str] = set()

    def call_started(self, event: CallStarted) -> CallObserver:
        observers: list[CallObserver] = []
        for listener in self._listeners:
            try:
                observer = listener.call_started(event)
            except Exception:
                self.failed(listener)
                continue
            if type(observer) is NoObserver:
                continue
            observers.append(observer)
            if isinstance(observer, TracedCall):
                event = _with_traceparent(event, observer.traceparent)
        return _Call(self, observers) if observers else NOBODY

    def endpoint_changed(self, event: EndpointChanged) -> None:
        for listener in self._listeners:
            try:
                listener.endpoint_changed(event)
            except Exception:
                self.failed(listener)

    def config_changed(self, event: ConfigChanged) -> None:
        for listener in self._listeners:
            try:
                listener.config_changed(event)
            except Exception:
                self.failed(listener)

    def failed(self, listener: object) -> None:
        """Called while the exception is being handled, so that the log has its stack."""
        name = type(listener).__name__
        if name not in self._reported:
            self._reported.add(name)
            _log.exception("telemetry: %s failed; calls go on, further failures of it are not logged", name)


class _Call:
    __slots__ = ("_observers", "_owner")

    def __init__(self, owner: _Together, observers: list[CallObserver]) -> None:
        self._owner = owner
        self._observers = observers

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        metadata: Metadata = ()
        for observer in self._observers:
            try:
                added = observer.attempt_started(event)
            except Exception:
                self._owner.failed(observer)
                continue
            if added:
                metadata = (*metadata, *added)
        return metadata

    def attempt_ended(self, event: AttemptEnded) -> None:
        for observer in self._observers:
            try:
                observer.attempt_ended(event)
            except Exception:
                self._owner.failed(observer)

    def step_ended(self, event: StepEnded) -> None:
        for observer in self._observers:
            try:
                observer.step_ended(event)
            except Exception:
                self._owner.failed(observer)

    def ended(self, event: CallEnded) -> None:
        for observer in self._observers:
            try:
                observer.ended(event)
            except Exception:
                self._owner.failed(observer)


def _with_traceparent(event: CallStarted, traceparent: str) -> CallStarted:
    metadata = {**event.facts.metadata, "traceparent": traceparent}
    return dataclasses.replace(event, facts=dataclasses.replace(event.facts, metadata=metadata))
