"""Which quotas a call comes under, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gateway.errors import Overloaded, QuotaExceeded
from gateway.forwarding.admission import AdmissionSettings, Gates
from gateway.quotas import CallerQuota, Limits, Quota, Quotas, QuotaSettings, SharedBuckets
from gateway.quotas.quotas import _refusal

KEY = "x-tenant"


def quotas_of(**settings: object) -> Quotas:
    quotas = Quotas()
    quotas.apply(QuotaSettings(KEY, **settings), None)  # type: ignore[arg-type]
    return quotas


def quota(quotas: Quotas, caller: str = "acme", model: str = "photos") -> Quota:
    return quotas.of({KEY: caller}, model)


def entered(quota: Quota, times: int, size: int = 0, rows: int = 1, now: float = 0.0) -> int:
    count = 0
    for _ in range(times):
        try:
            quota.enter(size, rows, now)
        except QuotaExceeded:
            continue
        count += 1
    return count


def test_what_refusals_say_is_remembered_of_all_callers_together_who_may_invent_their_names() -> None:
    quotas = quotas_of(default=CallerQuota(Limits(requests=1)))
    for number in range(200):
        for tenths in range(10):
            entered(quota(quotas, str(number)), 2, now=tenths / 10)
    assert _refusal.cache_info().currsize <= 1024


def test_without_quotas_nothing_is_on() -> None:
    assert not quotas_of().is_on
    assert not quotas_of(callers={"acme": CallerQuota(is_batch=True)}).is_on


def test_each_caller_has_its_own_and_one_that_is_not_named_the_default() -> None:
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(requests=5))}, default=CallerQuota(Limits(requests=2)))
    assert entered(quota(quotas), 10) == 5
    assert entered(quota(quotas, "one"), 10) == 2
    assert entered(quota(quotas, "two"), 10) == 2
    assert entered(quotas.of({}, "photos"), 10) == 2  # callers without a name are one


def test_a_caller_has_one_for_all_models_and_one_for_a_model_beside_it() -> None:
    of_models = {"photos": Limits(requests=2)}
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(requests=5), of_models)})
    assert entered(quota(quotas, model="photos"), 10) == 2
    assert entered(quota(quotas, model="texts"), 10) == 3
    assert entered(quota(quotas, model="anything"), 10) == 0


def test_a_model_has_one_for_all_callers_together() -> None:
    quotas = quotas_of(models={"photos": Limits(requests=3)})
    assert entered(quota(quotas, "one"), 2) == 2
    assert entered(quota(quotas, "two"), 10) == 1
    assert entered(quota(quotas, "two", "texts"), 10) == 10


def test_what_is_refused_uses_nothing() -> None:
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(requests=100))}, models={"photos": Limits(requests=1)})
    assert entered(quota(quotas), 50) == 1
    assert entered(quota(quotas, model="texts"), 200) == 99


def test_bytes_of_requests_and_answers_and_rows_count() -> None:
    quotas = quotas_of(default=CallerQuota(Limits(bytes=1000, rows=50)))
    assert entered(quota(quotas, "a"), 10, size=300) == 3
    assert entered(quota(quotas, "b"), 10, rows=20) == 2
    of_c = quota(quotas, "c")
    of_c.enter(100, 1, 0.0)
    of_c.leave(1900, 0.0)
    with pytest.raises(QuotaExceeded) as refused:
        of_c.enter(100, 1, 0.0)
    assert refused.value.reason == "bytes"
    assert refused.value.retry_after == 1.2  # 1.1, rounded up


def test_concurrent_calls_have_places_that_they_leave() -> None:
    quotas = quotas_of(default=CallerQuota(Limits(concurrent=2)))
    of_a = quota(quotas, "a")
    assert entered(of_a, 5) == 2
    of_a.leave(0, 0.0)
    assert entered(of_a, 5) == 1


def test_the_refusal_names_whose_quota_it_is_and_when_to_try_again() -> None:
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(), {"photos": Limits(requests=2, burst=0.5)})})
    of_acme = quota(quotas)
    of_acme.enter(0, 1, 0.0)
    with pytest.raises(QuotaExceeded) as refused:
        of_acme.enter(0, 1, 0.0)
    error = refused.value
    assert error.text == (
        "The quota of caller 'acme' of model 'photos' is used up: 2 requests per second; try again in 0.5 s"
    )
    assert (error.subject, error.reason, error.limit) == (
        "caller:acme,model:photos",
        "requests",
        "2 requests per second",
    )
    assert error.retry_after == pytest.approx(0.5)
    assert quotas.refused() == {("acme", "photos"): {"requests": 1}}


def test_each_worker_has_its_share() -> None:
    quotas = quotas_of(default=CallerQuota(Limits(requests=8, concurrent=6)), workers=4)
    of_a = quota(quotas, "a")
    assert entered(of_a, 10) == 1  # of six places a quarter, and at least one
    of_a.leave(0, 0.0)
    assert entered(of_a, 10) == 1
    of_a.leave(0, 0.0)
    assert entered(of_a, 10) == 0


def test_shared_rates_are_not_divided() -> None:
    quotas, shared = Quotas(), SharedBuckets(0.5, 0.05)
    shared.came_back()
    quotas.apply(QuotaSettings(KEY, default=CallerQuota(Limits(requests=8)), workers=4), shared)
    assert entered(quota(quotas, "a"), 10) == 4
    assert [lease.used for lease in shared.leases.values()] == [4]


def test_a_new_config_keeps_what_was_used_where_the_quota_stays() -> None:
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(requests=5, concurrent=4))})
    held = quota(quotas)
    assert entered(held, 10) == 4
    quotas.apply(QuotaSettings(KEY, {"acme": CallerQuota(Limits(requests=5, concurrent=4)), "b": CallerQuota()}), None)
    held.leave(0, 0.0)
    assert entered(quota(quotas), 10) == 1
    quotas.apply(QuotaSettings(KEY, {"acme": CallerQuota(Limits(requests=100, concurrent=5))}), None)
    assert entered(quota(quotas), 10) == 1  # four are still in flight
    quotas.apply(QuotaSettings(KEY), None)
    assert not quotas.is_on


def test_callers_without_number_take_bounded_memory_and_nothing_from_those_that_are_named() -> None:
    quotas = quotas_of(callers={"acme": CallerQuota(Limits(requests=5))}, default=CallerQuota(Limits(requests=2)))
    assert entered(quota(quotas), 5) == 5
    for number in range(25_000):
        quota(quotas, f"caller-{number}")
    assert len(quotas._others) <= 10_000
    assert entered(quota(quotas), 5) == 0
    assert len(quotas.now(0.0)) <= 1 + 20
    assert set(quotas.refused()) == {("acme", ""), ("other", "")}


def test_who_invents_names_fills_no_memory_however_many_models_have_a_quota() -> None:
    of_models = {f"model-{number}": Limits(requests=2, rows=5) for number in range(200)}
    quotas = quotas_of(default=CallerQuota(Limits(requests=5), of_models))
    for number in range(3000):
        assert entered(quota(quotas, f"caller-{number}", "model-7"), 5) == 2
    assert len(quotas._others) <= 1000
    assert sum(len(caller.accounts) for caller in quotas._others.values()) <= 2000


def test_the_batch_class_is_said_by_the_quota_or_else_by_the_call() -> None:
    quotas = quotas_of(callers={"nightly": CallerQuota(is_batch=True), "shop": CallerQuota(is_batch=False)})
    said: Mapping[str, bool | None] = {name: quotas.class_of({KEY: name}) for name in ("nightly", "shop", "other")}
    assert said == {"nightly": True, "shop": False, "other": None}


def test_admission_takes_the_class_from_the_quota() -> None:
    quotas = quotas_of(callers={"nightly": CallerQuota(is_batch=True), "shop": CallerQuota(is_batch=False)})
    gates = Gates(quotas=quotas)
    gates.apply(AdmissionSettings(priority="x-priority"), 0.0)
    said = {"x-priority": "batch"}
    assert gates.is_batch({KEY: "nightly"})
    assert not gates.is_batch({KEY: "shop", **said})
    assert gates.is_batch({KEY: "other", **said})
    gates.is_shedding = True
    with pytest.raises(Overloaded):
        gates.check_shed({KEY: "nightly"})


def test_what_is_left_is_told() -> None:
    quotas = quotas_of(default=CallerQuota(Limits(requests=10, concurrent=4)))
    entered(quota(quotas, "a"), 3)
    [now] = quotas.now(0.0)
    assert (now.caller, now.model, now.in_flight) == ("a", "", 3)
    assert now.left == pytest.approx({"requests": 7, "concurrent": 1})
