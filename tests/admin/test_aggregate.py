"""Several workers as one: the worst of what they see, the sum of what they do."""

from __future__ import annotations

import copy
from typing import Any

from gateway.admin import merged_config, merged_state


def endpoint(address: str, state: str = "ready", in_flight: int = 0, **models: bool) -> dict[str, Any]:
    reason = "" if state == "ready" else "refused"
    return {
        "address": address,
        "state": state,
        "reason": reason,
        "in_flight": in_flight,
        "ejected": [],
        "ejected_for": {},
        "models": models,
        "warmth": 1.0,
        "latency_seconds": {},
        "probed": {},
    }


def worker(*endpoints: dict[str, Any], ready: bool = True, trt: bool = True) -> dict[str, Any]:
    variants = {"trt": {"upstream": "gpu", "model": "m", "version": "", "ready": trt}}
    return {
        "version": "1.2.3",
        "listen": "0.0.0.0:9001",
        "ready": ready,
        "draining": False,
        "models": {"photos": {"ready": trt, "shares": {"trt": 1.0}, "fallback": None, "variants": variants}},
        "pipelines": {},
        "upstreams": {"gpu": list(endpoints)},
        "names": {},
        "traffic": None,
    }


def test_an_endpoint_is_as_bad_as_any_worker_finds_it_and_its_calls_add_up():
    merged = merged_state([worker(endpoint("t:1", "ready", 2, m=True)), worker(endpoint("t:1", "down", 3, m=False))])
    assert merged["upstreams"] == {"gpu": [endpoint("t:1", "down", 5, m=False)]}


def test_an_endpoint_is_ejected_for_as_many_as_any_worker_finds():
    """Workers have met different callers."""
    found = [{"a": "2 of its callers"}, {"a": "10 of its callers", "b": "1 of its callers"}, {"b": "all"}]
    workers = [worker({**endpoint("t:1"), "ejected": list(each), "ejected_for": each}) for each in found]
    [seen] = merged_state(workers)["upstreams"]["gpu"]
    assert seen["ejected"] == ["a", "b"]
    assert seen["ejected_for"] == {"a": "10 of its callers", "b": "all"}


def test_what_each_worker_finds_out_by_itself_is_shown_as_the_worst_of_them():
    def found(breaker: str, warmth: float, latency: dict[str, float], probed: dict[str, str]) -> dict[str, Any]:
        seen = {**endpoint("t:1"), "warmth": warmth, "latency_seconds": latency, "probed": probed}
        state = worker(seen)
        state["models"]["photos"]["variants"]["trt"]["breaker"] = breaker
        return state

    merged = merged_state(
        [
            found("admitting", 1.0, {"m": 0.01, "n": 0.5}, {"m": "well"}),
            found("tripped", 0.1, {"m": 0.9}, {"m": "INTERNAL: no", "n": "well"}),
            found("probing", 0.4, {}, {}),
        ]
    )
    [seen] = merged["upstreams"]["gpu"]
    assert merged["models"]["photos"]["variants"]["trt"]["breaker"] == "tripped"
    assert (seen["warmth"], seen["latency_seconds"]) == (0.1, {"m": 0.9, "n": 0.5})
    assert seen["probed"] == {"m": "INTERNAL: no", "n": "well"}


def test_endpoints_that_only_one_worker_knows_are_there():
    merged = merged_state([worker(endpoint("t:1")), worker(endpoint("t:1"), endpoint("t:2"))])
    assert [each["address"] for each in merged["upstreams"]["gpu"]] == ["t:1", "t:2"]


def test_memory_is_as_scarce_as_any_worker_finds_it_and_closed_connections_add_up() -> None:
    def memory(step: int, used: int, resets: int) -> dict[str, Any]:
        return {**worker(), "memory": {"step": step, "bytes": used, "limit_bytes": 9, "connections_reset": resets}}

    merged = merged_state([memory(0, 7, 1), memory(2, 6, 2), memory(0, 8, 0)])
    assert merged["memory"] == {"step": 2, "bytes": 6, "limit_bytes": 9, "connections_reset": 3}
    assert merged_state([worker()])["memory"] is None


def test_of_breakers_and_retries_the_worst_is_told() -> None:
    states = [copy.deepcopy(worker()) for _ in range(3)]
    for state, breaker, left in zip(states, ("admitting", "tripped", "probing"), (None, 7, 3), strict=True):
        state["models"]["photos"]["variants"]["trt"]["breaker"] = breaker
        state["models"]["photos"]["retries_left"] = left
    found = merged_state(states)["models"]["photos"]
    assert (found["variants"]["trt"]["breaker"], found["retries_left"]) == ("tripped", 3)


def test_a_model_is_ready_if_it_is_in_every_worker():
    merged = merged_state([worker(), worker(trt=False)])
    assert merged["models"]["photos"]["ready"] is False
    assert merged["models"]["photos"]["variants"]["trt"]["ready"] is False
    assert merged_state([worker(), worker()])["models"] == worker()["models"]


def test_workers_that_do_not_serve_yet_do_not_count():
    assert merged_state([{}, worker()])["ready"] is True
    assert merged_state([{}, {}])["ready"] is False
    assert merged_state([{}, {}])["models"] == {}


def change(time: str, digest: str, accepted: bool = True) -> dict[str, Any]:
    findings = [] if accepted else ["line 1"]
    return {"time": time, "source": "g.yaml", "digest": digest, "accepted": accepted, "findings": findings}


