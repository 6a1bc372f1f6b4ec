"""Who takes part in which experiment, and in which arm."""

from __future__ import annotations

from collections import Counter

import pytest

from gateway.routing import Arms, Condition, Key, Present, Route, Rule, Split, Sticky, explain, plan
from gateway.types import Facts, Variant

VARIANTS = tuple(Variant(name, "gpu", f"model_{name}") for name in ("a", "b", "old"))
STICKY = Sticky((Key("metadata", "x-user"),), "salt")
USERS = [f"user {number}" for number in range(4000)]
RULE = Rule("testers", (Condition(Key("metadata", "x-tester"), Present()),), "b")


def route(*experiments: Arms) -> Route:
    return Route("photos", VARIANTS, Split((("old", 1.0),)), STICKY, rules=(RULE,), experiments=experiments)


def arms(name: str = "spring", **others: object) -> Arms:
    return Arms(name, {"a": 3.0, "b": 1.0}, "a", **{"layer": "l", **others})  # type: ignore[arg-type]


def reason_of(given: Route, **metadata: str) -> tuple[str, str]:
    facts = Facts({key.replace("_", "-"): value for key, value in metadata.items()})
    made = plan(given, facts, draw=0.5, available=lambda _: True)
    return made.reason, made.targets[0].name


def reasons(given: Route) -> Counter[tuple[str, str]]:
    return Counter(reason_of(given, x_user=user) for user in USERS)


def test_units_come_to_arms_by_their_shares() -> None:
    found = reasons(route(arms()))
    assert found.keys() == {("experiment:spring", "a"), ("experiment:spring", "b")}
    assert found["experiment:spring", "b"] == pytest.approx(1000, abs=120)


def test_a_unit_is_in_one_experiment_of_a_layer_at_most_and_the_rest_is_as_without() -> None:
    first, second = arms("one", end=0.5), arms("two", begin=0.5, end=0.75)
    found = Counter(reason for reason, _ in reasons(route(first, second)).elements())
    assert found["experiment:one"] == pytest.approx(2000, abs=150)
    assert found["experiment:two"] == pytest.approx(1000, abs=120)
    assert found["only"] == pytest.approx(1000, abs=120)
    here = {user for user in USERS if reason_of(route(first), x_user=user)[0] == "experiment:one"}
    there = {user for user in USERS if reason_of(route(second), x_user=user)[0] == "experiment:two"}
    assert not here & there


def test_experiments_do_not_share_their_arms() -> None:
    """Whoever has b in one is as likely as others to have b in the next."""
    in_b = [user for user in USERS if reason_of(route(arms("one")), x_user=user)[1] == "b"]
    again = [user for user in in_b if reason_of(route(arms("two")), x_user=user)[1] == "b"]
    assert len(again) / len(in_b) == pytest.approx(0.25, abs=0.06)


def test_the_holdout_keeps_the_baseline_and_is_in_no_arm() -> None:
    found = reasons(route(arms(holdout=0.2)))
    assert found["holdout:spring", "a"] == pytest.approx(800, abs=100)
    assert ("holdout:spring", "b") not in found


def test_everybody_gets_one_arm_once_it_has_ended() -> None:
    assert reasons(route(arms(holdout=0.2, ended_with="b"))) == {("stopped:spring", "b"): len(USERS)}


def test_rules_come_first_and_who_has_no_key_is_not_asked() -> None:
    given = route(arms())
    assert reason_of(given, x_user="anna", x_tester="1") == ("rule:testers", "b")
    assert reason_of(given) == ("only", "old")


def test_a_version_that_leaves_arms_out_is_no_part_of_the_experiment() -> None:
    pinned = (*VARIANTS[:1], Variant("b", "gpu", "model_b", "2"), VARIANTS[2])
    given = Route("photos", pinned, Split((("old", 1.0),)), STICKY, experiments=(arms(),))
    made = plan(given, Facts({"x-user": "anna"}, version="7"), draw=0.5, available=lambda _: True)
    assert made.reason in ("version", "only")


def test_explain_says_which_arm_and_why() -> None:
    given = route(arms("one", end=0.5), arms("two", begin=0.5, holdout=0.5))
    for user in USERS[:20]:
        told = explain(given, Facts({"x-user": user}), draw=0.5)
        assert told.plan.reason.partition(":")[2] in ("one", "two")
        arm = told.plan.targets[0].name
        assert any(
            line.startswith((f"{told.plan.reason}: variant {arm},", f"{told.plan.reason}: arm {arm},"))
            for line in told.lines
        )
        assert any(f"'{user}' is at 0." in line for line in told.lines)


