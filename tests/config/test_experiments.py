"""Config of experiments: what it becomes, and findings with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.assemble import routes_of, running_of
from gateway.config import ConfigError, Loaded, load, restart_notices
from gateway.config.experiment_file import bandits_of, load_experiments, plans_of
from gateway.config.store import Store
from gateway.experiments.plan import Amount, BanditPlan, Better, Guardrail, Kind, Missing, OutcomeSpec, PerUnit

FULL = """\
experiments:
  spring:
    model: imagenet
    arms: {fp32: 90, int8: 10}
    baseline: int8
    unit: x-user-id
    outcomes:
      bought: {kind: binary, better: higher}
      spent: {kind: numeric, better: higher, per_unit: sum, missing: zero}
      errors: {kind: ratio, better: lower}
      latency: {kind: quantile, quantile: 0.99, better: lower}
    primary: bought
    guardrails:
      latency: {worse_by: 10%}
      errors: {worse_by: 0.001}
    secondary: [spent]
    smallest_effect: 2%
    alpha: 0.01
    units: 50000
    window: 24h
"""


def loaded(tmp_path: Path, text: str) -> dict[str, object]:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return dict(load_experiments(file))


def test_a_file_becomes_the_plan_that_it_says(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(FULL)
    plan = load_experiments(file)["spring"]
    assert plan.order == ("int8", "fp32")
    assert plan.share("fp32") == pytest.approx(0.9)
    assert plan.primary == OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
    latency = OutcomeSpec("latency", Kind.QUANTILE, Better.LOWER, quantile=0.99)
    assert plan.guardrails[0] == Guardrail(latency, Amount(0.1, is_relative=True))
    assert plan.guardrails[1].worse_by == Amount(0.001, is_relative=False)
    assert plan.secondary == (
        OutcomeSpec("spent", Kind.NUMERIC, Better.HIGHER, per_unit=PerUnit.SUM, missing=Missing.ZERO),
    )
    assert plan.smallest_effect == Amount(0.02, is_relative=True)
    assert (plan.alpha, plan.units, plan.window, plan.unit, plan.model) == (
        0.01,
        50_000,
        86_400.0,
        "x-user-id",
        "imagenet",
    )


WRONG = {
    "unknown key": ("alpha: 0.01", "alhpa: 0.01", 18, "did you mean 'alpha'"),
    "no such outcome": ("primary: bought", "primary: bougt", 12, "did you mean 'bought'"),
    "no such guardrail": ("latency: {worse_by", "latecy: {worse_by", 14, "did you mean 'latency'"),
    "no such baseline": ("baseline: int8", "baseline: int4", 5, "known: fp32, int8"),
    "primary is secondary too": ("secondary: [spent]", "secondary: [bought]", 16, "named already"),
    "one arm": ("{fp32: 90, int8: 10}", "{int8: 10}", 4, "at least two"),
    "share of nothing": ("int8: 10}", "int8: 0}", 4, "above 0"),
    "quantile without its level": ("quantile: 0.99, ", "", 11, "go together"),
    "over of no ratio": ("{kind: binary,", "{kind: binary, over: visits,", 8, "has no meaning for binary"),
    "missing of no number": ("{kind: ratio,", "{kind: ratio, missing: zero,", 10, "has no meaning for ratio"),
    "agreement with nobody": ("{kind: ratio,", "{kind: ratio, measure: agreement,", 10, "does not say with whom"),
    "a reference of nothing": ("{kind: ratio,", "{kind: ratio, reference: a,", 10, "'measure: agreement', or no"),
    "scores of nothing": ("{kind: ratio,", "{kind: ratio, output: a,", 10, "'measure: confidence', or no 'output'"),
    "agreement of a quantile": (
        "{kind: quantile,",
        "{kind: quantile, measure: agreement, reference: fp32,",
        11,
        "agreement is no quantile",
    ),
    "confidence that is yes or no": (
        "{kind: binary,",
        "{kind: binary, measure: confidence,",
        8,
        "confidence is no binary",
    ),
    "unknown kind": ("kind: binary", "kind: bool", 8, "binary"),
    "negative effect": ("smallest_effect: 2%", "smallest_effect: -2%", 17, "2% of the baseline"),
    "no effect": ("smallest_effect: 2%", "smallest_effect: 0%", 17, "above 0"),
    "alpha of one": ("alpha: 0.01", "alpha: 1", 18, "0.5"),
    "no primary": ("    primary: bought\n", "", 2, "is missing"),
}


@pytest.mark.parametrize(("old", "new", "line", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    assert old in FULL
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, FULL.replace(old, new, 1))
    [finding] = raised.value.findings
    assert (finding.line, said in str(finding)) == (line, True), finding


@pytest.mark.parametrize("text", ["", "[]", "experiments: {}", "experiments:\n  a: 1\n", "\x00", "a: &a [*a]"])
def test_nonsense_is_a_finding(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        loaded(tmp_path, text)


def test_a_file_that_is_not_there_is_a_finding() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiments("nowhere.yaml")


GATEWAY = """\
upstreams: {cpu: {endpoints: [127.0.0.1:8001]}}
models:
  photos:
    variants: {a: {upstream: cpu, model: m}, b: {upstream: cpu, model: n}, c: {upstream: cpu, model: o}}
    split: {a: 3, b: 1, c: 0}
    sticky: {metadata: x-user}
  texts:
    variants: {a: {upstream: cpu, model: m}, b: {upstream: cpu, model: n}}
    split: {a: 1, b: 1}
    sticky: {metadata: x-other}
  loose:
    variants: {a: {upstream: cpu, model: m}, b: {upstream: cpu, model: n}}
