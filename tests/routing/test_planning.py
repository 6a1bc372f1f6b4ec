"""Which variants a request gets, in which order, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import FORBID, Condition, Exact, Key, Present, Route, Rule, Split, Sticky, explain, plan
from gateway.types import Facts, Plan, Variant

GPU = Variant("gpu", "gpus", "net_trt")
CPU = Variant("cpu", "cpus", "net_onnx")
INT8 = Variant("int8", "cpus", "net_int8")
BY_NAME = {variant.name: variant for variant in (GPU, CPU, INT8)}

USER = Key("metadata", "x-user")
TESTER = Rule("tester", (Condition(Key("metadata", "x-tester"), Exact("1")),), "int8")
GOLD = Rule("gold", (Condition(Key("parameter", "tier"), Exact("gold")),), "gpu")

ROUTE = Route("net", (GPU, CPU, INT8), Split((("gpu", 3), ("cpu", 1))))
STICKY = replace(ROUTE, sticky=Sticky((USER,), "s"))
RULES = replace(STICKY, rules=(TESTER, GOLD))


def made(route: Route, facts: Facts | None = None, draw: float = 0.0, down: str = "") -> tuple[str, str]:
    """The names of a plan's targets and its reason; `down` has the names of the unavailable variants."""
    result = plan(route, facts or Facts(), draw=draw, available=lambda variant: variant.name not in down.split())
    return " ".join(target.name for target in result.targets), result.reason


@pytest.mark.parametrize(
    ("route", "facts", "draw", "expected"),
    [
        pytest.param(ROUTE, Facts(), 0.0, ("gpu cpu int8", "split"), id="draw_in_the_first_share"),
        pytest.param(ROUTE, Facts(), 0.75, ("cpu gpu int8", "split"), id="draw_in_the_second_share"),
        pytest.param(STICKY, Facts(), 0.75, ("cpu gpu int8", "split"), id="draw_without_a_sticky_key"),
        pytest.param(
            STICKY, Facts({"x-user": ""}), 0.75, ("cpu gpu int8", "split"), id="draw_with_an_empty_sticky_key"
        ),
        pytest.param(RULES, Facts({"x-tester": "1"}), 0.0, ("int8 gpu cpu", "rule:tester"), id="rule"),
        pytest.param(RULES, Facts({"x-tester": "0"}), 0.0, ("gpu cpu int8", "split"), id="rule_that_does_not_match"),
        pytest.param(
            RULES,
            Facts({"x-tester": "1"}, {"tier": "gold"}),
            0.0,
            ("int8 gpu cpu", "rule:tester"),
            id="first_rule_wins",
        ),
        pytest.param(
            RULES, Facts({"x-user": "u"}, {"tier": "gold"}), 0.9, ("gpu cpu int8", "rule:gold"), id="rule_before_sticky"
        ),
        pytest.param(
            replace(STICKY, split=Split.all_to("cpu")), Facts({"x-user": "u"}), 0.0, ("cpu gpu int8", "only"), id="only"
        ),
        pytest.param(replace(ROUTE, fallback=("int8",)), Facts(), 0.0, ("gpu int8", "split"), id="own_fallback_order"),
        pytest.param(
            replace(ROUTE, fallback=("int8", "gpu")), Facts(), 0.0, ("gpu int8", "split"), id="chosen_in_fallback"
        ),
        pytest.param(replace(ROUTE, fallback=FORBID), Facts(), 0.0, ("gpu", "split"), id="fallback_forbidden"),
    ],
)
def test_the_first_way_of_choosing_that_applies_wins(
    route: Route, facts: Facts, draw: float, expected: tuple[str, str]
) -> None:
    assert made(route, facts, draw) == expected


@pytest.mark.parametrize(
    ("route", "facts", "down", "expected"),
    [
        pytest.param(ROUTE, Facts(), "gpu", ("cpu int8 gpu", "fallback"), id="chosen_is_down"),
        pytest.param(ROUTE, Facts(), "cpu", ("gpu int8 cpu", "split"), id="first_fallback_is_down"),
        pytest.param(ROUTE, Facts(), "gpu cpu", ("int8 gpu cpu", "fallback"), id="one_is_left"),
        pytest.param(ROUTE, Facts(), "gpu cpu int8", ("gpu cpu int8", "split"), id="all_are_down"),
        pytest.param(replace(ROUTE, fallback=FORBID), Facts(), "gpu", ("gpu", "split"), id="forbidden_and_down"),
        pytest.param(
            RULES, Facts({"x-tester": "1"}), "int8", ("gpu cpu int8", "fallback"), id="rule_to_one_that_is_down"
        ),
        pytest.param(
            replace(RULES, fallback=FORBID),
            Facts({"x-tester": "1"}),
            "int8",
            ("int8", "rule:tester"),
            id="rule_forbidden",
        ),
    ],
)
def test_what_is_not_available_is_tried_last(route: Route, facts: Facts, down: str, expected: tuple[str, str]) -> None:
    assert made(route, facts, down=down) == expected


