"""Config of rollouts: what it becomes, and findings with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.assemble import rolled_of, routes_of, steps_of
from gateway.config import ConfigError, Loaded, load, restart_notices
from gateway.config.experiment_file import rollouts_of
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, OutcomeSpec
from gateway.experiments.rollout import Phase, RolloutPlan, State, Step

FULL = """\
upstreams: {cpu: {endpoints: ["triton:8001"]}}
models:
  imagenet:
    variants:
      fp32: {upstream: cpu, model: net}
      int8: {upstream: cpu, model: net_int8}
      other: {upstream: cpu, model: net_other}
    split: {fp32: 3, other: 1}
    sticky: {metadata: x-user}
    rollout:
      name: spring
      from: fp32
      to: int8
      steps:
        - {share: 1%, soak: 10m}
        - {share: 0.5, soak: 2h, units: 2000, must_hold: true}
      guardrails:
        errors: {kind: ratio, better: lower, measure: error, worse_by: 0.01}
        bought: {kind: binary, better: higher, worse_by: 5%}
      alpha: 0.01
      units: 3000
"""
KEY = ("spring", "imagenet", "fp32", "int8")


def loaded(tmp_path: Path, text: str = FULL) -> Loaded:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    return load(file, {})


def test_a_file_becomes_the_plan_that_it_says(tmp_path: Path) -> None:
    errors = OutcomeSpec("errors", Kind.RATIO, Better.LOWER, measure="error")
    bought = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
    assert rollouts_of(loaded(tmp_path).config)["spring"] == RolloutPlan(
        "spring",
        "imagenet",
        "fp32",
        "int8",
        (Step(0.01, 600.0, 100), Step(0.5, 7200.0, 2000, True)),  # 100 units unless it says how many
        (Guardrail(errors, Amount(0.01, False)), Guardrail(bought, Amount(0.05, True))),
        0.01,
        3000,
    )


def test_shares_are_those_of_the_states_and_none_before_there_is_one(tmp_path: Path) -> None:
    config = loaded(tmp_path).config
    assert routes_of(config).public["imagenet"].draws.shares == {"fp32": 0.75, "other": 0.25}
    half = {KEY: State(Phase.RUNNING, 1, 0.5, version=2)}
    assert routes_of(config, rollouts=half).public["imagenet"].draws.shares == {
        "fp32": 0.375,
        "other": 0.25,
        "int8": 0.375,
    }
    others = {("spring", "imagenet", "fp32", "other"): State(Phase.PROMOTED, 1, 1.0, version=2)}
    assert routes_of(config, rollouts=others) != half
    assert routes_of(config, rollouts=others).public["imagenet"].draws.shares == {"fp32": 0.75, "other": 0.25}


@pytest.mark.parametrize("phase", Phase)
def test_units_are_told_of_and_calls_counted_while_it_is_under_way(tmp_path: Path, phase: Phase) -> None:
    config = loaded(tmp_path).config
    states = {KEY: State(phase, 1, 0.5, version=2)}
    under_way = phase in (Phase.RUNNING, Phase.PAUSED)
    assert [each.name for each in steps_of(config, states)] == (["spring/2"] if under_way else [])
    assert rolled_of(config, states) == ({"imagenet": ("fp32", "int8")} if under_way else {})
    if under_way:
        (running,) = steps_of(config, states)
        assert (running.reason, running.measures) == ("rollout:spring", (("errors", "error"),))
        assert running.counts_variant
        assert running.knows_requests  # since somebody reports what was bought


def test_a_guardrail_may_be_how_often_answers_agree_and_how_sure_they_are(tmp_path: Path) -> None:
    alike = "bought: {kind: numeric, better: higher, measure: agreement, reference: fp32"
    sure = "sure: {kind: numeric, better: higher, measure: confidence, worse_by: 5%}"
    shadowed = FULL.replace("    rollout:", "    shadow: {fp32: {share: 1}}\n    rollout:")
    text = shadowed.replace("bought: {kind: binary, better: higher", f"{sure}\n        {alike}")
    (running,) = steps_of(loaded(tmp_path, text).config, {KEY: State(Phase.RUNNING, 1, 0.5, version=2)})
    assert running.agreements == (("bought", "fp32", 1.0),)
    assert running.confidences == (("sure", ""),)
    assert not running.knows_requests


def test_a_rollout_is_followed_live(tmp_path: Path) -> None:
    before = loaded(tmp_path)
    after = loaded(tmp_path, FULL.replace("spring", "autumn"))
    assert list(restart_notices(before.config, after.config, "g")) == []


GUARDRAILS = FULL[FULL.index("      guardrails") : FULL.index("      alpha")]
WRONG = {
    "no from": ("      from: fp32\n", "", "rollout.from: is missing", "needs: name"),
    "unknown from": ("from: fp32", "from: fp23", "no variant 'fp23'", "did you mean 'fp32'"),
    "unknown to": ("to: int8", "to: in8", "no variant 'in8'", "did you mean 'int8'"),
    "to itself": ("to: int8", "to: fp32", "'fp32' is where units come from", "another variant"),
    "nothing to move": ("split: {fp32: 3, other: 1}", "split: {other: 1}", "nothing to move", "that serves now"),
    "moved already": ("split: {fp32: 3, other: 1}", "split: {fp32: 3, int8: 1}", "has a share of", "no share"),
    "shares fall": ("share: 0.5", "share: 0.5%", "0.005 is not above the step before", "shares that rise"),
    "all units": ("share: 0.5", "share: 1", "is 1", "above 0 and below 1"),
    "no share": ("share: 1%", "share: 0%", "is '0%'", "above 0 and below 1"),
    "no sticky": ("    sticky: {metadata: x-user}\n", "", "nothing says who is one", "'sticky' with the metadata key"),
    "long name": ("name: spring", f"name: {'s' * 61}", "has 61 characters", "at most 60"),
    "must hold nothing": (GUARDRAILS, "", "there are no guardrails", "or no 'must_hold'"),
    "agreement with nobody": (
        "bought: {kind: binary, better: higher",
        "bought: {kind: ratio, better: higher, measure: agreement, reference: fp32",
        "'fp32' is no shadow of 'imagenet'",
        "'models.imagenet.shadow.fp32' with a share",
    ),
    "agreement with itself": (
        "bought: {kind: binary, better: higher",
        "bought: {kind: numeric, better: higher, measure: agreement, reference: int8",
        "'int8' agrees with itself, and would always seem well",
        "the variant that it is compared with",
    ),
    "agreement as a ratio": (
        "bought: {kind: binary, better: higher",
        "bought: {kind: ratio, better: higher, measure: agreement, reference: fp32",
        "is never known, nor breached, while all answers agree on one side",
        "kind: numeric",
    ),
    "errors that should be many": (
        "better: lower, measure: error",
        "better: higher, measure: error",
        "'error' that is higher is worse",
        "better: lower",
    ),
    "quantile without one": ("kind: ratio, better", "kind: quantile, better", "go together", "with a 'quantile'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_what_would_be_right(tmp_path: Path, name: str) -> None:
    old, new, wrong, right = WRONG[name]
    assert old in FULL
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, FULL.replace(old, new, 1))
    told = "\n".join(map(str, caught.value.findings))
    assert wrong in told, told
    assert right in told, told


def test_two_rollouts_have_two_names_and_no_experiment_has_theirs_or_their_units(tmp_path: Path) -> None:
    model = FULL[FULL.index("  imagenet") :].replace("imagenet", "other")
    spring = (
        "experiments:\n  spring:\n    model: imagenet\n    arms: {fp32: 1, other: 1}\n    primary: errors\n"
        "    outcomes: {errors: {kind: ratio, better: lower, measure: error}}\n    smallest_effect: 1%\n"
    )
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, FULL + model + spring)
    told = "\n".join(map(str, caught.value.findings))
    assert "'spring' is the rollout of 'imagenet', too; a name that no other has" in told
    assert "'spring' is an experiment" in told
    assert "experiment 'spring' assigns units of 'imagenet', which the rollout would not move" in told


def test_what_tells_little_is_a_warning(tmp_path: Path) -> None:
    told = "\n".join(map(str, loaded(tmp_path).warnings))
    assert "errors.kind: is never known to hold while no call fails at all, as of ratio; kind: binary" in told
    text = FULL.replace("kind: ratio, better: lower, measure: error", "kind: quantile, quantile: 0.999, better: lower")
    told = "\n".join(map(str, loaded(tmp_path, text).warnings))
    assert "is never known to hold while no call fails" not in told
    assert "of 2000 units too few are beyond the 0.999 quantile to tell much of it; steps of 20000 units" in told
