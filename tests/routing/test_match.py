"""What a rule's conditions accept."""

from __future__ import annotations

import time

import pytest
from slowness import slowness

from gateway.routing import AnyOf, Condition, Exact, Key, Prefix, Present, Regex, Rule, as_text
from gateway.routing.match import MAX_REGEX_TEXT, Test
from gateway.types import Facts, Parameter

USER = Key("metadata", "x-user")
TIER = Key("parameter", "tier")


@pytest.mark.parametrize(
    ("test", "value", "holds"),
    [
        pytest.param(Exact("a"), "a", True, id="exact"),
        pytest.param(Exact("a"), "A", False, id="exact_other_case"),
        pytest.param(Exact("a"), "ab", False, id="exact_longer"),
        pytest.param(Exact(""), "", True, id="exact_empty"),
        pytest.param(Exact(""), None, False, id="exact_empty_is_not_absent"),
        pytest.param(AnyOf(frozenset(("a", "b"))), "b", True, id="any_of"),
        pytest.param(AnyOf(frozenset(("a", "b"))), "c", False, id="any_of_none"),
        pytest.param(AnyOf(frozenset(("a", "b"))), None, False, id="any_of_absent"),
        pytest.param(Prefix("qa-"), "qa-7", True, id="prefix"),
        pytest.param(Prefix("qa-"), "xqa-7", False, id="prefix_inside"),
        pytest.param(Prefix("qa-"), None, False, id="prefix_absent"),
        pytest.param(Regex("[ab]+"), "abba", True, id="regex"),
        pytest.param(Regex("[ab]+"), "abbac", False, id="regex_must_match_the_whole_value"),
        pytest.param(Regex("[ab]+"), "ab\n", False, id="regex_no_trailing_newline"),
        pytest.param(Regex("a|b"), "ab", False, id="regex_alternatives_match_the_whole_value"),
        pytest.param(Regex(r"(?i)EU-\d+"), "eu-12", True, id="regex_flags"),
        pytest.param(Regex("[äö]+"), "äö", True, id="regex_any_script"),
        pytest.param(Regex("(?x) eu - [0-9]+  # Europe"), "eu-12", True, id="regex_verbose"),
        pytest.param(Regex("(?x) eu - [0-9]+  # Europe"), "eu-12 ", False, id="regex_verbose_matches_the_whole_value"),
        pytest.param(Regex("(?x) eu | us  # or"), "eu-us", False, id="regex_verbose_alternatives"),
        pytest.param(Regex("(?x) a \\# (?-x:#) b  # a\n# b"), "a##b", True, id="regex_verbose_many_comments"),
        pytest.param(Regex("(?x)#"), "", True, id="regex_only_a_comment"),
        pytest.param(Regex("(?-x)a#"), "a#", True, id="regex_a_hash_that_begins_no_comment"),
        pytest.param(Regex(".*"), None, False, id="regex_absent"),
        pytest.param(Regex("a*"), "a" * (MAX_REGEX_TEXT - 1), True, id="regex_below_its_limit"),
        pytest.param(Regex("a*"), "a" * MAX_REGEX_TEXT, True, id="regex_at_its_limit"),
        pytest.param(Regex("a*"), "a" * (MAX_REGEX_TEXT + 1), False, id="regex_above_its_limit"),
        pytest.param(Present(), "", True, id="present_and_empty"),
        pytest.param(Present(), None, False, id="not_present"),
        pytest.param(Present(wanted=False), None, True, id="absent"),
        pytest.param(Present(wanted=False), "", False, id="not_absent"),
    ],
)
def test_a_condition_holds_for_what_its_test_says(test: Test, value: str | None, holds: bool) -> None:
    facts = Facts(metadata={} if value is None else {"x-user": value})

    assert Condition(USER, test).holds(facts) is holds


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (7, "7"), (-7, "-7"), (1.0, "1.0"), (0.25, "0.25"), (1e-7, "1e-07"), ("x", "x")],
    ids=repr,
)
def test_a_parameter_is_compared_as_text(value: Parameter, text: str) -> None:
    assert as_text(value) == text
    assert Condition(TIER, Exact(text)).holds(Facts(parameters={"tier": value}))


@pytest.mark.parametrize(
    ("test", "text"),
    [
        (Exact("a"), "metadata x-user 'a'"),
        (AnyOf(frozenset(("b", "a"))), "metadata x-user any of 'a', 'b'"),
        (Prefix("qa-"), "metadata x-user beginning with 'qa-'"),
        (Regex("[ab]+"), "metadata x-user matching /[ab]+/"),
        (Present(), "metadata x-user present"),
        (Present(wanted=False), "metadata x-user absent"),
    ],
    ids=["exact", "any_of", "prefix", "regex", "present", "absent"],
)
def test_a_condition_reads_as_what_it_wants(test: Test, text: str) -> None:
    assert str(Condition(USER, test)) == text


def test_metadata_and_parameters_of_one_name_are_different_keys() -> None:
    facts = Facts(metadata={"tier": "gold"}, parameters={"other": "gold"})

    assert not Condition(TIER, Present()).holds(facts)


def test_a_rule_matches_if_all_its_conditions_hold() -> None:
    rule = Rule("tester", (Condition(USER, Prefix("qa-")), Condition(TIER, Exact("gold"))), "b")

    assert rule.matches(Facts({"x-user": "qa-1"}, {"tier": "gold"}))
    assert not rule.matches(Facts({"x-user": "qa-1"}, {"tier": "free"}))
    assert not rule.matches(Facts({}, {"tier": "gold"}))


def test_a_rule_without_conditions_is_refused() -> None:
    with pytest.raises(ValueError, match="condition"):
        Rule("all", (), "b")


@pytest.mark.parametrize("name", ["X-User", "token-bin", ""])
def test_a_metadata_key_that_facts_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="key"):
        Key("metadata", name)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="unclosed group"):
        Regex("(")


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|a)*", "(a*)*b", "(.*a){20}", r"(\w+\s?)*x", "(a{0,30}){0,30}", "(a?){500}a{500}"]
)
def test_no_value_takes_a_regular_expression_long(pattern: str) -> None:
    """Python's engine takes years for some of these, and the worker's loop with it."""
    regex = Regex(pattern)
    began = time.process_time()
    for value in ("a" * 45 + "!", "a" * (MAX_REGEX_TEXT - 1) + "!", "a " * (MAX_REGEX_TEXT // 2)):
        regex.holds(value)
    assert time.process_time() - began < 0.5 * slowness()


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "a)(b", "(", "[", "(((a{1,100}){1,100}){1,100}){1,100}"])
def test_what_needs_backtracking_or_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"supported|unopened|unclosed|exceeds"):
        Regex(pattern)