def test_a_sticky_caller_stays_whatever_is_drawn() -> None:
    facts = [Facts({"x-user": f"user-{number}"}) for number in range(2000)]
    first = [made(STICKY, one, draw=0.1) for one in facts]

    assert first == [made(STICKY, one, draw=0.9) for one in facts]
    assert {reason for _, reason in first} == {"sticky"}
    assert Counter(names.split()[0] for names, _ in first)["gpu"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_a_sticky_caller_of_an_unavailable_variant_follows_the_fallback_order_and_returns() -> None:
    route = replace(STICKY, split=Split((("gpu", 1), ("cpu", 1), ("int8", 1))), fallback=("int8", "cpu"))
    for number in range(50):
        facts = Facts({"x-user": str(number)})
        if made(route, facts)[0].startswith("gpu"):
            assert made(route, facts, down="gpu") == ("int8 cpu gpu", "fallback")


def test_a_draw_gives_each_variant_its_share() -> None:
    counted = Counter(made(ROUTE, draw=number / 1000)[0].split()[0] for number in range(1000))

    assert counted == {"gpu": 750, "cpu": 250}


# Explicit versions

V1, V2, ANY = Variant("v1", "u", "net", "1"), Variant("v2", "u", "net", "2"), Variant("any", "w", "other")
VERSIONS = Route(
    "net",
    (V1, V2, ANY),
    Split((("v1", 8), ("v2", 1), ("any", 1))),
    sticky=Sticky((USER,), "s"),
    rules=(Rule("old", (Condition(Key("metadata", "x-old"), Present()),), "v1"),),
)
PINNED = Route("net", (V1, V2), Split.all_to("v1"))


@pytest.mark.parametrize(
    ("route", "facts", "draw", "expected"),
    [
        pytest.param(VERSIONS, Facts(version="1"), 0.0, ("v1 any", "split"), id="others_are_out"),
        pytest.param(VERSIONS, Facts(version="2"), 0.49, ("v2 any", "split"), id="shares_keep_their_proportions"),
        pytest.param(VERSIONS, Facts(version="2"), 0.51, ("any v2", "split"), id="shares_keep_their_proportions_too"),
        pytest.param(VERSIONS, Facts(version="3"), 0.0, ("any", "version"), id="only_one_could_be_it"),
        pytest.param(VERSIONS, Facts({"x-old": ""}, version="1"), 0.9, ("v1 any", "rule:old"), id="rule"),
        pytest.param(
            VERSIONS, Facts({"x-old": ""}, version="2"), 0.0, ("v2 any", "split"), id="rule_to_one_that_is_out"
        ),
        pytest.param(PINNED, Facts(version="1"), 0.0, ("v1", "version"), id="pinned"),
        pytest.param(PINNED, Facts(version="2"), 0.0, ("v2", "version"), id="asked_for_though_without_a_share"),
        pytest.param(PINNED, Facts(version="3"), 0.0, ("", "version"), id="nobody_can_be_it"),
        pytest.param(PINNED, Facts(version="+02"), 0.0, ("v2", "version"), id="in_another_spelling"),
        pytest.param(PINNED, Facts(version="two"), 0.0, ("", "version"), id="no_version_at_all"),
        pytest.param(VERSIONS, Facts(version="two"), 0.0, ("any", "version"), id="no_version_is_for_triton_to_refuse"),
        pytest.param(ROUTE, Facts(version="3"), 0.0, ("gpu cpu int8", "split"), id="no_variant_pins_one"),
    ],
)
def test_an_explicit_version_rules_out_variants_that_pin_another(
    route: Route, facts: Facts, draw: float, expected: tuple[str, str]
) -> None:
    assert made(route, facts, draw) == expected


def test_a_sticky_caller_whose_variant_can_be_the_version_stays_on_it() -> None:
    for number in range(200):
        facts = Facts({"x-user": str(number)})
        first = made(VERSIONS, facts)[0].split()[0]
        if first != "v1":
            assert made(VERSIONS, replace(facts, version="2"))[0].split()[0] == first


# Any route and any request

facts_of_any_kind = st.builds(
    Facts,
    metadata=st.fixed_dictionaries({}, optional={"x-user": st.text(), "x-tester": st.sampled_from(["0", "1"])}),
    parameters=st.fixed_dictionaries({}, optional={"tier": st.sampled_from(["gold", "free", 1, True])}),
    version=st.sampled_from(["", "1", "2", "9"]),
)
routes = st.builds(
    Route,
    st.just("net"),
    st.lists(st.sampled_from(["", "1", "2"]), min_size=3, max_size=3).map(
        lambda pins: tuple(replace(variant, version=pin) for variant, pin in zip(BY_NAME.values(), pins, strict=True))
    ),
    st.tuples(*[st.integers(0, 3)] * 3)
    .filter(any)
    .map(lambda weights: Split(tuple(zip(BY_NAME, weights, strict=True)))),
    sticky=st.none() | st.just(Sticky((USER,), "s")),
    rules=st.sampled_from([(), (TESTER,), (GOLD, TESTER)]),
    fallback=st.none() | st.lists(st.sampled_from(sorted(BY_NAME)), unique=True).map(tuple),
)
draws = st.floats(0, 1, exclude_max=True)
downs = st.sets(st.sampled_from(sorted(BY_NAME)))


@given(route=routes, facts=facts_of_any_kind, draw=draws, down=downs)
def test_a_plan_keeps_its_promises(route: Route, facts: Facts, draw: float, down: set[str]) -> None:
    def available(variant: Variant) -> bool:
        return variant.name not in down

    ideal = plan(route, facts, draw=draw, available=lambda _: True)
    real = plan(route, facts, draw=draw, available=available)
    fitting = [variant for variant in route.variants if not facts.version or variant.version in ("", facts.version)]

    assert len(set(real.targets)) == len(real.targets)
    assert set(real.targets) == set(ideal.targets) <= set(fitting)
    assert bool(real.targets) == bool(fitting)
    assert real.targets == tuple(sorted(ideal.targets, key=lambda variant: not available(variant)))
    assert (real.reason == "fallback") == (real.targets[:1] != ideal.targets[:1])


@given(route=routes, facts=facts_of_any_kind, draw=draws, down=downs)
def test_an_explanation_is_of_the_plan_that_is_made(route: Route, facts: Facts, draw: float, down: set[str]) -> None:
    def available(variant: Variant) -> bool:
        return variant.name not in down

    explained = explain(route, facts, draw=draw, available=available)

    assert explained.plan == plan(route, facts, draw=draw, available=available)
    for target in explained.plan.targets:
        assert any(target.name in line for line in explained.lines)


EXPLAINED = {
    "rules_then_sticky": (
        RULES,
        Facts({"x-user": "ann", "x-tester": "0"}),
        [
            "rule tester: no match, wants metadata x-tester '1', the request has '0'",
            "rule gold: no match, wants parameter tier 'gold', the request has none",
            "sticky: key 'ann' in shares gpu 0.75, cpu 0.25: variant cpu",
            "  gpu: hash 0x",
            "  cpu: hash 0x",
            "2. gpu: model net_trt on gpus, not available",
        ],
    ),
    "rule": (RULES, Facts({"x-tester": "1"}), ["rule tester: matches, variant int8"]),
    "no_sticky_key": (
        STICKY,
        Facts(),
        [
            "sticky: the request has none of metadata x-user",
            "split: 0.5 drawn in shares gpu 0.75, cpu 0.25: variant gpu",
        ],
    ),
    "only": (PINNED, Facts(), ["only: variant v1 is the only one with a share", "1. v1: model net version 1 on u"]),
    "version": (PINNED, Facts(version="2"), ["variant v1: out, it is version 1 and 2 was asked for"]),
    "no_version": (PINNED, Facts(version="3"), ["no variant can be version 3"]),
}


@pytest.mark.parametrize(("route", "facts", "parts"), EXPLAINED.values(), ids=EXPLAINED.keys())
def test_an_explanation_tells_each_decision(route: Route, facts: Facts, parts: list[str]) -> None:
    text = "\n".join(explain(route, facts, draw=0.5, available=lambda variant: variant is CPU).lines)

    for part in parts:
        assert part in text


def test_an_explanation_says_what_is_not_available() -> None:
    explained = explain(ROUTE, Facts(), draw=0.0, available=lambda variant: variant is CPU)

    assert explained.plan == Plan((CPU, GPU, INT8), "fallback", "gpu")
    assert explained.lines[-3:] == (
        "1. cpu: model net_onnx on cpus",
        "2. gpu: model net_trt on gpus, not available",
        "3. int8: model net_int8 on cpus, not available",
    )
