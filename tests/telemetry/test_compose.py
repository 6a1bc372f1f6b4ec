"""Several listeners behave as one, and none can disturb a call."""

from __future__ import annotations

import logging

import pytest

from gateway.hooks import (
    AttemptEnded,
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
    NoHooks,
    NoListener,
    RetryRefused,
    StepEnded,
)
from gateway.status import Code
from gateway.telemetry.compose import TracedCall, compose
from gateway.types import Metadata


class Listener:
    """Notes what it hears and asks for metadata upstream; each of its parts can be made to raise."""

    def __init__(self, name="a", raises_in=""):
        self.name, self.raises_in, self.heard, self.traceparents, self.histories = name, raises_in, [], [], []

    def note(self, what):
        if what == self.raises_in:
            raise RuntimeError("a defect in " + what)
        self.heard.append(what)

    def call_started(self, event: CallStarted) -> CallObserver:
        self.note("call_started")
        self.traceparents.append(event.facts.metadata.get("traceparent"))
        return Observer(self)

    def call_ended(self, call: CallHistory) -> None:
        self.note("call_ended")
        self.histories.append(call)

    def endpoint_changed(self, event: EndpointChanged) -> None:
        self.note("endpoint_changed")

    def config_changed(self, event: ConfigChanged) -> None:
        self.note("config_changed")

    def connection_full(self, event: ConnectionFull) -> None:
        self.note("connection_full")

    def endpoint_ejected(self, event: EndpointEjected) -> None:
        self.note("endpoint_ejected")

    def breaker_changed(self, event: BreakerChanged) -> None:
        self.note("breaker_changed")

    def retry_refused(self, event: RetryRefused) -> None:
        self.note("retry_refused")


class Observer:
    def __init__(self, listener):
        self.listener = listener

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        self.listener.note("attempt_started")
        return (("x-from", self.listener.name),)

    def attempt_ended(self, event: AttemptEnded) -> None:
        self.listener.note("attempt_ended")

    def step_ended(self, event: StepEnded) -> None:
        self.listener.note("step_ended")

    def ended(self, event: CallEnded) -> None:
        self.listener.note("ended")


CALL = ["call_started", "step_ended", "attempt_started", "attempt_ended", "ended", "call_ended"]
ENDPOINT = EndpointChanged("cpu", "cpu-0:8001", True, ("m",), "probe", 1.0)
CONFIG = ConfigChanged("gateway.yaml", "abc", True, (), 1.0)
FULL = ConnectionFull("10.0.0.9:5", 1000)
EJECTED = EndpointEjected("cpu", "cpu-0:8001", "m", 5.0, 1.0)
THE_REST = [
    "endpoint_changed",
    "config_changed",
    "connection_full",
    "endpoint_ejected",
    "breaker_changed",
    "retry_refused",
]


def tell_the_rest(hooks: Hooks) -> None:
    hooks.endpoint_changed(ENDPOINT)
    hooks.config_changed(CONFIG)
    hooks.connection_full(FULL)
    hooks.endpoint_ejected(EJECTED)
    hooks.breaker_changed(BreakerChanged("m", "gpu", "tripped", 1.0))
    hooks.retry_refused(RetryRefused("m"))


def test_every_listener_hears_everything_in_order(call):
    first, second = Listener("a"), Listener("b")
    hooks = compose([first, second])
    sent = call(steps=[("decode", 0.002, "")]).report_to(hooks)
    tell_the_rest(hooks)
    assert first.heard == second.heard == [*CALL, *THE_REST]
    assert sent == [(("x-from", "a"), ("x-from", "b"))]


@pytest.mark.parametrize("part", [*CALL, *THE_REST])
def test_a_listener_that_raises_disturbs_nobody_and_is_logged_once(part, call, caplog):
    broken, sound = Listener("broken", raises_in=part), Listener("sound")
    hooks = compose([broken, sound])
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            call(steps=[("decode", 0.002, "")]).report_to(hooks)
            tell_the_rest(hooks)
    assert sound.heard == 3 * [*CALL, *THE_REST]
    assert len(caplog.records) == 1
    assert "a defect in " + part in caplog.text


def test_a_listener_that_answers_no_observer_gets_the_history_when_the_call_has_ended(call, fallen_back):
    class AtTheEnd(NoListener):
        def call_ended(self, call: CallHistory) -> None:
            histories.append(call)

    histories: list[CallHistory] = []
    call(steps=[("decode", 0.002, "")], attempts=fallen_back).report_to(compose([AtTheEnd()]))
    (told,) = histories
    assert told.start.model == "photos"
    assert [step.step for step in told.steps] == ["decode"]
    assert [attempt.variant for attempt in told.attempts] == ["tensorrt", "onnx"]
    assert [outcome.code for outcome in told.outcomes] == [Code.UNAVAILABLE, Code.OK]
    assert told.end.code is Code.OK


def test_nobody_listening_is_no_hooks():
    assert isinstance(compose([]), NoHooks)


def test_listeners_after_the_one_that_traces_see_its_traceparent(call):
    class Tracing(NoListener):
        def call_started(self, event: CallStarted) -> CallObserver:
            observer = TracedCall()
            observer.traceparent = "given-here"
            return observer

    before, after = Listener(), Listener()
    call(metadata={"traceparent": "from-caller"}).report_to(compose([before, Tracing(), after]))
    assert (before.traceparents, after.traceparents) == (["from-caller"], ["given-here"])