def config(*changes: dict[str, Any]) -> dict[str, Any]:
    """As one worker has it. changes: the oldest first."""
    accepted = [each for each in changes if each["accepted"]]
    refused = [each for each in changes if not each["accepted"]]
    return {"current": accepted[-1], "last_refused": refused[-1] if refused else None, "changes": [*changes][::-1]}


def test_a_change_that_every_worker_took_over_is_one_change():
    first, later = change("2026-01-01T10:00:00", "d1"), change("2026-01-01T10:00:01", "d1")
    refused = change("2026-01-01T11:00:00", "", accepted=False)
    merged = merged_config([config(first, refused), config(later, refused)])
    assert merged["changes"] == [refused, first]
    assert merged["current"] == first
    assert merged["last_refused"] == refused


def test_workers_with_different_configs_have_no_common_one():
    merged = merged_config([config(change("2026-01-01T10:00:00", "d1")), config(change("2026-01-01T10:00:00", "d2"))])
    assert merged["current"] is None
    assert len(merged["changes"]) == 2


def test_what_workers_tell_of_experiments_adds_up_and_a_store_is_away_if_any_worker_finds_it_so() -> None:
    def one(exposures: int, units: int, away: str | None) -> dict[str, Any]:
        counts = dict.fromkeys(("waiting", "written", "reports", "reports_refused", "duplicates"), exposures)
        experiment = {"name": "spring", "model": "photos", "exposures": exposures, "units": {"a": units}}
        store = {"name": "sqlite", "away": away, "dropped": {"full": 1}, **counts}
        return {**worker(), "experiments": [experiment], "store": store}

    merged = merged_state([one(1, 5, None), one(2, 4, "gone"), worker()])
    assert merged["experiments"] == [{"name": "spring", "model": "photos", "exposures": 3, "units": {"a": 5}}]
    assert (merged["store"]["away"], merged["store"]["waiting"], merged["store"]["dropped"]) == ("gone", 3, {"full": 2})
    assert merged_state([worker()])["store"] is None


def test_of_bandits_the_worker_is_heard_that_decides_and_any_that_has_trouble() -> None:
    def one(epoch: int, decides: bool, age: float, trouble: str = "") -> dict[str, Any]:
        bandit = {"epoch": epoch, "decides": decides, "store_age_seconds": age, "trouble": trouble}
        experiment = {"name": "spring", "model": "photos", "exposures": 1, "units": {}, "bandit": bandit}
        return {**worker(), "experiments": [experiment]}

    merged = merged_state([one(2, False, 0.1), one(3, True, 0.5), one(2, False, 9.0, "the store is away")])
    told = {"epoch": 3, "decides": True, "store_age_seconds": 9.0, "trouble": "the store is away"}
    assert merged["experiments"][0]["bandit"] == told


def test_of_rollouts_the_worker_is_heard_that_decides_and_any_that_has_trouble() -> None:
    def one(decides: bool, age: float, trouble: str = "") -> dict[str, Any]:
        told = {"name": "int8", "decides": decides, "waits": ["soak"] if decides else [], "trouble": trouble}
        return {**worker(), "rollouts": [{**told, "store_age_seconds": age}]}

    merged = merged_state([one(False, 0.1), one(True, 0.5), one(False, 7.0, "away"), worker()])
    assert merged["rollouts"] == [
        {"name": "int8", "decides": True, "waits": ["soak"], "trouble": "away", "store_age_seconds": 7.0}
    ]


def test_quotas_of_several_workers_are_sums_and_a_store_that_is_away_for_one_is_away() -> None:
    def worker(left: float, store: str) -> dict[str, Any]:
        limits = {"requests": 10, "concurrent": 4}
        quota = {"caller": "acme", "model": "", "limits": limits, "left": {"requests": left}, "in_flight": 1}
        state = {"version": "1", "listen": "", "ready": True, "draining": False, "models": {}, "pipelines": {}}
        return {**state, "upstreams": {}, "names": {}, "quotas": [quota], "quota_store": store}

    merged = merged_state([worker(2.5, "up"), worker(-1.0, "away")])
    [quota] = merged["quotas"]
    assert (quota["left"], quota["limits"]["requests"], quota["in_flight"]) == ({"requests": 1.5}, 10, 2)
    assert merged["quota_store"] == "away"


def test_copies_and_answers_of_several_workers_add_up_and_parity_is_that_of_the_worst() -> None:
    def told(agreed: int, is_open: bool, cosine: float | None) -> dict[str, Any]:
        shadow = {
            "model": "photos",
            "variant": "int8",
            "results": {"agreed": agreed, "differed": 0, "failed": 1},
            "dropped": {"full": 1},
            "mean_seconds": 0.1 * agreed if agreed else None,
            "mean_measures": {} if cosine is None else {"cosine": cosine},
            "not_finite": 2,
            "parity": {"is_open": is_open, "compared": agreed, "agreed": agreed, "copies": 3, "agreement": 1.0},
        }
        answers = {"model": "photos", "variant": "trt", "results": {"fine": agreed, "not_finite": 1}}
        return {**worker(), "shadows": [shadow], "answers": [answers]}

    merged = merged_state([told(3, True, 1.0), told(1, False, 0.8), told(0, False, None)])
    [shadow] = merged["shadows"]
    assert shadow["results"] == {"agreed": 4, "differed": 0, "failed": 3}
    assert shadow["dropped"] == {"full": 3}
    assert shadow["mean_measures"] == {"cosine": 0.95}
    assert shadow["not_finite"] == 6
    assert (shadow["parity"]["is_open"], shadow["parity"]["compared"]) == (False, 0)
    assert merged["answers"] == [{"model": "photos", "variant": "trt", "results": {"fine": 4, "not_finite": 3}}]
