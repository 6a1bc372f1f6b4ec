"""How calls of a rollout's variants are counted."""

from __future__ import annotations

import pytest

from gateway.forwarding.rolled import Rolled, VariantCounts
from gateway.status import Code, Meaning


def counted(code: Code, meaning: Meaning | None = None, why: str = "", deadline: float | None = None) -> str:
    counts = VariantCounts()
    counts.ended(code, meaning, why, deadline, 100.0)
    found = {"good": counts.good, "errors": counts.errors, "unanswered": counts.unanswered}
    return " ".join(name for name, count in found.items() if count)


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        pytest.param((Code.OK,), "good", id="answered"),
        pytest.param((Code.OK, None, "server"), "errors", id="another answered after its error"),
        pytest.param((Code.OK, None, "unavailable"), "errors", id="another answered since it was not there"),
        pytest.param((Code.OK, None, "late"), "unanswered", id="another answered after its attempt_timeout"),
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
            counts.answered(body)
    assert counts.take(2) == [b"a", b"b"]


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