def test_an_arm_that_is_no_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant 'c'"):
        route(Arms("spring", {"a": 1.0, "c": 1.0}, "a", "l"))


def told(given: Route, **metadata: str) -> list[str]:
    facts = Facts({key.replace("_", "-"): value for key, value in metadata.items()})
    return [line for line in explain(given, facts, draw=0.5).lines if not line.startswith(("1.", "2.", "3."))]


def test_who_asks_is_told_the_arm_and_why() -> None:
    """By the hash, held out, forced by a rule, ended, or not asked."""
    given = route(arms(holdout=0.2))
    by_reason = {}
    for user in USERS:
        by_reason.setdefault(reason_of(given, x_user=user), user)
    unit = by_reason["experiment:spring", "b"]
    _, where, why, *hashes = told(given, x_user=unit)
    assert where.startswith(f"experiment spring: '{unit}' is at 0.")
    assert why == f"experiment:spring: arm b, by the hash of '{unit}' in shares a 3, b 1"
    assert [line.split(":")[0].strip() for line in hashes] == ["a", "b"]
    unit = by_reason["holdout:spring", "a"]
    why = f"holdout:spring: variant a, the baseline: '{unit}' is held out, so it is in no arm"
    assert told(given, x_user=unit)[-1] == why
    forced = "experiment spring: arm b, forced by rule testers; 'anna' is left out of the analysis"
    assert told(given, x_user="anna", x_tester="1")[-1] == forced
    assert told(given, x_tester="1")[-1].endswith("not in the data, the request has no sticky key")
    ended = "stopped:spring: variant b, which everybody gets since it was stopped"
    assert told(route(arms(ended_with="b")), x_user="anna")[-1] == ended
    assert "experiment spring: not asked, the request has no sticky key" in told(given)


def bandit(*shares_of_b: float, **others: object) -> Arms:
    epochs = tuple({"a": 1.0 - share, "b": share} for share in shares_of_b)
    return arms(slices=4, epochs=epochs, **others)


def test_a_bandits_units_have_the_shares_of_their_epoch_and_wait_with_the_baseline_before_it() -> None:
    found = reasons(route(bandit(0.5, 0.9)))
    assert found["waiting:spring", "a"] == pytest.approx(2000, abs=150)
    assert ("waiting:spring", "b") not in found
    assert found["experiment:spring", "b"] == pytest.approx(500 + 900, abs=120)
    before = [reason_of(route(bandit(0.5, 0.9)), x_user=user) for user in USERS]
    after = [reason_of(route(bandit(0.5, 0.9, 0.05)), x_user=user) for user in USERS]
    assert all(was == now for was, now in zip(before, after, strict=True) if was[0] == "experiment:spring")


@pytest.mark.parametrize(
    ("other", "reason"), [({"holdout": 0.999999}, "holdout:spring"), ({"ended_with": "b"}, "stopped:spring")]
)
def test_a_bandit_asks_who_takes_part_first(other: dict[str, object], reason: str) -> None:
    assert reason_of(route(bandit(0.5, **other)), x_user="anna")[0] == reason


def test_before_the_first_epoch_all_wait() -> None:
    assert reasons(route(bandit())) == {("waiting:spring", "a"): len(USERS)}


def test_who_asks_is_told_the_epoch_and_its_shares() -> None:
    given = bandit(0.5, 0.875)
    by_epoch = {given.maybe_epoch(user): user for user in USERS}
    unit = by_epoch[1]
    _, where, why, *hashes = told(route(given), x_user=unit)
    arm = reason_of(route(given), x_user=unit)[1]
    assert where.startswith(f"experiment spring: '{unit}' is at 0.")
    shares = "a 0.125, b 0.875, those of epoch 2, 2 of 4 have begun"
    assert why == f"experiment:spring: arm {arm}, by the hash of '{unit}' in shares {shares}"
    assert len(hashes) == 2
    unit = by_epoch[None]
    why = f"waiting:spring: variant a, the baseline: the epoch of '{unit}' is to come, 2 of 4 have begun"
    assert told(route(given), x_user=unit)[-1] == why