experiments:
"""
REST = "outcomes: {ok: {kind: binary, better: higher}}, primary: ok, smallest_effect: 2%"


def of_gateway(tmp_path: Path, experiments: str) -> Loaded:
    file = tmp_path / "gateway.yaml"
    file.write_text(GATEWAY + experiments.replace("REST", REST))
    return load(file, {})


def test_arms_are_the_models_split_unless_they_are_said(tmp_path: Path) -> None:
    config = of_gateway(tmp_path, "  one: {model: photos, REST}\n").config
    plan = plans_of(config)["one"]
    assert (plan.shares, plan.baseline, plan.model) == ({"a": 3, "b": 1}, "a", "photos")
    arms = routes_of(config).public["photos"].experiments
    assert [(each.name, each.begin, each.end) for each in arms] == [("one", 0.0, 1.0)]


def test_requests_are_known_only_where_outcomes_may_be_reported_by_them(tmp_path: Path) -> None:
    measured = "outcomes: {ok: {kind: ratio, better: lower, measure: error}}, primary: ok, smallest_effect: 2%"
    for told, knows in (("REST", True), ("request_ids: false, REST", False), (measured, False)):
        (running,) = running_of(of_gateway(tmp_path, f"  one: {{model: photos, {told}}}\n").config, {})
        assert running.knows_requests is knows
    assert running.measures == (("ok", "error"),)


def test_experiments_of_a_layer_have_their_shares_one_after_the_other(tmp_path: Path) -> None:
    told = "".join(
        f"  {name}: {{model: photos, layer: l, share: {s}, REST}}\n" for name, s in (("x", 0.25), ("y", 0.5))
    )
    config = of_gateway(tmp_path, told).config
    assert [(each.begin, each.end) for each in routes_of(config).public["photos"].experiments] == [
        (0, 0.25),
        (0.25, 0.75),
    ]
    stopped = routes_of(config, {"x": "b", "y": "gone"}).public["photos"].experiments
    assert [each.ended_with for each in stopped] == ["b", "a"]


def test_what_the_gateway_measures_is_told_to_those_who_measure(tmp_path: Path) -> None:
    outcomes = """outcomes: {
        same: {kind: ratio, better: higher, measure: agreement, reference: c},
        other: {kind: binary, better: lower, measure: disagreement, reference: c},
        sure: {kind: numeric, better: higher, measure: confidence, output: SCORES},
        any: {kind: numeric, better: higher, measure: confidence},
        late: {kind: duration, better: lower, measure: latency}}, primary: other, smallest_effect: 2%"""
    told = f"  one: {{model: photos, {outcomes}}}\n"
    with pytest.raises(ConfigError, match="'c' is no shadow of 'photos'"):
        of_gateway(tmp_path, told)
    file = tmp_path / "gateway.yaml"
    file.write_text(GATEWAY.replace("  photos:\n", "  photos:\n    shadow: {c: {}, b: {}}\n") + told)
    config = load(file, {}).config
    (running,) = running_of(config, {})
    assert running.measures == (("late", "latency"),)
    assert running.agreements == (("same", "c", 1.0), ("other", "c", 0.0))
    assert running.confidences == (("sure", "SCORES"), ("any", ""))
    file.write_text(file.read_text().replace("reference: c", "reference: b"))
    with pytest.raises(ConfigError, match="'b' agrees with itself, and would always seem well"):
        load(file, {})


@pytest.mark.parametrize(
    ("measure", "better"),
    [("latency", "higher"), ("error", "higher"), ("disagreement", "higher"), ("agreement", "lower")],
)
def test_what_can_only_be_better_in_one_direction_is_not_taken_for_the_other(
    tmp_path: Path, measure: str, better: str
) -> None:
    reference = ", reference: c" if "agreement" in measure else ""
    outcomes = f"outcomes: {{it: {{kind: ratio, better: {better}, measure: {measure}{reference}}}}}"
    with pytest.raises(ConfigError) as caught:
        of_gateway(tmp_path, f"  one: {{model: photos, {outcomes}, primary: it, smallest_effect: 2%}}\n")
    right = {"higher": "lower", "lower": "higher"}[better]
    assert f"outcomes.it: '{measure}' that is {better} is worse; better: {right}" in str(caught.value)


@pytest.mark.parametrize(("window", "warns"), [("9s", True), ("10s", False)])
def test_a_window_in_which_nothing_measured_would_be_written_is_told_of(
    tmp_path: Path, window: str, warns: bool
) -> None:
    outcomes = "outcomes: {slow: {kind: duration, better: lower, measure: latency}}, primary: slow, smallest_effect: 2%"
    loaded = of_gateway(tmp_path, f"  one: {{model: photos, window: {window}, {outcomes}}}\n")
    told = [str(each) for each in loaded.warnings]
    assert any("one.window: 'slow' is measured by the gateway, and may be" in each for each in told) is warns, told
    reported = of_gateway(tmp_path, f"  one: {{model: photos, window: {window}, REST}}\n")
    assert not [each for each in reported.warnings if "window" in str(each)]


MISSING = {
    "no model": ("  one: {arms: {a: 1, b: 1}, REST}\n", "experiments.one.model: is missing"),
    "no such model": ("  one: {model: photo, REST}\n", "no public model 'photo'; known: photos, texts, loose"),
    "no sticky": ("  one: {model: loose, arms: {a: 1, b: 1}, REST}\n", "'loose' has no 'sticky'"),
    "no arms": (
        "  one: {model: loose, REST}\n",
        "experiments.one.arms: is missing, and the split of 'loose' has fewer",
    ),
    "no such arm": (
        "  one: {model: photos, arms: {a: 1, d: 1}, REST}\n",
        "'photos' has no variant 'd'; known: a, b, c",
    ),
    "no such baseline": ("  one: {model: photos, baseline: c, REST}\n", "no arm 'c'; known: a, b"),
    "two on one model": (
        "  one: {model: photos, REST}\n  two: {model: photos, REST}\n",
        "experiments.two.layer: 'one', 'two' are all about 'photos'",
    ),
    "too much of a layer": (
        "  one: {model: photos, layer: l, share: 0.6, REST}\n  two: {model: photos, layer: l, share: 0.6, REST}\n",
        "experiments.two.share: experiments of layer 'l' have 1.2 of its units together",
    ),
    "other units in a layer": (
        "  one: {model: photos, layer: l, share: 0.5, REST}\n  two: {model: texts, layer: l, share: 0.5, REST}\n",
        "layer 'l' is shared with 'one', whose model has another 'sticky'",
    ),
    "a store that is none": (
        "  one: {model: photos, REST}\nstore: {url: 'mysql://me:secret@db/x'}\n",
        "is no URL of a store",
    ),
    "a key that is none": ("  one: {model: photos, REST}\nstore: {unit_key: secret}\n", "too short or too long"),
    "a variable that is none": (
        "  one: {model: photos, REST}\nstore: {url: '${NONE}'}\n",
        "the environment has no NONE",
    ),
}


@pytest.mark.parametrize(("told", "finding"), MISSING.values(), ids=MISSING)
def test_check_says_what_an_experiment_lacks(tmp_path: Path, told: str, finding: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_gateway(tmp_path, told)
    assert finding in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_gateways_config_is_a_plan_for_analyse_and_its_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    told = "  one: {model: photos, REST}\nstore: {url: 'postgresql://me:secret@db/x', unit_key: secretsecretsecret}\n"
    config = of_gateway(tmp_path, told).config
    assert list(load_experiments(tmp_path / "gateway.yaml")) == ["one"]
    changed = config.model_copy(update={"store": Store()})
    shown = config.model_dump_json() + repr(config) + str(restart_notices(config, changed, "g"))
    assert "secret" not in shown
    assert "store.url" in shown


BANDIT = """outcomes: {bought: {kind: binary, better: higher}, spent: {kind: numeric, better: higher},
    slow: {kind: quantile, quantile: 0.9, better: lower}, errors: {kind: ratio, better: lower}},
    primary: bought, smallest_effect: 2%, window: 10m, model: photos"""


def test_a_bandit_has_even_arms_and_its_reward_is_the_primary_outcome_unless_it_is_said(tmp_path: Path) -> None:
    told = f"  one: {{{BANDIT}, bandit: {{epoch: 1h, floor: 10%, epochs: 12}}}}\n"
    config = of_gateway(tmp_path, told).config
    plan = bandits_of(config)["one"]
    assert plan.bandit == BanditPlan(("a", "b"), plan.primary, 0.1, 12, 3600.0)
    assert dict(plan.shares) == {"a": 1.0, "b": 1.0}
    (arms,) = routes_of(config).public["photos"].experiments
    assert (arms.slices, arms.epochs, arms.maybe_assign("anna")) == (12, (), ("waiting:one", "a"))
    told = f"  one: {{{BANDIT}, bandit: {{epoch: 1h, reward: spent}}}}\n"
    assert bandits_of(of_gateway(tmp_path, told).config)["one"].bandit.reward.name == "spent"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "finding"),
    [
        ("bandit: {}", "experiments.one.bandit.epoch: is missing"),
        ("bandit: {epoch: 1h, reward: seen}", "bandit.reward: no outcome 'seen'; known: bought, spent, slow, errors"),
        ("bandit: {epoch: 1h, reward: slow}", "outcomes.slow.kind: quantile can't be told from units"),
        ("bandit: {epoch: 1h, reward: errors}", "outcomes.errors.kind: ratio can't be told"),
        ("bandit: {epoch: 1h}, guardrails: {slow: {worse_by: 5%}}", "outcomes.slow.kind: quantile can't be told"),
        ("bandit: {epoch: 1h, floor: 0.5}", "bandit.floor: 0.5 for each of 2 arms leaves nothing to move; below 0.5"),
        ("bandit: {epoch: 1h, floor: 0.4}, arms: {a: 1, b: 1, c: 1}", "0.4 for each of 3 arms leaves nothing"),
        ("bandit: {epoch: 1h, floor: 0}", "bandit.floor: is 0"),
        ("bandit: {epoch: 1h}, arms: {a: 90, b: 10}", "arms: have shares of their own, and a bandit begins with even"),
        ("bandit: {epoch: 1m, epochs: 10}", "window: is as long as all epochs together, so shares would stay even"),
        ("bandit: {epoch: 1h, epochs: 1}", "bandit.epochs: is 1"),
    ],
)
def test_check_says_why_a_bandit_cannot_work(tmp_path: Path, more: str, finding: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_gateway(tmp_path, f"  one: {{{BANDIT}, {more}}}\n")
    assert finding in str(caught.value)


def test_a_bandit_needs_a_window(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="window: is missing, and a bandit learns from units that have had their"):
        of_gateway(tmp_path, f"  one: {{{BANDIT.replace('window: 10m, ', '')}, bandit: {{epoch: 1h}}}}\n")


def test_a_bandit_and_a_rollout_cannot_both_move_a_models_units(tmp_path: Path) -> None:
    rollout = "    rollout: {name: move, from: a, to: c, steps: [{share: 5%, soak: 1m}]}\n"
    text = GATEWAY.replace("  photos:\n", "  photos:\n" + rollout)
    (tmp_path / "gateway.yaml").write_text(text + f"  one: {{{BANDIT}, bandit: {{epoch: 1h}}}}\n")
    with pytest.raises(ConfigError, match="one of the two at a time"):
        load(tmp_path / "gateway.yaml", {})


def test_check_warns_of_what_a_bandit_does_not_tell_or_forgets(tmp_path: Path) -> None:
    told = f"  one: {{{BANDIT}, secondary: [slow], bandit: {{epoch: 24h}}}}\nstore: {{retention: 240h}}\n"
    found = "\n".join(map(str, of_gateway(tmp_path, told).warnings))
    assert "experiments.one.secondary[0]: 'slow' is a quantile, which is not compared where shares move" in found
    assert "store.retention: is over before all epochs of 'one' are" in found


def test_check_says_what_a_bandit_does_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.config.bandit_check.find_spec", lambda name: None)
    [warning] = of_gateway(tmp_path, f"  one: {{{BANDIT}, bandit: {{epoch: 1h}}}}\n").warnings
    assert "after the first epoch no further epoch begins, and units of those to come keep the baseline" in str(warning)
    assert "pip install 'inference-gateway[experiments]'" in str(warning)
