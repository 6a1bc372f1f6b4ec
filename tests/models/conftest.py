"""The repository of the checkout, its CPU models built, and a copy that a test may spoil."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gateway.models import catalogue

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Never to be changed by a test: other tests serve it."""
    folder = CHECKOUT / "model_repository"
    catalogue.build((), folder)
    return folder


@pytest.fixture
def empty_repository(tmp_path: Path) -> Path:
    """Configs and labels without weights, as after a checkout."""
    shutil.copytree(CHECKOUT / "model_repository", tmp_path / "models", ignore=shutil.ignore_patterns("[0-9]*"))
    return tmp_path / "models"


@pytest.fixture(scope="session")
def golden() -> dict[str, list[dict[str, Any]]]:
    """The cases of tests/data/make_golden.py, by model."""
    names = ("magika", "langid")
    folder = CHECKOUT / "tests/data"
    return {name: json.loads((folder / f"golden_{name}.json").read_text(encoding="utf-8")) for name in names}
