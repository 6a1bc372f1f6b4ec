"""I/O: `new`: something of a user's own, from a template."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from gateway.commands.arguments import Commands, add_command, say


def add(commands: Commands) -> None:
    new = add_command(commands, "new", None, "something of your own, from a template").add_subparsers(
        metavar="KIND", required=True
    )
    step = add_command(new, "step", _step, "a package with a pipeline's step: code, test, entry point, config")
    step.add_argument("name", metavar="NAME", help="of the step, such as tidy_text")
    step.add_argument("--folder", type=Path, metavar="FOLDER", help="to make (default: NAME)")


def _step(arguments: argparse.Namespace) -> int:
    from gateway.new_step import new_step  # noqa: PLC0415

    made = new_step(arguments.name, arguments.folder)
    folder = made[0].parent
    say(f"made {', '.join(str(file) for file in made)}")
    say(f"next:\n  cd {shlex.quote(str(folder))}")
    for line in (
        "python -m pip install -e '.[dev]'                # its name is then known to configs; pytest and mypy",
        "python -m pytest && python -m mypy",
        "inference-gateway check gateway.yaml",
        "inference-gateway serve --config gateway.yaml    # answers at 127.0.0.1:9001, with a Triton or without",
    ):
        say(f"  {line}")
    return 0
