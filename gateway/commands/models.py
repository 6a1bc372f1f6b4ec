"""I/O: `models`: the models of the repository are built, added, listed and measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gateway.commands.arguments import Commands, add_command, at_least_one, say, shape, whole
from gateway.commands.checkout import add_repository, require_repository


def add(commands: Commands) -> None:
    models = add_command(commands, "models", None, "build or list the models of the repository")
    actions = models.add_subparsers(metavar="ACTION", required=True)
    build = add_command(actions, "build", _build, "build weights from their pinned sources")
    build.add_argument(
        "names", nargs="*", metavar="MODEL", help="default: all that need no GPU and that the demo shows"
    )
    build.add_argument("--force", action="store_true", help="build also what is current")
    added = add_command(actions, "add", _add, "add an ONNX model of your own: from its file to a client's call")
    added.add_argument("file", type=Path, metavar="FILE", help="the ONNX model")
    added.add_argument("--name", default="", metavar="NAME", help="at Triton (default: the file's)")
    added.add_argument("--as", dest="public", default="", metavar="PUBLIC", help="that callers use (default: NAME)")
    added.add_argument("--batch", type=whole, metavar="N", help="rows that Triton may put together; 0: none")
    added.add_argument("--shape", action="append", default=[], type=shape, metavar="INPUT:1,3,224,224")
    added.add_argument("--triton", default="", metavar="HOST:PORT", help="which has the repository (default: local)")
    listed = add_command(actions, "list", _list, "list the models, whether they are built, and your own")
    optimise = add_command(
        actions, "optimise", _optimise, "measure a model in several settings by perf_analyzer, and choose one"
    )
    optimise.add_argument("name", metavar="MODEL")
    optimise.add_argument(
        "--seconds", type=at_least_one, default=3, metavar="N", help="of a measurement, from 3 (default)"
    )
    optimise.add_argument(
        "--rounds", type=at_least_one, default=1, metavar="N", help="whose median counts (default: 1)"
    )
    optimise.add_argument("--most-ms", type=at_least_one, metavar="N", help="what the p99 of a request may be")
    optimise.add_argument("--shape", action="append", default=[], metavar="INPUT:SIZES", help="of an input left open")
    optimise.add_argument("--input-data", metavar="FILE", help="requests to send, as perf_analyzer takes them")
    for each in (build, added, listed, optimise):
        add_repository(each)


def _build(arguments: argparse.Namespace) -> int:
    from gateway.models.catalogue import build  # noqa: PLC0415

    built = build(arguments.names, arguments.repository, force=arguments.force, report=say)
    say(f"built: {', '.join(built)}" if built else "everything is built already")
    return 0


def _add(arguments: argparse.Namespace) -> int:
    from gateway.add_model import NewModel, add  # noqa: PLC0415

    new = NewModel(
        arguments.file,
        arguments.repository,
        arguments.name,
        arguments.public,
        arguments.batch,
        dict(arguments.shape),
        arguments.triton,
    )
    add(new, say)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from gateway.models.catalogue import list_models  # noqa: PLC0415
    from gateway.triton.repository import survey  # noqa: PLC0415

    require_repository(arguments.repository)
    listed = list_models(arguments.repository)
    for model in listed:
        size = f"{model.built_bytes / 1e6:.1f} MB" if model.built_bytes else ""
        note = "needs a GPU to build" if model.needs_gpu else ""
        if model.on_demand and not model.built_bytes:
            note = f"built by name only; {model.download_bytes / 1e6:.1f} MB to fetch"
        say(f"{model.name:30} {model.state.value:8} {size:>9}  {model.task}  {note}".rstrip())
    shipped = {model.name for model in listed}
    for own in survey(arguments.repository) if arguments.repository.is_dir() else ():
        if own.name not in shipped:
            weights = (arguments.repository / own.name).glob("[0-9]*/**/*")
            size = f"{sum(file.stat().st_size for file in weights if file.is_file()) / 1e6:.1f} MB"
            note = f"can't be loaded here: {own.problem}" if own.problem else ""
            say(f"{own.name:30} {'own':8} {size:>9}  {own.backend}  {note}".rstrip())
    return 0


def _optimise(arguments: argparse.Namespace) -> int:
    from gateway import optimise  # noqa: PLC0415
    from gateway.models.catalogue import build  # noqa: PLC0415
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.triton import install  # noqa: PLC0415

    shapes = [word for shape in arguments.shape for word in ("--shape", shape)]
    data = ["--input-data", arguments.input_data] if arguments.input_data else []
    sweep = optimise.Sweep(
        arguments.repository,
        arguments.name,
        optimise.cores(),
        arguments.seconds,
        arguments.rounds,
        arguments.most_ms,
        (*shapes, *data),
    )
    optimise.read_config(sweep)  # before anything is fetched
    optimise.perf_analyzer(os.environ)
    install()
    build([arguments.name], arguments.repository, report=say)
    return event_loop.run(optimise.optimise(sweep, os.environ, say))
