"""I/O: the project's checkout, which has the config of the demo and the model repository, if this package is in one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.errors import Misused

CHECKOUT: Final = Path(__file__).resolve().parents[2]
"""An installed package is in none."""

_REPOSITORY: Final = CHECKOUT / "model_repository"


def add_repository(command: argparse.ArgumentParser) -> None:
    """The option that names the models: of the checkout, or else in the current folder, as `models add` makes them."""
    default = _REPOSITORY if _REPOSITORY.is_dir() else Path("model_repository")
    command.add_argument("--repository", type=Path, default=default, metavar="FOLDER")


def require_repository(folder: Path, models: Sequence[str] = ()) -> None:
    if not folder.is_dir():
        raise Misused(
            f"There is no folder {folder} with models. `inference-gateway models add FILE` puts one of your own there, "
            "--repository FOLDER names another, and the project's checkout has those of the demo."
        )
    for model in models:
        if not (folder / model).is_dir():
            raise Misused(f"{folder} has no model {model!r}; `inference-gateway models list` names those it has.")
