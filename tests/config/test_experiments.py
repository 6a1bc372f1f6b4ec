"""Config of experiments: what it becomes, and findings with their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError
from gateway.config.experiment_file import load_experiments
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, Missing, OutcomeSpec, PerUnit

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
