"""Grants only add, and parts of one never combine with parts of another."""

from __future__ import annotations

import pytest

from gateway.access.policy import Grant, Names, Policy
from gateway.access.principal import NOBODY, Principal
from gateway.access.rpcs import CONTROL, NAMED, PATHS, PROBES, named_by

ADA = Principal("ada", frozenset({"vision"}))
EVE = Principal("eve")


def names(*patterns: str) -> Names:
    return Names.of(patterns)


def test_a_star_stands_for_the_rest_of_a_name_and_for_nothing_else() -> None:
    some = names("a", "photo-*", "x*y")
    assert [name for name in ("a", "A", "ab", "photo-", "photo-1", "photo", "x*y", "xzy", "") if name in some] == [
        "a", "photo-", "photo-1", "x*y",
    ]  # fmt: skip
    assert "anything" in names("*")
    assert "anything" not in names()


@pytest.mark.parametrize(
    ("grant", "holds"),
    [
        (Grant(callers=frozenset({"ada"})), "ada"),
        (Grant(groups=frozenset({"vision"})), "ada"),
        (Grant(callers=frozenset({"vision"})), ""),
        (Grant(callers=frozenset({""})), ""),
        (Grant(everybody=True), "ada eve"),
        (Grant(anonymous=True), "ada eve nobody"),
        (Grant(), ""),
    ],
)
def test_a_grant_holds_for_whom_it_says(grant: Grant, holds: str) -> None:
    everybody = {"ada": ADA, "eve": EVE, "nobody": NOBODY}
    assert [name for name, one in everybody.items() if grant.holds_for(one)] == holds.split()


def test_who_may_read_one_config_and_call_another_model_may_not_read_that_one_s() -> None:
    reads = Grant(everybody=True, public=names("a"), rpcs=named_by(["details"]), allow=frozenset({"priority"}))
    calls = Grant(everybody=True, public=names("b"), rpcs=named_by(["inference", "ModelConfig"]))
    infers = Grant(everybody=True, public=names("a"), rpcs=named_by(["inference"]), allow=frozenset({"timeout"}))
    policy = Policy([reads, calls, infers], {})
    by = {rpc: policy.maybe_scope(EVE, rpc) for rpc in ("ModelInfer", "ModelStatistics", "ModelConfig", "LogSettings")}
    covered = {rpc: [m for m in "ab" if scope and scope.covers(m, True)] for rpc, scope in by.items()}
    assert covered == {
        "ModelInfer": ["a", "b"], "ModelStatistics": ["a"], "ModelConfig": ["a", "b"], "LogSettings": [],
    }  # fmt: skip
    infer = by["ModelInfer"]
    assert infer is not None
    assert (infer.allowed("a", True), infer.allowed("b", True)) == ({"timeout"}, set())
    assert infer is policy.maybe_scope(ADA, "ModelInfer"), "equal grants, one scope, so views are made once"


@pytest.mark.parametrize("name", ["../m", "/m", "a/b", "..", ".", "a\\b", "a\0b"])
def test_a_name_that_is_a_path_is_no_model_whatever_is_granted(name: str) -> None:
    assert not Grant(everybody=True, direct=names("*")).covers(name, False)


def test_words_stand_for_rpcs_that_are_there_and_control_is_in_no_other_word() -> None:
    assert set(PATHS.values()) == {*NAMED, *PROBES}
    assert not named_by(["inference", "metadata", "details"]) & set(CONTROL)
    assert len(CONTROL) == 10
