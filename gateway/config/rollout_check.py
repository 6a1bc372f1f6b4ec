"""Config: findings of rollouts that need more than their own section. Pure, but that it asks whether SciPy is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from importlib.util import find_spec

from gateway.config.experiments import OutcomeSection
from gateway.config.findings import Path, Problem, Severity, known
from gateway.config.models import Model
from gateway.config.rollouts import Rollout
from gateway.config.schema import Config

_TOLD = 20  # reports beyond a quantile, below which its interval is wide


def check_rollouts(config: Config) -> Iterator[Problem]:
    """Problems of rollouts, alone and beside what else the file has."""
    first: dict[str, str] = {}
    for name, model in config.models.items():
        rollout = model.rollout
        if rollout is None:
            continue
        at: Path = ("models", name, "rollout")
        yield from (Problem((*at, *path), wrong, right) for path, wrong, right in rollout.problems())
        other = first.setdefault(rollout.name, name)
        if other != name:
            wrong = f"'{rollout.name}' is the rollout of '{other}', too"
            yield Problem((*at, "name"), wrong, "a name that no other has")
        if rollout.name in config.experiments:
            yield Problem((*at, "name"), f"'{rollout.name}' is an experiment", "a name that no other has")
        yield from _variants(at, rollout, model)
        yield from _evidence(at, rollout, model)
        yield from check_references((*at, "guardrails"), rollout.guardrails, name, model, {rollout.after})
        for key, guardrail in rollout.guardrails.items():
            if guardrail.reference is not None and guardrail.kind == "ratio":
                wrong = "is never known, nor breached, while all answers agree on one side and none on the other"
                yield Problem((*at, "guardrails", key, "kind"), wrong, "kind: numeric, which is exact there")
        about = [key for key, each in config.experiments.items() if each.model == name]
        if about:
            wrong = f"experiment '{about[0]}' assigns units of '{name}', which the rollout would not move"
            yield Problem(at, wrong, "one of the two at a time")


def check_references(
    at: Path, outcomes: Mapping[str, OutcomeSection], name: str, model: Model, new: Set[str]
) -> Iterator[Problem]:
    """Problems of outcomes that are agreement, of an experiment or a rollout.

    at: where they stand. new: the variants that are judged by them.
    """
    for key, outcome in outcomes.items():
        if outcome.reference in new:
            wrong = f"'{outcome.reference}' agrees with itself, and would always seem well"
            yield Problem((*at, key, "reference"), wrong, "the variant that it is compared with, or one beside both")
        elif outcome.reference is not None and outcome.reference not in model.shadow:
            wrong = f"'{outcome.reference}' is no shadow of '{name}', so no answer is compared with its own"
            right = f"'models.{name}.shadow.{outcome.reference}' with a share of the calls"
            yield Problem((*at, key, "reference"), wrong, right)


def _variants(at: Path, rollout: Rollout, model: Model) -> Iterator[Problem]:
    variants = tuple(model.variants or ())
    for key, variant in (("from", rollout.before), ("to", rollout.after)):
        if variant not in variants:
            yield Problem((*at, key), f"no variant '{variant}'", known(variants, variant))
    split = model.split or dict.fromkeys(variants[:1], 1.0)
    if rollout.before in variants and not split.get(rollout.before):
        wrong = f"'{rollout.before}' has no share of the split, so there is nothing to move"
        yield Problem((*at, "from"), wrong, "the variant that serves now")
    if split.get(rollout.after):
        wrong = f"'{rollout.after}' has a share of the split already"
        yield Problem((*at, "to"), wrong, "no share in 'split': the rollout gives it one")


def _evidence(at: Path, rollout: Rollout, model: Model) -> Iterator[Problem]:
    """What guardrails and units need."""
    if model.sticky is None:
        right = "'sticky' with the metadata key that tells a unit"
        if rollout.guardrails:
            yield Problem((*at, "guardrails"), "need units, and without 'sticky' nothing says who is one", right)
        for index, step in enumerate(rollout.steps):
            if step.units:
                yield Problem((*at, "steps", index, "units"), "without 'sticky' nothing says who is a unit", right)
        wrong = "without 'sticky' a caller's calls go to both variants in turn"
        yield Problem(at, wrong, right, Severity.WARNING)
    if rollout.guardrails and find_spec("scipy") is None:
        wrong = "need SciPy, which is not installed here; it stays in its first step, without guardrails"
        yield Problem((*at, "guardrails"), wrong, "pip install 'inference-gateway[experiments]'", Severity.WARNING)
    if any(step.must_hold for step in rollout.steps):
        for name, guardrail in rollout.guardrails.items():
            if guardrail.measure == "error" and guardrail.kind != "binary":
                wrong = f"is never known to hold while no call fails at all, as of {guardrail.kind}"
                right = "kind: binary, which is exact there"
                yield Problem((*at, "guardrails", name, "kind"), wrong, right, Severity.WARNING)
    most = max((step.units or 0 for step in rollout.steps), default=0)
    for name, guardrail in rollout.guardrails.items():
        tail = 0.0 if guardrail.quantile is None else min(guardrail.quantile, 1.0 - guardrail.quantile)
        if guardrail.quantile is not None and 0 < round(most * tail, 6) < _TOLD:  # 1.0 - 0.8 is a little less than 0.2
            wrong = f"of {most} units too few are beyond the {guardrail.quantile:g} quantile to tell much of it"
            right = f"steps of {_TOLD / tail:.0f} units, or a quantile nearer to the middle"
            yield Problem((*at, "guardrails", name, "quantile"), wrong, right, Severity.WARNING)
