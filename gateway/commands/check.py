"""I/O: `check`: what is wrong with a config file."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from gateway.commands.arguments import Commands, add_command, say

if TYPE_CHECKING:
    from gateway.config import Finding, Loaded


def add(commands: Commands) -> None:
    check = add_command(commands, "check", _check, "check a config file: exit 0, or 2 with every finding and its line")
    check.add_argument("file", metavar="FILE")
    check.add_argument(
        "--ask-triton",
        action="store_true",
        help="also compare pipelines with their models, as the servers describe these",
    )


def _check(arguments: argparse.Namespace) -> int:
    from gateway.config import load  # noqa: PLC0415

    loaded = load(arguments.file, os.environ)
    for finding in loaded.warnings:
        say(str(finding))
    if arguments.ask_triton:
        code = _check_fitting(loaded)
        if code:
            return code
    say(f"{arguments.file}: valid, {len(loaded.config.models)} public models, {len(loaded.config.upstreams)} upstreams")
    return 0


def _check_fitting(loaded: Loaded) -> int:
    from gateway.config import Severity  # noqa: PLC0415
    from gateway.fitting import fitting  # noqa: PLC0415
    from gateway.process import event_loop  # noqa: PLC0415

    found: list[Finding] = []

    async def ask() -> int:
        found.extend(await fitting(loaded))
        return 0

    event_loop.run(ask())
    for finding in found:
        print(finding, file=sys.stderr)  # noqa: T201
    if any(finding.severity is Severity.ERROR for finding in found):
        return 2
    return 1 if found else 0
