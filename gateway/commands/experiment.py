"""I/O: `experiment`: verdicts over files and over the store, and what people do to an experiment."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gateway.commands.arguments import Commands, add_command, at_least_one, say


def add(commands: Commands) -> None:
    experiment = add_command(commands, "experiment", None, "which variant is better, by how much, and how sure that is")
    actions = experiment.add_subparsers(metavar="ACTION", required=True)
    analyse = add_command(
        actions,
        "analyse",
        _analyse,
        "the verdict over files of exposures and outcomes (docs/experiments.md)",
    )
    analyse.add_argument("--exposures", required=True, metavar="FILE", help="CSV or Parquet: unit, arm, at")
    analyse.add_argument("--outcomes", required=True, metavar="FILE", help="CSV or Parquet: unit, name, value, at")
    analyse.add_argument("--config", required=True, metavar="FILE", help="YAML with 'experiments'")
    analyse.add_argument("--name", metavar="NAME", help="which of the file's experiments (default: the only one)")
    analyse.add_argument("--each", type=at_least_one, metavar="N", help="also the verdict after every N units")
    analyse.add_argument("--json", action="store_true", help="for machines")

    _add_store_commands(actions)


def _add_store_commands(actions: Commands) -> None:
    listed = add_command(actions, "list", _list, "the experiments of a config, and their units in the store")
    report = add_command(actions, "report", _report, "the verdict so far, from the store")
    stop = add_command(actions, "stop", _stop, "end it: every replica gives everybody one arm, within seconds")
    diffs = add_command(actions, "diffs", _diffs, "answers that shadows kept since they disagreed")
    for each in (report, stop, diffs):
        each.add_argument("name", metavar="NAME", help="of the experiment")
    for each in (listed, report, stop, diffs):
        each.add_argument("--config", required=True, metavar="FILE", help="the gateway's config file")
    for each in (listed, report, stop):
        each.add_argument("--store", metavar="URL", help="of the store, instead of the config's")
    report.add_argument("--json", action="store_true", help="for machines, with what it was on the way here")
    report.add_argument("--html", metavar="FILE", help="also write a page with plots")
    stop.add_argument("--winner", metavar="ARM", help="that everybody gets (default: the baseline)")
    diffs.add_argument("--most", type=at_least_one, default=20, metavar="N", help="of the latest (default: 20)")


def _analyse(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.files import analyse, plan_of  # noqa: PLC0415

    plan = plan_of(arguments.config, arguments.name)
    lines = analyse(
        plan,
        arguments.exposures,
        arguments.outcomes,
        each=arguments.each,
        as_json=arguments.json,
        now=time.time(),
    )
    for line in lines:
        say(line)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import listed, source_of  # noqa: PLC0415

    for line in listed(source_of(arguments.config, arguments.store)):
        say(line)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.report_page import page  # noqa: PLC0415
    from gateway.experimentation.reports import source_of, stored_report  # noqa: PLC0415

    source = source_of(arguments.config, arguments.store)
    found = stored_report(source, arguments.name, history=arguments.json or arguments.html is not None)
    if arguments.html is not None:
        text = page(found.plan, found.report, found.looks, found.spread, found.ended)
        Path(arguments.html).write_text(text, encoding="utf-8")
    say(found.as_json() if arguments.json else "\n".join(found.lines()))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import source_of, stop  # noqa: PLC0415

    say(stop(source_of(arguments.config, arguments.store), arguments.name, arguments.winner))
    return 0


def _diffs(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import disagreements  # noqa: PLC0415

    for line in disagreements(arguments.config, arguments.name, arguments.most):
        say(line)
    return 0
