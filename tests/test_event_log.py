"""What is logged and reported when endpoints and configs change."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gateway.config import Config, Finding, Loaded, Severity
from gateway.event_log import EventLog
from gateway.hooks import ConfigChanged, EndpointChanged, NoHooks
from gateway.upstream.endpoint import Endpoint, State

UNUSED: Any = None


class Reports(NoHooks):
    def __init__(self) -> None:
        self.events: list[EndpointChanged | ConfigChanged] = []

    def endpoint_changed(self, event: EndpointChanged) -> None:
        self.events.append(event)

    def config_changed(self, event: ConfigChanged) -> None:
        self.events.append(event)


@pytest.mark.parametrize(
    ("state", "reason", "models", "line"),
    [
        (State.READY, "", {("net", ""): True}, "INFO endpoint u/t:1 is ready"),
        (State.READY, "", {("a", ""): True, ("b", "2"): False}, "INFO endpoint u/t:1 is ready (models not ready: b)"),
        (State.SUSPECT, "it was cut", {}, "WARNING endpoint u/t:1 is suspect: it was cut"),
        (State.DOWN, "refused", {}, "WARNING endpoint u/t:1 is down: refused"),
    ],
    ids=["ready", "a model is missing", "suspect", "down"],
)
def test_an_endpoints_change_is_one_line_and_one_event(
    caplog: pytest.LogCaptureFixture, state: State, reason: str, models: dict[tuple[str, str], bool], line: str
) -> None:
    caplog.set_level(logging.INFO)
    reports, endpoint = Reports(), Endpoint("u", "t:1", UNUSED)
    endpoint.state, endpoint.reason, endpoint.models = state, reason, models
    EventLog(reports).endpoint_changed(endpoint)
    assert [f"{record.levelname} {record.getMessage()}" for record in caplog.records] == [line]
    [event] = reports.events
    assert isinstance(event, EndpointChanged)
    assert (event.ready, event.models) == (state is State.READY, tuple(n for (n, _), ok in models.items() if ok))


def test_a_config_in_force_and_a_refused_one_are_told_with_their_findings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reports = Reports()
    config = Config.model_validate({"upstreams": {"u": {"endpoints": ["t:1"]}}, "direct": {"models": "all"}})
    finding = Finding("gateway.yaml", 3, "listen", "changes only with a restart", "", Severity.NOTICE)
    events = EventLog(reports)
    events.config_in_force(Loaded(config, "gateway.yaml", "0123456789abcdef"), (finding,))
    events.config_refused("gateway.yaml", (finding,))
    told = [(event.accepted, event.findings) for event in reports.events if isinstance(event, ConfigChanged)]
    assert told == [(True, (str(finding),)), (False, (str(finding),))]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "ERROR"]
