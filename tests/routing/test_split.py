"""Shares, and who gets which. Movement is judged by the plain definition of a rendezvous, not by our code."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import Key, Split, Sticky, endpoint_order
from gateway.routing.rendezvous import Rendezvous
from gateway.types import Facts

KEYS = [f"user-{number}" for number in range(100_000)]
FEW_KEYS = KEYS[:300]

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True)
weights = st.floats(0.01, 100)


@st.composite
def weighted(draw: st.DrawFn) -> dict[str, float]:
    return {name: draw(weights) for name in draw(names)}


@pytest.mark.parametrize(
    "given_weights",
    [{"a": 90, "b": 10}, {"a": 1, "b": 1, "c": 1}, {"a": 99.5, "b": 0.5}, {"a": 1, "b": 2, "c": 3, "d": 4}],
    ids=str,
)
@pytest.mark.parametrize("salt", ["2026-01", ""], ids=["salted", "unsalted"])
def test_each_variant_gets_its_share_of_the_keys(given_weights: dict[str, float], salt: str) -> None:
    shares = Split(tuple(given_weights.items())).shares
    counted = Counter(map(Rendezvous(shares, salt).choose, KEYS))

    assert {name: counted[name] / len(KEYS) for name in shares} == pytest.approx(shares, abs=0.01)


def test_when_one_weight_changes_as_many_keys_move_as_its_share_and_only_to_it() -> None:
    before = Rendezvous({"a": 90, "b": 10, "c": 20}, "s")
    after = Rendezvous({"a": 90, "b": 40, "c": 20}, "s")
    moves = [
        (old, new) for old, new in zip(map(before.choose, KEYS), map(after.choose, KEYS), strict=True) if old != new
    ]

    assert {new for _, new in moves} == {"b"}
    assert len(moves) / len(KEYS) == pytest.approx(40 / 150 - 10 / 120, abs=0.01)


@given(before=weighted(), data=st.data())
def test_a_key_moves_only_to_a_variant_that_grew_against_its_old_one(
    before: dict[str, float], data: st.DataObject
) -> None:
    after = {name: data.draw(weights) for name in before}
    old, new = Rendezvous(before, "s"), Rendezvous(after, "s")
    for key in FEW_KEYS:
        left, entered = old.choose(key), new.choose(key)
        if left != entered:
            assert after[entered] / before[entered] >= after[left] / before[left] * (1 - 1e-9)


@given(weights_=weighted(), factor=st.floats(0.001, 1000))
def test_only_proportions_count(weights_: dict[str, float], factor: float) -> None:
    scaled = {name: weight * factor for name, weight in weights_.items()}
    one, other = Split(tuple(weights_.items())).shares, Split(tuple(scaled.items())).shares
    first, second = Rendezvous(one, "s"), Rendezvous(other, "s")

    assert [first.choose(key) for key in FEW_KEYS] == [second.choose(key) for key in FEW_KEYS]


@given(weights_=weighted(), data=st.data())
def test_when_a_variant_leaves_only_its_own_keys_move(weights_: dict[str, float], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(weights_)))
    rest = {name: weight for name, weight in weights_.items() if name != gone}
    if not rest:
        return
    old, new = Rendezvous(weights_, "s"), Rendezvous(rest, "s")

    assert all(new.choose(key) == old.choose(key) for key in FEW_KEYS if old.choose(key) != gone)


@given(weights_=weighted())
def test_the_order_of_the_variants_does_not_matter(weights_: dict[str, float]) -> None:
    turned = dict(reversed(weights_.items()))

    assert [Rendezvous(weights_, "s").choose(k) for k in FEW_KEYS] == [
        Rendezvous(turned, "s").choose(k) for k in FEW_KEYS
    ]


def test_another_salt_is_an_independent_assignment() -> None:
    one, other = Rendezvous({"a": 1, "b": 1}, "one"), Rendezvous({"a": 1, "b": 1}, "other")
    agree = sum(one.choose(key) == other.choose(key) for key in KEYS)

    assert agree / len(KEYS) == pytest.approx(0.5, abs=0.01)


def test_assignments_stay_the_same_from_release_to_release() -> None:
    """Replicas of two releases run side by side, so the hash is part of the contract; this is its plain definition."""
    weights_ = {"a": 0.6, "b": 0.4}

    def time(name: str, key: str) -> float:
        salt = blake2b(b"s", digest_size=32).digest()
        said = len(name).to_bytes(4, "big") + name.encode() + key.encode()
        bits = int.from_bytes(blake2b(said, key=salt, digest_size=8).digest(), "big") >> 12
        return -log((bits + 0.5) / 2**52) / weights_[name]

    chosen = [Rendezvous(weights_, "s").choose(key) for key in FEW_KEYS]
    assert chosen == [min(weights_, key=lambda name: time(name, key)) for key in FEW_KEYS]
    assert "".join(chosen[:40]) == "aabbaaaabaaabaabaaaaaaaaaaaaabaaaaaaabaa"
    assert endpoint_order("42", ["a:1", "b:1", "c:1"]) == ["b:1", "a:1", "c:1"]


def test_the_draw_falls_into_shares_in_order() -> None:
    split = Split((("a", 1), ("b", 0), ("c", 3)))

    assert [split.draw(number) for number in (0.0, 0.2499, 0.25, 0.9999999999999999)] == ["a", "a", "c", "c"]


@given(weights_=weighted(), number=st.floats(0, 1, exclude_max=True), data=st.data())
def test_a_draw_is_always_a_variant_with_a_share(
    weights_: dict[str, float], number: float, data: st.DataObject
) -> None:
    zero = data.draw(st.sets(st.sampled_from(sorted(weights_)), max_size=len(weights_) - 1))
    split = Split(tuple((name, 0 if name in zero else weight) for name, weight in weights_.items()))

    assert split.draw(number) not in zero
    assert sum(split.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "bad",
    [(), (("a", 0),), (("a", -1), ("b", 2)), (("a", float("nan")),), (("a", float("inf")),), (("a", 1), ("a", 2))],
    ids=["none", "all_zero", "negative", "nan", "infinite", "twice"],
)
def test_weights_that_mean_nothing_are_refused(bad: tuple[tuple[str, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"weight|twice"):
        Split(bad)


def test_a_weight_lost_in_the_total_has_no_share() -> None:
    assert list(Split((("a", 1e300), ("b", 5e-324))).shares) == ["a"]


STICKY = Sticky((Key("metadata", "x-user"), Key("parameter", "session")), "s")


@pytest.mark.parametrize(
    ("facts", "value"),
    [
        pytest.param(Facts({"x-user": "u"}, {"session": 7}), "u", id="the_first_key_wins"),
        pytest.param(Facts({}, {"session": 7}), "7", id="then_the_second"),
        pytest.param(Facts({"x-user": ""}, {"session": "s"}), "s", id="an_empty_value_is_none"),
        pytest.param(Facts({"x-user": ""}), None, id="only_empty"),
        pytest.param(Facts(), None, id="none"),
    ],
)
def test_a_caller_is_recognised_by_the_first_key_with_a_value(facts: Facts, value: str | None) -> None:
    assert STICKY.maybe_read(facts) == value


# Sequences on endpoints

endpoints = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)


@given(key=st.text(), among=endpoints, data=st.data())
def test_every_replica_orders_endpoints_alike(key: str, among: list[str], data: st.DataObject) -> None:
    assert endpoint_order(key, data.draw(st.permutations(among))) == endpoint_order(key, among)
    assert sorted(endpoint_order(key, among)) == sorted(among)


@given(key=st.text(), among=endpoints, data=st.data())
def test_an_endpoint_that_leaves_does_not_reorder_the_others(key: str, among: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(among))
    rest = [endpoint for endpoint in among if endpoint != gone]

    assert endpoint_order(key, rest) == [endpoint for endpoint in endpoint_order(key, among) if endpoint != gone]


def test_sequences_spread_evenly_over_endpoints() -> None:
    counted = Counter(endpoint_order(str(number), ["a:1", "b:1", "c:1"])[0] for number in range(30_000))

    assert [counted[endpoint] / 30_000 for endpoint in ("a:1", "b:1", "c:1")] == pytest.approx([1 / 3] * 3, abs=0.01)
