"""I/O: `demo`: real models behind a local Triton, and what the gateway does with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from gateway.commands.arguments import Commands, WrongLine, add_command
from gateway.commands.checkout import CHECKOUT, add_repository
from gateway.errors import Misused


def add(commands: Commands) -> None:
    demo = add_command(commands, "demo", _demo, "build, start Triton and gateway, show what they do, stay up")
    what = demo.add_mutually_exclusive_group()
    what.add_argument("--task", metavar="NAME", help="only this one, such as 'reading'; the demo's table names all")
    what.add_argument("--all", action="store_true", help="every task; says first how much there is to fetch")
    what.add_argument(
        "--experiment",
        nargs="?",
        const="whole",
        choices=("whole", "short"),
        help="a variant goes live with evidence, and broken ones are taken back; 'short': two of them",
    )
    demo.add_argument("--input", type=Path, metavar="FILE", help="with --task: your own picture, text or recording")
    demo.add_argument("--config", type=Path, metavar="FILE", help="default: the example that serves the tasks")
    demo.add_argument("--listen", default="127.0.0.1:9001", metavar="HOST:PORT")
    demo.add_argument("--admin-listen", default="127.0.0.1:9002", metavar="HOST:PORT")
    demo.add_argument("--once", action="store_true", help="end after the table")
    demo.add_argument(
        "--with-experiment",
        action="store_true",
        help="after the table, beside it: --experiment short, up to two minutes",
    )
    add_repository(demo)


def _demo(arguments: argparse.Namespace) -> int:
    examples = CHECKOUT / "deploy" / "examples"
    if arguments.input is not None and arguments.task is None:
        raise WrongLine("--input needs --task, which says what the file is for")
    if not arguments.repository.is_dir() or (arguments.config is None and not examples.is_dir()):
        raise Misused(
            "The demo's models and configs are part of the project's checkout and not of its package. Run it there: "
            "`make run`, or .venv/bin/inference-gateway demo."
        )
    if arguments.experiment is not None:
        return _demo_experiment(arguments)
    if arguments.with_experiment and arguments.once:
        raise WrongLine("--with-experiment comes after the table, and --once ends there")
    from gateway.demo import showcase  # noqa: PLC0415
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.telemetry.process_log import log_to_stderr  # noqa: PLC0415

    log_to_stderr("error" if arguments.with_experiment else "warning")  # what its variants do wrong is meant
    settings = showcase.DemoSettings(
        arguments.config,
        examples,
        arguments.repository,
        arguments.listen,
        arguments.admin_listen,
        arguments.once,
        showcase.tasks_of(arguments.task, every=arguments.all),
        arguments.input,
        arguments.with_experiment,
    )
    showcase.prepare(settings)
    return event_loop.run(showcase.run(settings))


def _demo_experiment(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        raise WrongLine("--experiment has a config of its own, so --config says nothing")
    from gateway.demo import experiment  # noqa: PLC0415
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.telemetry.process_log import log_to_stderr  # noqa: PLC0415

    log_to_stderr("error")
    settings = experiment.ScenarioSettings(
        arguments.repository, arguments.listen, arguments.admin_listen, arguments.experiment == "short"
    )
    experiment.prepare(settings)
    return event_loop.run(experiment.run(settings))
