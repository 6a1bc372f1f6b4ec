"""What an on-call person is told to look at, and how bad it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from gateway.admin.alerts import notices

ENDPOINT = {"address": "t-0:8001", "state": "ready", "reason": "", "in_flight": 0, "models": {"a": True, "b": True}}
WELL: dict[str, Any] = {
    "ready": True,
    "draining": False,
    "models": {
        "photos": {
            "ready": True,
            "shares": {"trt": 3, "onnx": 1},
            "fallback": None,
            "variants": {
                "trt": {"upstream": "gpu", "model": "a", "version": "", "ready": True},
                "onnx": {"upstream": "gpu", "model": "b", "version": "", "ready": True},
            },
        }
    },
    "pipelines": {"labelled": {"ready": True, "calls": ["photos"]}},
    "upstreams": {"gpu": [ENDPOINT, {**ENDPOINT, "address": "t-1:8001"}]},
    "names": {"t:8001": {"addresses": ["t-0:8001"], "failure": None}},
    "traffic": {"windows": [{"models": {"photos": {"calls": 1000, "errors": {}, "fallbacks": 0, "queue_full": 0}}}]},
}
ACCEPTED = {"time": "2026-01-01T00:00:00", "source": "g.yaml", "digest": "d1", "accepted": True, "findings": []}
CONFIG = {"current": ACCEPTED, "last_refused": None, "changes": [ACCEPTED]}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The state of a gateway that is well, but for one value."""
    state = copy.deepcopy(WELL)
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return state


def told(state: dict[str, Any], config: dict[str, Any] = CONFIG) -> list[tuple[str, str, str, str]]:
    return [(n["severity"], n["kind"], n["name"], n["text"]) for n in notices(state, config)]


def test_a_gateway_that_is_well_needs_no_attention():
    assert told(WELL) == []


VARIANT = ("models", "photos", "variants")
ROLLOUT = {"name": "int8", "model": "photos", "state": "running", "reason": "", "trouble": ""}
CALLED = ("traffic", "windows", 0, "models", "photos")


