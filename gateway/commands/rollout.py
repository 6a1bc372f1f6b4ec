"""I/O: `rollout`: how far rollouts are, and what people do to them."""

from __future__ import annotations

import argparse
import os

from gateway.commands.arguments import Commands, add_command, say


def add(commands: Commands) -> None:
    rollout = add_command(commands, "rollout", None, "a model's move from one variant to another (docs/rollouts.md)")
    actions = rollout.add_subparsers(metavar="ACTION", required=True)
    listed = add_command(actions, "list", _list, "how far each rollout of a config is")
    show = add_command(actions, "show", _show, "what it waits for, its guardrails and its history")
    promote = add_command(actions, "promote", _do, "go to the next step now, or from the last one to all units")
    pause = add_command(actions, "pause", _do, "stay at this step; guardrails still take it back")
    resume = add_command(actions, "resume", _do, "go on by itself after a pause")
    abort = add_command(actions, "abort", _do, "give all units back to the old variant, for good")
    for each in (show, promote, pause, resume, abort):
        each.add_argument("name", metavar="NAME", help="of the rollout")
    for name, each in {"promote": promote, "pause": pause, "resume": resume, "abort": abort}.items():
        each.set_defaults(action=name)
    for each in (listed, show, promote, pause, resume, abort):
        each.add_argument("--config", required=True, metavar="FILE", help="the gateway's config file")
        each.add_argument("--store", metavar="URL", help="of the store, instead of the config's")


def _list(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415

    for line in commands_of(arguments.config, arguments.store).listed():
        say(line)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415

    for line in commands_of(arguments.config, arguments.store).shown(arguments.name):
        say(line)
    return 0


def _do(arguments: argparse.Namespace) -> int:
    import getpass  # noqa: PLC0415

    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415
    from gateway.experiments.rollout import Command  # noqa: PLC0415

    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        who = f"user {os.getuid()}"
    say(commands_of(arguments.config, arguments.store).do(arguments.name, Command(arguments.action), who))
    return 0
