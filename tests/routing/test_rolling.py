"""Which units a rollout has moved, and who stands in for whom meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from gateway.routing import FORBID, Condition, Key, Present, Rolling, Route, Rule, Split, Sticky, choose, drawn, explain
from gateway.types import Facts, Variant

VARIANTS = tuple(Variant(name, "gpu", f"model_{name}") for name in ("old", "new", "other"))
STICKY = Sticky((Key("metadata", "x-user"),), "salt")
USERS = [f"user {number}" for number in range(4000)]


def route(share: float, split: Split | None = None, **more: object) -> Route:
    rolling = Rolling("int8", "old", "new", share)
    return Route("photos", VARIANTS, split or Split.all_to("old"), STICKY, rollout=rolling, **more)  # type: ignore[arg-type]


def of(given: Route, user: str) -> tuple[str, str]:
    made = choose(given, Facts({"x-user": user}), 0.5)
    assert made is not None
    return made.reason, made.targets[0].name


def test_units_only_come_while_the_share_rises_and_all_go_back_when_it_is_none() -> None:
    moved: set[str] = set()
    for share in (0.01, 0.1, 0.5, 1.0):
        now = {user for user in USERS if of(route(share), user) == ("rollout:int8", "new")}
        assert moved <= now
        assert len(now) == pytest.approx(share * len(USERS), abs=120)
        moved = now
    assert {of(route(0.0), user) for user in USERS} == {("only", "old")}


def test_units_of_other_variants_stay_where_they_are() -> None:
    split = Split((("old", 3), ("other", 1)))
    before = {user: of(route(0.0, split), user)[1] for user in USERS}
    for share in (0.3, 1.0):
        after = {user: of(route(share, split), user)[1] for user in USERS}
        assert all(after[user] == "other" for user in USERS if before[user] == "other")
        came = sum(after[user] == "new" for user in USERS)
        assert came == pytest.approx(share * 0.75 * len(USERS), abs=120)


def test_calls_without_a_key_are_drawn_by_the_same_share() -> None:
    given = route(0.25, Split((("old", 3), ("other", 1))))
    assert choose(given, Facts()) is None
    draws = Counter(drawn(given, Facts(), number / 1000).targets[0].name for number in range(1000))
    assert draws["new"] == pytest.approx(188, abs=2)
    assert draws["other"] == pytest.approx(250, abs=2)


@pytest.mark.parametrize(("share", "stands_in"), [(0.0, False), (0.5, False), (1.0, True)])
def test_the_new_variant_stands_in_for_others_once_it_has_all_units_or_is_named(share: float, stands_in: bool) -> None:
    rule = Rule("o", (Condition(Key("metadata", "x-o"), Present()),), "other")
    made = choose(route(share, rules=(rule,)), Facts({"x-o": "1"}), 0.5)
    assert made is not None
    assert ("new" in [each.name for each in made.targets]) is stands_in
    named = choose(route(share, rules=(rule,), fallback=("new",)), Facts({"x-o": "1"}), 0.5)
    assert named is not None
    assert [each.name for each in named.targets] == ["other", "new"]


def test_a_failing_new_variant_is_answered_by_the_others() -> None:
    user = next(user for user in USERS if of(route(0.5), user)[1] == "new")
    made = choose(route(0.5), Facts({"x-user": user}))
    assert made is not None
    assert [each.name for each in made.targets] == ["new", "old", "other"]
    forbidden = choose(route(0.5, fallback=FORBID), Facts({"x-user": user}))
    assert forbidden is not None
    assert [each.name for each in forbidden.targets] == ["new"]


def test_who_asks_for_a_version_that_leaves_one_of_the_two_out_is_in_no_rollout() -> None:
    pinned = (replace(VARIANTS[0], version="1"), replace(VARIANTS[1], version="2"))
    given = replace(route(0.5), variants=pinned)
    for version, name in (("1", "old"), ("2", "new")):
        made = choose(given, Facts({"x-user": "anna"}, version=version))
        assert made is not None
        assert (made.reason, made.targets[0].name) == ("version", name)


def test_an_explanation_tells_the_share_and_where_the_unit_is() -> None:
    told = "\n".join(explain(route(0.25), Facts({"x-user": "anna"}), draw=0.5).lines)
    assert "rollout int8: the first 0.25 of what 'old' would get goes to 'new'; 'anna' is at 0." in told


def test_a_rollout_of_variants_that_are_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant 'gone'"):
        replace(route(0.0), rollout=Rolling("int8", "old", "gone", 0.0))