@pytest.mark.parametrize(
    ("state", "notice"),
    [
        (changed("ready", to=False), ("error", "gateway", "", "is not ready: no endpoint has answered")),
        (
            changed("draining", to=True),
            ("warning", "gateway", "", "is draining: it finishes what is in flight and ends"),
        ),
        (
            changed("memory", to={"step": 1, "refuses": "large ones are refused", "bytes": 88, "limit_bytes": 100}),
            ("error", "gateway", "", "88% of the memory is in use: large ones are refused"),
        ),
        (
            changed("store", to={"away": "refused", "dropped": {"full": 2}, "waiting": 3, "reports_refused": 1}),
            ("warning", "gateway", "", "the store of experiments is away, 3 records wait, 3 are lost: refused"),
        ),
        (
            changed("experiments", to=[{"name": "spring", "model": "photos", "sample_ratio_mismatched": True}]),
            ("warning", "model", "photos", "experiment spring is void: units do not come to its arms as planned"),
        ),
        (
            changed(
                "experiments",
                to=[
                    {
                        "name": "spring",
                        "model": "photos",
                        "sample_ratio_mismatched": False,
                        "bandit": {"trouble": "the store is away: gone"},
                    }
                ],
            ),
            ("warning", "model", "photos", "shares of experiment spring stay as they are: the store is away: gone"),
        ),
        (
            changed(
                "experiments",
                to=[
                    {
                        "name": "spring",
                        "model": "photos",
                        "sample_ratio_mismatched": False,
                        "verdict": {
                            "guardrails": [
                                {"state": "held", "text": "errors of 'trt'"},
                                {"state": "breached", "text": "latency of 'trt': 2 against 1"},
                            ]
                        },
                    }
                ],
            ),
            (
                "warning",
                "model",
                "photos",
                "experiment spring: guardrail breached: latency of 'trt': 2 against 1",
            ),
        ),
        (
            changed("rollouts", to=[{**ROLLOUT, "state": "rolled back", "reason": "it is slow"}]),
            ("warning", "model", "photos", "rollout int8 is rolled back: it is slow"),
        ),
        (
            changed("rollouts", to=[{**ROLLOUT, "trouble": "the store is away: refused"}]),
            ("warning", "model", "photos", "rollout int8: the store is away: refused"),
        ),
        (changed("workers", to={"0": {"ready": True}, "1": {}}), ("warning", "gateway", "", "workers not serving: 1")),
        (
            changed(*VARIANT, "trt", "ready", to=False),
            ("warning", "model", "photos", "variant trt (75%) is unavailable; its calls fall back to another"),
        ),
        (
            changed("pipelines", "labelled", "ready", to=False),
            ("error", "model", "labelled", "a model it calls can't answer: photos"),
        ),
        (
            changed("upstreams", "gpu", 0, to={**ENDPOINT, "state": "down", "reason": "refused"}),
            ("warning", "endpoint", "gpu/t-0:8001", "is down: refused"),
        ),
        (
            changed("upstreams", "gpu", 0, to={**ENDPOINT, "models": {"a": True, "b": False}}),
            ("warning", "endpoint", "gpu/t-0:8001", "models not ready: b"),
        ),
        (
            changed("upstreams", "gpu", 0, to={**ENDPOINT, "ejected": ["a"]}),
            ("warning", "endpoint", "gpu/t-0:8001", "is left alone for models that its peers answer: a"),
        ),
        (
            changed("upstreams", "gpu", 0, to={**ENDPOINT, "probed": {"a": "CUDA error", "b": "well"}}),
            ("warning", "endpoint", "gpu/t-0:8001", "probe inferences of a fail: CUDA error"),
        ),
        (
            changed(*VARIANT, "trt", "breaker", to="tripped"),
            ("warning", "model", "photos", "the breaker of variant trt is tripped: its calls go to others"),
        ),
        (
            changed(*VARIANT, "trt", "breaker", to="probing"),
            ("warning", "model", "photos", "the breaker of variant trt is probing: a part of its calls goes to others"),
        ),
        (
            changed("models", "photos", "retries_left", to=0),
            ("warning", "model", "photos", "retries are used up: a caller's failed calls are not sent again"),
        ),
        (
            changed("limits", to=[{"upstream": "gpu", "model": "a", "limit": 2, "waiting": 3}]),
            ("warning", "model", "gpu/a", "3 calls wait: at most 2 are in flight"),
        ),
        (changed("upstreams", "gpu", to=[]), ("error", "upstream", "gpu", "no address is known")),
        (
            changed("names", "t:8001", "failure", to="no such name"),
            ("warning", "upstream", "t:8001", "looking the name up failed: no such name"),
        ),
        (
            changed(*CALLED, "errors", to={"UNAVAILABLE": 10, "NOT_FOUND": 500}),
            ("warning", "model", "photos", "1% of the calls failed (UNAVAILABLE)"),
        ),
        (
            changed(*CALLED, "errors", to={"UNAVAILABLE": 50, "INTERNAL": 50}),
            ("error", "model", "photos", "10% of the calls failed (UNAVAILABLE, INTERNAL)"),
        ),
        (changed(*CALLED, "fallbacks", to=3.0), ("warning", "model", "photos", "3 calls moved on to another variant")),
        (changed(*CALLED, "queue_full", to=2.0), ("warning", "model", "photos", "a queue was full 2 times")),
    ],
    ids=lambda value: value[3][:30] if isinstance(value, tuple) else "",
)
def test_each_thing_that_is_not_well_is_told_once(state, notice):
    assert told(state) == [notice]


def test_few_failures_and_the_caller_s_own_are_nobody_s_alarm():
    assert told(changed(*CALLED, "errors", to={"UNAVAILABLE": 9, "INVALID_ARGUMENT": 900})) == []


def test_a_variant_without_a_share_may_be_away():
    state = changed(*VARIANT, "trt", "ready", to=False)
    state["models"]["photos"]["shares"] = {"onnx": 1}
    assert told(state) == []


def test_a_variant_whose_fallback_is_forbidden_fails_its_calls():
    state = changed(*VARIANT, "trt", "ready", to=False)
    state["models"]["photos"]["fallback"] = []
    assert told(state) == [("warning", "model", "photos", "variant trt (75%) is unavailable; its calls fail")]


def test_errors_come_before_warnings():
    state = changed("upstreams", "gpu", to=[{**ENDPOINT, "state": "down", "reason": "refused"}])
    for variant in state["models"]["photos"]["variants"].values():
        variant["ready"] = False
    assert [severity for severity, *_ in told(state)] == ["error", "error", "warning"]


def test_a_refused_config_is_told_until_a_good_one_comes():
    refused = {**ACCEPTED, "accepted": False, "digest": "", "findings": ["g.yaml:1: workers: is many"]}
    text = "file was refused, the one before stays in force: g.yaml:1: workers: is many"
    assert told(WELL, {**CONFIG, "changes": [refused, ACCEPTED]}) == [("warning", "config", "", text)]
    assert told(WELL, {**CONFIG, "changes": [ACCEPTED, refused]}) == []


def test_workers_that_run_different_configs_are_told():
    assert told(WELL, {**CONFIG, "current": None}) == [("warning", "config", "", "differs between workers")]
