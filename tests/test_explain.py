"""What `explain --admin` says of a running gateway: why a call was refused, or went elsewhere."""

from __future__ import annotations

import copy
from typing import Any

from gateway.explain import explain_now, explain_quotas, quotas_now
from gateway.quotas import CallerQuota, Limits, Quotas, QuotaSettings
from gateway.types import Facts

ENDPOINT = {"address": "t-0:8001", "state": "ready", "reason": "", "models": {"a": True}, "probed": {}, "ejected": []}
WELL: dict[str, Any] = {
    "models": {
        "photos": {
            "ready": True,
            "retries_left": None,
            "variants": {
                "trt": {"upstream": "gpu", "model": "a", "version": "", "ready": True, "breaker": "admitting"}
            },
        }
    },
    "pipelines": {"labelled": {"calls": ["photos"]}},
    "limits": [],
    "upstreams": {"gpu": [ENDPOINT, {**ENDPOINT, "address": "t-1:8001"}]},
}


def test_a_model_that_is_well_has_little_to_tell() -> None:
    told = ["now: photos is ready; retries: none was needed yet", "  variant trt: ready, its breaker is admitting"]
    assert explain_now(WELL, "photos") == explain_now(WELL, "labelled") == [*told, "    calls are not limited"]


def test_what_stands_between_a_call_and_an_answer_is_told() -> None:
    state = copy.deepcopy(WELL)
    state["models"]["photos"] |= {"retries_left": 3}
    state["models"]["photos"]["variants"]["trt"]["breaker"] = "probing"
    refused = {"queue_full": 5, "late": 1}
    state["limits"] = [
        {"upstream": "gpu", "model": "a", "limit": 4, "in_flight": 4, "waiting": 2, "latency_seconds": 0.0213}
        | {"refused": refused},
        {"upstream": "gpu", "model": "b"},
    ]
    state["upstreams"]["gpu"] = [
        {**ENDPOINT, "address": "t-0", "ejected": ["a"], "ejected_for": {"a": "2 of its callers"}},
        {**ENDPOINT, "address": "t-1", "state": "down", "reason": "refused"},
        {**ENDPOINT, "address": "t-2", "probed": {"a": "CUDA error"}},
        {**ENDPOINT, "address": "t-3", "models": {"a": False}},
        ENDPOINT,
    ]
    assert explain_now(state, "photos") == [
        "now: photos is ready; retries: 3 left (of the worker and the caller with the fewest)",
        "  variant trt: ready, its breaker is probing",
        "    at most 4 calls in flight: 4 are, 2 wait; 21 ms an answer; refused since the start: 5 queue_full, 1 late",
        "    gpu/t-0 is ejected for 2 of its callers: it fails calls that its peers answer",
        "    gpu/t-1 is down: refused",
        "    gpu/t-2 fails probe inferences: CUDA error",
        "    gpu/t-3 has the model not ready",
    ]


def test_experiments_and_wrong_answers_are_told() -> None:
    state = copy.deepcopy(WELL)
    state["answers"] = [
        {"model": "photos", "variant": "trt", "results": {"fine": 8, "not_finite": 1, "contract": 1, "unchecked": 0}}
    ]
    spring = {"name": "spring", "model": "photos", "units": {"trt": 5, "int8": 4}, "sample_ratio_mismatched": True}
    state["experiments"] = [
        spring,
        {**spring, "name": "autumn", "stopped_with": "trt", "sample_ratio_mismatched": False},
    ]
    told = explain_now(state, "photos")
    looked = "of 10 answers that were looked at 1 had NaN or infinity, 1 were not as its metadata says"
    assert f"    {looked}" in told
    assert told[-2:] == [
        "  experiment spring: units by arm: trt 5, int8 4; units do not come to arms as planned",
        "  experiment autumn: units by arm: trt 5, int8 4; stopped, everybody gets 'trt'",
    ]


def test_a_model_that_the_gateway_does_not_have_is_told() -> None:
    assert explain_now(WELL, "other") == ["now: the gateway has no public model 'other'"]


def test_the_quotas_that_a_call_comes_under_and_what_is_left() -> None:
    quotas = Quotas()
    acme = CallerQuota(Limits(requests=20, concurrent=3), {"net": Limits(rows=100, burst=5)})
    quotas.apply(QuotaSettings("x-tenant", {"acme": acme}, models={"net": Limits(bytes=1000)}), None)
    assert explain_quotas(quotas, {}, "net", Facts({"x-tenant": "acme"})) == [
        "quotas of caller 'acme' at net:",
        "  this caller: 20 requests a second, 1 s' worth at once, 3 calls at a time",
        "  this caller at model net: 100 rows a second, 5 s' worth at once",
        "  model net: 1000 bytes a second, 1 s' worth at once",
    ]
    assert explain_quotas(quotas, {}, "other", Facts()) == ["quota of a caller without a name: none"]
    state = {
        "quotas": [
            {"caller": "acme", "model": "", "left": {"requests": 7.5, "concurrent": 2}, "in_flight": 1},
            {"caller": "", "model": "net", "left": {"bytes": 10}, "in_flight": 4},
            {"caller": "one", "model": "", "left": {"requests": 1}, "in_flight": 0},
        ],
        "quota_store": "away",
    }
    assert quotas_now(state, "acme", "net") == [
        "now: left to caller 'acme' of all models: 7.5 requests, 2 concurrent; 1 in flight",
        "now: left to all callers of net: 10 bytes; 4 in flight",
        "now: the store of quotas is away",
    ]
