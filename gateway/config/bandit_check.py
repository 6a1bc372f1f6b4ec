"""Config: findings of bandits that need more than their own section. Pure, but that it asks whether SciPy is here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from gateway.config.experiments import Experiment, too_high
from gateway.config.findings import Path, Problem, Severity
from gateway.config.schema import Config
from gateway.experiments.epochs import WITHOUT_SHARES


def check_bandit(at: Path, experiment: Experiment, config: Config) -> Iterator[Problem]:
    """at: where the experiment stands."""
    bandit = experiment.bandit
    if bandit is None:
        return
    model = config.models.get(experiment.model or "")
    if experiment.arms is None and model is not None:
        arms = [arm for arm, share in (model.split or {}).items() if share > 0.0]
        if len(arms) > 1 and bandit.floor * len(arms) >= 1.0:
            yield Problem((*at, "bandit", "floor"), *too_high(bandit.floor, len(arms)))
    for index, name in enumerate(experiment.secondary):
        outcome = experiment.outcomes.get(name)
        if outcome is not None and outcome.kind in ("ratio", "quantile"):
            wrong = f"'{name}' is a {outcome.kind}, which is not compared where shares move"
            right = "kind: binary, numeric or duration"
            yield Problem((*at, "secondary", index), wrong, right, Severity.WARNING)
    if find_spec("scipy") is None:
        wrong = f"needs SciPy, which is not installed here; after the first epoch {WITHOUT_SHARES}"
        yield Problem((*at, "bandit"), wrong, "pip install 'inference-gateway[experiments]'", Severity.WARNING)
    whole = bandit.epoch * bandit.epochs + (experiment.window or 0.0)
    if config.store.retention < whole:
        wrong = f"is over before all epochs of '{at[-1]}' are, so what its first units have shown is forgotten"
        right = f"at least {whole / 86_400.0:.3g} days"
        yield Problem(("store", "retention"), wrong, right, Severity.WARNING)
