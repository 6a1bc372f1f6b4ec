"""The models of one task, built into a repository of the test's own and served by a real Triton."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gateway.models import catalogue

CHECKOUT = Path(__file__).parents[2]


def build_models(folder: Path, models: Sequence[str]) -> Path:
    """A model repository in `folder`, the configs beside what is built of them."""
    for model in models:
        shutil.copytree(CHECKOUT / "model_repository" / model, folder / model, ignore=shutil.ignore_patterns("[0-9]*"))
    catalogue.build(models, folder)
    return folder


def example(name: str, repository: Path, *endpoints: str) -> dict[str, Any]:
    """deploy/examples/NAME.yaml for this repository and these Tritons, on free ports and without an access log."""
    text = (CHECKOUT / "deploy/examples" / f"{name}.yaml").read_text("utf-8")
    config: dict[str, Any] = yaml.safe_load(text.replace("../../model_repository", str(repository)))
    config |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}}
    config["telemetry"] = {"access_log": {"destination": "none"}}
    config["upstreams"]["local"]["endpoints"] = list(endpoints)
    return config


def written(folder: Path, config: dict[str, Any]) -> Path:
    """The file of a config."""
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return file
