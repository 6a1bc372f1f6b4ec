"""Config: reads the experiments of a file, which may have nothing else in it, so that data can be judged anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from pydantic import Field, ValidationError

from gateway.config.experiments import Experiment
from gateway.config.findings import ConfigError, Finding, Path, dotted, show
from gateway.config.load import content, load, translated
from gateway.config.schema import Config
from gateway.config.section import Section
from gateway.config.text import Document, parse
from gateway.config.units import Name
from gateway.experiments.plan import Plan
from gateway.experiments.rollout import RolloutPlan


class ExperimentsFile(Section):
    """A file with experiments alone, for `inference-gateway experiment analyse`."""

    experiments: Mapping[Name, Experiment] = Field(
        min_length=1, max_length=1000, description="Experiments, by names of your choice."
    )


@cache
def _schema() -> dict[str, Any]:
    return ExperimentsFile.model_json_schema()


def load_experiments(path: str | FilePath, environ: Mapping[str, str] | None = None) -> Mapping[str, Plan]:
    """Read a file with experiments, or a gateway's config file that has some.

    environ: for variables in a gateway's config.

    :raises ConfigError: with every finding and its line.
    """
    source = str(path)
    document = parse(content(source), source)
    findings = list(document.findings)
    plans: dict[str, Plan] = {}
    data = document.data
    if isinstance(data, dict) and "upstreams" in data:
        return plans_of(load(path, environ or {}).config)
    if not isinstance(data, dict):
        if not findings:
            findings.append(Finding(source, 0, "", f"is {show(data)}", "a mapping with 'experiments'"))
        raise ConfigError(findings)
    try:
        loaded = ExperimentsFile.model_validate(data)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            finding = translated(each, data, _schema())
            if finding is not None:
                findings.append(_at(source, document, *finding))
        raise ConfigError(findings) from error
    for name, experiment in loaded.experiments.items():
        at: Path = ("experiments", name)
        problems = list(experiment.problems())
        if experiment.arms is None:
            problems.append((("arms",), "is missing", "a mapping of arms to shares, since there is no model here"))
        findings += [_at(source, document, (*at, *where), wrong, right) for where, wrong, right in problems]
        if not problems:
            plans[name] = experiment.plan(name)
    if findings:
        raise ConfigError(findings)
    return plans


def _at(source: str, document: Document, path: Path, wrong: str, right: str) -> Finding:
    return Finding(source, document.line(path), dotted(path), wrong, right)


def plans_of(config: Config) -> dict[str, Plan]:
    """The experiments of a gateway's config, by name."""
    plans = {}
    for name, each in config.experiments.items():
        model = config.models.get(each.model or "")
        plans[name] = each.plan(name, None if model is None else model.split)
    return plans


def bandits_of(config: Config) -> dict[str, Plan]:
    """Those whose shares follow a reward, by name."""
    return {name: plan for name, plan in plans_of(config).items() if plan.bandit is not None}


def rollouts_of(config: Config) -> dict[str, RolloutPlan]:
    """The rollouts of a gateway's config, by name."""
    found = {name: model.rollout for name, model in config.models.items()}
    return {each.name: each.plan(model) for model, each in found.items() if each is not None}
