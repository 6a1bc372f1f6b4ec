"""How calls of a rollout's variants are counted."""

from __future__ import annotations

import pytest

from gateway.experiments.crowd import PLACES
from gateway.forwarding.rolled import Rolled, VariantCounts, Whose
from gateway.status import Code, Meaning

ANNA = Whose("anna", "ipv4:10.0.0.1")


def counted(code: Code, meaning: Meaning | None = None, why: str = "", deadline: float | None = None) -> str:
    counts = VariantCounts()
    counts.ended(code, meaning, why, deadline, 100.0, ANNA)
    found = {"good": counts.good, "errors": counts.errors, "unanswered": counts.unanswered, "wrong": counts.wrong}
    assert sum(counts.ended_by.good) == 2 * counts.good  # as a unit, and as a caller
    assert sum(counts.ended_by.bad) == 2 * (counts.errors + counts.unanswered + counts.wrong)
    return " ".join(name for name, count in found.items() if count)


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        pytest.param((Code.OK,), "good", id="answered"),
        pytest.param((Code.OK, None, "server"), "errors", id="another answered after its error"),
        pytest.param((Code.OK, None, "unavailable"), "errors", id="another answered since it was not there"),
        pytest.param((Code.OK, None, "late"), "unanswered", id="another answered after its attempt_timeout"),
        pytest.param((Code.OK, None, "wrong"), "wrong", id="another answered since its answer was NaN"),
        pytest.param((Code.INTERNAL, Meaning.WRONG), "wrong", id="its answer was NaN and nobody else could answer"),
        pytest.param((Code.INTERNAL, Meaning.SERVER), "errors", id="failed"),
        pytest.param((Code.UNAVAILABLE,), "errors", id="nobody could answer"),
        pytest.param((Code.RESOURCE_EXHAUSTED,), "errors", id="no room"),
        pytest.param((Code.DEADLINE_EXCEEDED,), "unanswered", id="deadline"),
        pytest.param((Code.CANCELLED, None, "", 100.05), "unanswered", id="cancelled as its deadline passed"),
        pytest.param((Code.CANCELLED, None, "", 130.0), "", id="cancelled before"),
        pytest.param((Code.CANCELLED,), "", id="cancelled"),
        pytest.param((Code.INVALID_ARGUMENT, Meaning.CALLER), "", id="the caller's fault"),
        pytest.param((Code.INTERNAL, Meaning.CALLER), "", id="the caller's fault in a server's words"),
    ],
)
def test_a_call_counts_once_and_only_what_speaks_for_or_against_its_variant(ended: tuple, kind: str) -> None:
    assert counted(*ended) == kind


def test_so_many_answers_are_kept_as_are_wanted_and_no_large_one() -> None:
    counts = VariantCounts()
    assert counts.take(2) == []
    for body in (b"a", bytes(2 << 20), b"b", b"c"):
        if counts.looks > 0:
            counts.answered(body, ANNA)
    assert [body for body, _ in counts.take(2)] == [b"a", b"b"]


def test_a_call_for_which_it_was_not_even_asked_is_nobodys_word_against_it() -> None:
    counts = VariantCounts()
    counts.passed_over()
    assert (counts.left_alone, counts.errors, sum(counts.ended_by.bad)) == (1, 0, 0)


def test_one_caller_does_not_get_all_looks() -> None:
    counts = VariantCounts()
    counts.take(10)
    bert = Whose("bert", "ipv4:10.0.0.2")
    for _ in range(100):
        counts.answered(b"flood", ANNA)
    counts.answered(b"other", bert)
    assert [body for body, _ in counts.take(10)] == [b"flood", b"flood", b"flood", b"other"]
    counts.take(10)
    counts.answered(b"flood", ANNA)
    assert len(counts.take(10)) == 1


def test_a_caller_has_one_place_as_a_unit_and_one_as_a_caller_and_few_share_both() -> None:
    assert (ANNA.unit, ANNA.caller) == (Whose("anna", "").unit, Whose("", "ipv4:10.0.0.1").caller)
    places = {(each.unit, each.caller) for each in (Whose("", f"ipv4:10.0.0.{number}") for number in range(256))}
    assert len(places) > 100
    assert {unit for unit, _ in places} == set(range(PLACES))
    assert {caller for _, caller in places} == set(range(PLACES, 2 * PLACES))
    Whose("\ud800", "unix:")  # whatever callers write


def test_what_was_counted_stays_while_a_rollout_goes_on_and_goes_with_it() -> None:
    rolled = Rolled()
    assert not rolled.table
    rolled.apply({"net": ("old", "new")})
    counts = rolled.maybe("net", "new")
    assert counts is not None
    rolled.apply({"net": ("old", "new"), "other": ("a", "b")})
    assert rolled.maybe("net", "new") is counts
    assert rolled.maybe("net", "third") is rolled.maybe("none", "new") is None
    rolled.apply({})
    assert not rolled.table
