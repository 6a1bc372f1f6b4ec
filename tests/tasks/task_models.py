"""The models of one task, built into a repository of the test's own and served by a real Triton."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gateway.models import catalogue

CHECKOUT = Path(__file__).parents[2]


def build_models(folder: Path, models: Sequence[str]) -> Path:
    """A model repository in `folder`, the configs beside what is built of them."""
    for model in models:
        shutil.copytree(CHECKOUT / "model_repository" / model, folder / model, ignore=shutil.ignore_patterns("[0-9]*"))
    catalogue.build(models, folder)
    return folder
