"""The command `inference-gateway`: parses the command line, runs a command, turns errors into a message and exit code.

0: done. 1: failed, for a reason outside the command line. 2: wrong command line or config. 130: ended by a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gateway.errors import INTERRUPTED, CommandFailed, Misused

if TYPE_CHECKING:
    from gateway.config import Config, Finding, Loaded
    from gateway.experiments.epochs import Epochs
    from gateway.experiments.rollout import RolloutKey, State

_ROOT = Path(__file__).resolve().parent.parent
"""The checkout, which has the config of the demo and the model repository. An installed package is in none."""

_REPOSITORY = _ROOT / "model_repository" if (_ROOT / "model_repository").is_dir() else Path("model_repository")
"""The checkout's; for an installed package, one in the current folder, as `models add` makes it."""


_EXTRAS = {"onnx": "local", "onnxruntime": "local", "rich": "local", "scipy": "experiments", "pyarrow": "experiments"}
"""Of this package, by what they bring that commands import when they need it."""


class WrongLine(Misused):
    """Arguments that do not go together; the text says which."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the C core's log would repeat our own messages
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 2
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # such as `| head`
        return 0
    except WrongLine as error:
        arguments.parser.error(str(error))  # with the usage of this command
    except (CommandFailed, OSError, ModuleNotFoundError) as error:
        failed = _failed(error, arguments)
        if str(failed):
            print(f"inference-gateway: {failed}", file=sys.stderr)  # noqa: T201
        return failed.exit_code
    return code


def _failed(error: Exception, arguments: argparse.Namespace) -> CommandFailed:
    """What a user can mend. Raises the error again if it is a missing module that no extra brings."""
    if isinstance(error, CommandFailed):
        return error
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise error
        return CommandFailed(f"this needs '{error.name}': pip install 'inference-gateway[{extra}]'")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        kind = Misused if _is_named(error.filename, arguments) else CommandFailed
        return kind(f"{error.filename}: {error.strerror}")
    return CommandFailed(str(error))


def _is_named(file: object, arguments: argparse.Namespace) -> bool:
    """Is this a file that the command line names?"""
    given = [each for value in vars(arguments).values() for each in (value if isinstance(value, list) else [value])]
    named = {os.path.abspath(each) for each in given if isinstance(each, (str, Path))}
    return isinstance(file, (str, Path)) and os.path.abspath(file) in named


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inference-gateway",
        description="A gRPC gateway in front of NVIDIA Triton. Clients of Triton only change the address.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong command line, or a wrong file, 130 ended by a signal.",
    )
    parser.add_argument(
        "--version", dest="run", action="store_const", const=_version, help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_serve(commands)
    _add_config_commands(commands)
    _add_replay(commands)
    _add_experiment_commands(commands)
    _add_rollout_commands(commands)
    _add_new(commands)
    _add_local_commands(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int] | None, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_serve(commands: Commands) -> None:
    serve = _add(commands, "serve", _serve, "serve, from a config file or transparently for one Triton")
    what = serve.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="config file (docs/configuration.md); it is followed live")
    what.add_argument("--triton", metavar="HOST:PORT", help="no config: every model of this Triton, unchanged")
    serve.add_argument("--listen", metavar="HOST:PORT", help="gRPC address, instead of the config's")
    serve.add_argument("--admin-listen", metavar="HOST:PORT", help="HTTP address for health and metrics")
    serve.add_argument("--workers", metavar="N", help="processes that share the port")
    serve.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="of stderr; debug has a line for each decision of a call (default: info)",
    )
    serve.add_argument("--log-format", default="text", choices=["text", "json"], help="of stderr (default: text)")


def _add_config_commands(commands: Commands) -> None:
    check = _add(commands, "check", _check, "check a config file: exit 0, or 2 with every finding and its line")
    check.add_argument("file", metavar="FILE")
    check.add_argument(
        "--ask-triton",
        action="store_true",
        help="also compare pipelines with their models, as the servers describe these",
    )
    explain = _add(commands, "explain", _explain, "say which variant a call would get, and why; exit 1 if none")
    explain.add_argument("file", metavar="FILE")
    explain.add_argument("--model", required=True, help="public model that the call names")
    explain.add_argument("--version", default="", help="model version that the call asks for")
    explain.add_argument(
        "--metadata", nargs="+", default=[], metavar="K=V", action="extend", type=_pair, help="of the call"
    )
    explain.add_argument(
        "--parameter", nargs="+", default=[], metavar="K=V", action="extend", type=_pair, help="of the V2 request"
    )
    explain.add_argument(
        "--admin", metavar="HOST:PORT", help="of a running gateway: also say its breakers, limits and retries now"
    )
    explain.add_argument(
        "--as", dest="caller", metavar="CALLER", help="also say what this caller may do with the model"
    )
    explain.add_argument("--draw", type=_draw, metavar="X", help="the number in [0, 1) to draw by (default: random)")
    keys = _add(commands, "keys", None, "API keys of callers (docs/access.md)").add_subparsers(
        metavar="ACTION", required=True
    )
    new = _add(keys, "new", _keys_new, "make a key: print it once, and the line with its hash for the config")
    new.add_argument("name", metavar="NAME", help="the caller whose key it is")
    schema = _add(commands, "schema", _schema, "print the JSON Schema of the config file, for editors")
    protos = _add(
        commands, "protos", _protos, "write a descriptor set of all services, for grpcurl and code generators"
    )
    protos.add_argument("file", metavar="FILE", type=Path, help="such as gateway.binpb")
    schema.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")


def _add_replay(commands: Commands) -> None:
    replay = _add(commands, "replay", _replay, "send captured requests again (telemetry.capture in the config)")
    replay.add_argument("files", nargs="+", metavar="FILE", help="captured files, or URLs that fsspec knows")
    replay.add_argument(
        "--to", required=True, type=_address, metavar="HOST:PORT", help="a gateway, or a Triton that has the models"
    )
    replay.add_argument("--model", metavar="NAME", help="only the requests of this model")
    replay.add_argument(
        "--as",
        dest="instead",
        metavar="MODEL",
        help="with --model: ask this model for them, such as Triton's own name for it",
    )
    replay.add_argument(
        "--as-traffic", action="store_true", help="let a gateway count and capture them as if callers had sent them"
    )
    replay.add_argument(
        "--key-file", type=Path, metavar="FILE", help="has an API key or token that the gateway lets in"
    )
    replay.add_argument("--at-once", type=_at_least_one, default=1, metavar="N", help="calls in flight (default: 1)")


def _add_experiment_commands(commands: Commands) -> None:
    experiment = _add(commands, "experiment", None, "which variant is better, by how much, and how sure that is")
    actions = experiment.add_subparsers(metavar="ACTION", required=True)
    analyse = _add(
        actions,
        "analyse",
        _experiment_analyse,
        "the verdict over files of exposures and outcomes (docs/experiments.md)",
    )
    analyse.add_argument("--exposures", required=True, metavar="FILE", help="CSV or Parquet: unit, arm, at")
    analyse.add_argument("--outcomes", required=True, metavar="FILE", help="CSV or Parquet: unit, name, value, at")
    analyse.add_argument("--config", required=True, metavar="FILE", help="YAML with 'experiments'")
    analyse.add_argument("--name", metavar="NAME", help="which of the file's experiments (default: the only one)")
    analyse.add_argument("--each", type=_at_least_one, metavar="N", help="also the verdict after every N units")
    analyse.add_argument("--json", action="store_true", help="for machines")

    _add_store_commands(actions)


def _add_store_commands(actions: Commands) -> None:
    listed = _add(actions, "list", _experiment_list, "the experiments of a config, and their units in the store")
    report = _add(actions, "report", _experiment_report, "the verdict so far, from the store")
    stop = _add(actions, "stop", _experiment_stop, "end it: every replica gives everybody one arm, within seconds")
    diffs = _add(actions, "diffs", _experiment_diffs, "answers that shadows kept since they disagreed")
    for each in (report, stop, diffs):
        each.add_argument("name", metavar="NAME", help="of the experiment")
    for each in (listed, report, stop, diffs):
        each.add_argument("--config", required=True, metavar="FILE", help="the gateway's config file")
    for each in (listed, report, stop):
        each.add_argument("--store", metavar="URL", help="of the store, instead of the config's")
    report.add_argument("--json", action="store_true", help="for machines, with what it was on the way here")
    report.add_argument("--html", metavar="FILE", help="also write a page with plots")
    stop.add_argument("--winner", metavar="ARM", help="that everybody gets (default: the baseline)")
    diffs.add_argument("--most", type=_at_least_one, default=20, metavar="N", help="of the latest (default: 20)")


def _add_rollout_commands(commands: Commands) -> None:
    rollout = _add(commands, "rollout", None, "a model's move from one variant to another (docs/rollouts.md)")
    actions = rollout.add_subparsers(metavar="ACTION", required=True)
    listed = _add(actions, "list", _rollout_list, "how far each rollout of a config is")
    show = _add(actions, "show", _rollout_show, "what it waits for, its guardrails and its history")
    promote = _add(actions, "promote", _rollout_do, "go to the next step now, or from the last one to all units")
    pause = _add(actions, "pause", _rollout_do, "stay at this step; guardrails still take it back")
    resume = _add(actions, "resume", _rollout_do, "go on by itself after a pause")
    abort = _add(actions, "abort", _rollout_do, "give all units back to the old variant, for good")
    for each in (show, promote, pause, resume, abort):
        each.add_argument("name", metavar="NAME", help="of the rollout")
    for name, each in {"promote": promote, "pause": pause, "resume": resume, "abort": abort}.items():
        each.set_defaults(action=name)
    for each in (listed, show, promote, pause, resume, abort):
        each.add_argument("--config", required=True, metavar="FILE", help="the gateway's config file")
        each.add_argument("--store", metavar="URL", help="of the store, instead of the config's")


def _add_new(commands: Commands) -> None:
    new = _add(commands, "new", None, "something of your own, from a template").add_subparsers(
        metavar="KIND", required=True
    )
    step = _add(new, "step", _new_step, "a package with a pipeline's step: code, test, entry point, config")
    step.add_argument("name", metavar="NAME", help="of the step, such as tidy_text")
    step.add_argument("--folder", type=Path, metavar="FOLDER", help="to make (default: NAME)")


def _add_local_commands(commands: Commands) -> None:
    models = _add(commands, "models", None, "build or list the models of the repository")
    actions = models.add_subparsers(metavar="ACTION", required=True)
    build = _add(actions, "build", _models_build, "build weights from their pinned sources")
    build.add_argument(
        "names", nargs="*", metavar="MODEL", help="default: all that need no GPU and that the demo shows"
    )
    build.add_argument("--force", action="store_true", help="build also what is current")
    added = _add(actions, "add", _models_add, "add an ONNX model of your own: from its file to a client's call")
    added.add_argument("file", type=Path, metavar="FILE", help="the ONNX model")
    added.add_argument("--name", default="", metavar="NAME", help="at Triton (default: the file's)")
    added.add_argument("--as", dest="public", default="", metavar="PUBLIC", help="that callers use (default: NAME)")
    added.add_argument("--batch", type=_whole, metavar="N", help="rows that Triton may put together; 0: none")
    added.add_argument("--shape", action="append", default=[], type=_shape, metavar="INPUT:1,3,224,224")
    added.add_argument("--triton", default="", metavar="HOST:PORT", help="which has the repository (default: local)")
    listed = _add(actions, "list", _models_list, "list the models, whether they are built, and your own")
    optimise = _add(
        actions, "optimise", _models_optimise, "measure a model in several settings by perf_analyzer, and choose one"
    )
    optimise.add_argument("name", metavar="MODEL")
    optimise.add_argument(
        "--seconds", type=_at_least_one, default=3, metavar="N", help="of a measurement, from 3 (default)"
    )
    optimise.add_argument(
        "--rounds", type=_at_least_one, default=1, metavar="N", help="whose median counts (default: 1)"
    )
    optimise.add_argument("--most-ms", type=_at_least_one, metavar="N", help="what the p99 of a request may be")
    optimise.add_argument("--shape", action="append", default=[], metavar="INPUT:SIZES", help="of an input left open")
    optimise.add_argument("--input-data", metavar="FILE", help="requests to send, as perf_analyzer takes them")
    triton = _add(commands, "triton", None, "the local Triton alone")
    start = _add(triton.add_subparsers(metavar="ACTION", required=True), "start", _triton_start, "start it and stay up")
    start.add_argument("--grpc-port", type=_port, default=8001, metavar="PORT", help="default: 8001")
    start.add_argument("--http-port", type=_port, default=8000, metavar="PORT", help="default: 8000")
    start.add_argument("--metrics-port", type=_port, default=8002, metavar="PORT", help="default: 8002")
    start.add_argument("--model", action="append", metavar="NAME", help="load only these (default: all that can run)")
    start.add_argument("--model-config", metavar="NAME", help="use configs/NAME.pbtxt of models that have one")
    demo = _add(commands, "demo", _demo, "build, start Triton and gateway, show what they do, stay up")
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
    for each in (build, added, listed, optimise, start, demo):
        each.add_argument("--repository", type=Path, default=_REPOSITORY, metavar="FOLDER")


def _pair(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form KEY=VALUE")
    return key, value


def _draw(given: str) -> float:
    draw = float(given)
    if not 0 <= draw < 1:
        raise argparse.ArgumentTypeError(f"{given} is not in [0, 1)")
    return draw


def _at_least_one(given: str) -> int:
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{given} is not 1 or more")
    return number


def _whole(given: str) -> int:
    number = int(given)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{given} is not 0 or more")
    return number


def _shape(given: str) -> tuple[str, list[int]]:
    name, _, sizes = given.rpartition(":")
    if not name or not all(size.isdigit() and int(size) for size in sizes.split(",")):
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form INPUT:1,3,224,224")
    return name, [int(size) for size in sizes.split(",")]


def _address(given: str) -> str:
    from gateway.config.units import split_address  # noqa: PLC0415

    try:
        split_address(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form HOST:PORT") from None
    return given


def _port(given: str) -> int:
    port = int(given)
    if not 0 < port < 2**16:
        raise argparse.ArgumentTypeError(f"{given} is not a port; it needs a number from 1 to 65535")
    return port


def _log_to_stderr(level: str, form: str = "text") -> None:
    from gateway.telemetry.process_log import log_to_stderr  # noqa: PLC0415

    log_to_stderr(level, form)


# The commands. Each imports what it needs, so that `--help` and `check` do not load a gRPC server.


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import version  # noqa: PLC0415

    print(version("inference-gateway"))  # noqa: T201
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    signal.signal(
        signal.SIGHUP, signal.SIG_IGN
    )  # SIGHUP asks for a reload, and must not end a process that does not listen for it yet
    from gateway import supervisor, worker  # noqa: PLC0415
    from gateway.app import Place  # noqa: PLC0415
    from gateway.config import load, transparent  # noqa: PLC0415
    from gateway.process import event_loop, scratch  # noqa: PLC0415
    from gateway.telemetry.process_log import name_process  # noqa: PLC0415

    _log_to_stderr(arguments.log_level, arguments.log_format)
    given = {"--listen": arguments.listen, "--admin-listen": arguments.admin_listen, "--workers": arguments.workers}
    flags = {flag: value for flag, value in given.items() if value is not None}

    def load_again() -> Loaded:
        if arguments.triton is not None:
            return transparent(arguments.triton, os.environ, flags)
        return load(arguments.config, os.environ, flags)

    loaded = load_again()
    given_place = supervisor.maybe_place(os.environ)
    if given_place is not None:
        place, parent = given_place
        name_process(str(place.worker))
        worker.end_with(parent)
    elif loaded.config.workers > 1:
        name_process("supervisor")
        command = supervisor.worker_command()
        return event_loop.run(supervisor.Supervisor(loaded.config, command, os.environ, loaded.source).run())
    else:
        scratch.clear(supervisor.SCRATCH)  # of one that was killed, when there were several workers
        place = Place(loaded.config.admin.listen)
    return event_loop.run(worker.serve(loaded, load_again, os.environ, place))


def _check(arguments: argparse.Namespace) -> int:
    from gateway.config import load  # noqa: PLC0415

    loaded = load(arguments.file, os.environ)
    for finding in loaded.warnings:
        _say(str(finding))
    if arguments.ask_triton:
        code = _check_fitting(loaded)
        if code:
            return code
    _say(
        f"{arguments.file}: valid, {len(loaded.config.models)} public models, {len(loaded.config.upstreams)} upstreams"
    )
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


def _explain(arguments: argparse.Namespace) -> int:
    from gateway.access.door import CALLER  # noqa: PLC0415
    from gateway.assemble import policy_of, quotas_of, routes_of  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415
    from gateway.explain import explain_access, explain_call, explain_quotas, finds_model  # noqa: PLC0415
    from gateway.forwarding.metadata import first_values  # noqa: PLC0415
    from gateway.quotas import Quotas  # noqa: PLC0415
    from gateway.types import Facts  # noqa: PLC0415

    loaded = load(arguments.file, os.environ)
    metadata = first_values((key.lower(), value) for key, value in arguments.metadata)  # as in a call
    facts = Facts(metadata, dict(arguments.parameter), arguments.version)
    draw = random.random() if arguments.draw is None else arguments.draw  # noqa: S311
    states, lines = _rollout_states(loaded.config, arguments)
    stopped, epochs, told = _experiments(loaded.config, arguments)
    lines += told
    routes = routes_of(loaded.config, stopped, states, epochs)
    if arguments.caller is not None:
        facts.metadata = {**metadata, CALLER: arguments.caller}
        if loaded.config.checked_access is None:
            lines.append("access is not checked: everybody may call everything")
        else:
            policy = policy_of(loaded.config.checked_access)
            lines += explain_access(policy, routes, loaded.pipelines, arguments.caller, arguments.model)
    lines += explain_call(routes, loaded.pipelines, arguments.model, facts, draw=draw)
    quotas = Quotas()
    quotas.apply(replace(quotas_of(loaded.config), workers=1), None)  # as the file has them, and not a worker's share
    if quotas.is_on:
        lines += explain_quotas(quotas, loaded.pipelines, arguments.model, facts)
    _say("\n".join(lines))
    code = 0 if finds_model(routes, loaded.pipelines, arguments.model, facts) else 1
    if arguments.admin:
        code = _explain_now(arguments.admin, arguments.model, quotas.name_of(metadata)) or code
    return code


def _rollout_states(config: Config, arguments: argparse.Namespace) -> tuple[Mapping[RolloutKey, State], list[str]]:
    """How far the rollout of the model is, as the store says, and a line about that."""
    model = config.models.get(arguments.model)
    if model is None or model.rollout is None:
        return {}, []
    from gateway.experimentation.rollout_commands import RolloutCommands  # noqa: PLC0415

    name, key = model.rollout.name, model.rollout.plan(arguments.model).key
    try:
        states = RolloutCommands.of(config).states()
    except CommandFailed as error:
        return {}, [f"rollout {name}: {error}; as long as nothing is known it has moved nobody"]
    state = states[key]
    why = f", since {state.reason}" if state.reason else ""
    return states, [f"rollout {name} is {state.phase.value} at a share of {state.share:.4g}, says the store{why}"]


def _experiments(
    config: Config, arguments: argparse.Namespace
) -> tuple[Mapping[str, str], Mapping[str, Epochs], list[str]]:
    """Of the model's experiments, as the store says: the arms of those that were stopped, the epochs of bandits, and
    lines about both."""
    from gateway.config.experiment_file import plans_of  # noqa: PLC0415

    plans = {name: plan for name, plan in plans_of(config).items() if plan.model == arguments.model}
    if not plans:
        return {}, {}, []
    from gateway.experimentation.evidence import settings_of  # noqa: PLC0415
    from gateway.experimentation.reports import Source  # noqa: PLC0415

    settings = settings_of(config)
    try:
        with Source(plans, settings.url, settings.unit_key).store() as store:
            stops, found = store.stops(), store.epochs(list(plans))
    except CommandFailed as error:
        unknown = {True: "all units have the baseline", False: "it counts as not stopped"}
        whys = {name: unknown[plan.bandit is not None] for name, plan in plans.items()}
        return {}, {}, [f"experiment {name}: {error}; as long as nothing is known {why}" for name, why in whys.items()]
    stopped, lines = {name: stop.arm for name, stop in stops.items()}, []
    for name, plan in plans.items():
        epochs = found.get(name)
        if name in stopped:
            lines.append(f"experiment {name} was stopped, and everybody gets '{stopped[name]}', says the store")
        elif plan.bandit is not None and (epochs is None or not epochs.is_of(plan)):
            lines.append(f"experiment {name} is a bandit of which no epoch has begun, says the store")
        elif plan.bandit is not None and epochs is not None:
            where = f"epoch {len(epochs.so_far)} of {epochs.slices}, by {epochs.so_far[-1].units} rewards"
            lines.append(f"experiment {name} is a bandit in {where}, says the store")
    return stopped, found, lines


def _explain_now(admin: str, model: str, caller: str) -> int:
    import json  # noqa: PLC0415
    from urllib.request import urlopen  # noqa: PLC0415

    from gateway.explain import explain_now, quotas_now  # noqa: PLC0415

    try:
        with urlopen(f"http://{admin.removeprefix('http://').rstrip('/')}/state", timeout=5) as answer:
            state = json.load(answer)
    except (OSError, ValueError) as error:
        print(f"{admin} does not say how it stands: {error}", file=sys.stderr)  # noqa: T201
        return 1
    _say("\n".join([*explain_now(state, model), *quotas_now(state, caller, model)]))
    return 0 if model in state["models"] or model in state["pipelines"] else 1


def _keys_new(arguments: argparse.Namespace) -> int:
    import secrets  # noqa: PLC0415

    from gateway.access.api_keys import RANDOM_BYTES, hash_of, new_key  # noqa: PLC0415
    from gateway.access.principal import is_name  # noqa: PLC0415

    if not is_name(arguments.name):
        raise Misused("a caller's name has 1 to 200 printable characters")
    key = new_key(secrets.token_bytes(RANDOM_BYTES))
    digest = hash_of(key).hex()
    _say(f"key, for the caller alone; it is shown this once:\n  {key}")
    _say(f"below access.api_keys in the config:\n  - {{caller: {json.dumps(arguments.name)}, sha256: {digest}}}")
    if " " not in arguments.name and "#" not in arguments.name:
        _say(f"or a line of the file that access.api_key_file names:\n  {arguments.name} {digest}")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from gateway.config import json_schema_text, reference  # noqa: PLC0415

    _say((reference() if arguments.markdown else json_schema_text()).rstrip("\n"))
    return 0


def _protos(arguments: argparse.Namespace) -> int:
    from gateway.api.descriptors import descriptor_set  # noqa: PLC0415

    arguments.file.write_bytes(descriptor_set())
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.telemetry.replay import replay  # noqa: PLC0415

    if arguments.instead is not None and arguments.model is None:
        raise WrongLine("--as needs --model, which says whose requests the other model can answer")

    async def run() -> int:
        key = arguments.key_file.read_text().strip() if arguments.key_file is not None else ""
        result = await replay(
            arguments.files,
            arguments.to,
            at_once=arguments.at_once,
            model=arguments.model,
            instead=arguments.instead,
            as_traffic=arguments.as_traffic,
            key=key,
        )
        _say("\n".join(result.lines()))
        return 0 if result.codes.keys() <= {"OK"} else 1

    return event_loop.run(run())


def _experiment_analyse(arguments: argparse.Namespace) -> int:
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
        _say(line)
    return 0


def _experiment_list(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import listed, source_of  # noqa: PLC0415

    for line in listed(source_of(arguments.config, arguments.store)):
        _say(line)
    return 0


def _experiment_report(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.report_page import page  # noqa: PLC0415
    from gateway.experimentation.reports import source_of, stored_report  # noqa: PLC0415

    source = source_of(arguments.config, arguments.store)
    found = stored_report(source, arguments.name, history=arguments.json or arguments.html is not None)
    if arguments.html is not None:
        Path(arguments.html).write_text(page(found.plan, found.report, found.looks, found.spread), encoding="utf-8")
    _say(found.as_json() if arguments.json else "\n".join(found.lines()))
    return 0


def _experiment_stop(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import source_of, stop  # noqa: PLC0415

    _say(stop(source_of(arguments.config, arguments.store), arguments.name, arguments.winner))
    return 0


def _experiment_diffs(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.reports import disagreements  # noqa: PLC0415

    for line in disagreements(arguments.config, arguments.name, arguments.most):
        _say(line)
    return 0


def _rollout_list(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415

    for line in commands_of(arguments.config, arguments.store).listed():
        _say(line)
    return 0


def _rollout_show(arguments: argparse.Namespace) -> int:
    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415

    for line in commands_of(arguments.config, arguments.store).shown(arguments.name):
        _say(line)
    return 0


def _rollout_do(arguments: argparse.Namespace) -> int:
    import getpass  # noqa: PLC0415

    from gateway.experimentation.rollout_commands import commands_of  # noqa: PLC0415
    from gateway.experiments.rollout import Command  # noqa: PLC0415

    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        who = f"user {os.getuid()}"
    _say(commands_of(arguments.config, arguments.store).do(arguments.name, Command(arguments.action), who))
    return 0


def _new_step(arguments: argparse.Namespace) -> int:
    from gateway.new_step import new_step  # noqa: PLC0415

    made = new_step(arguments.name, arguments.folder)
    folder = made[0].parent
    _say(f"made {', '.join(str(file) for file in made)}")
    _say(f"next:\n  cd {shlex.quote(str(folder))}")
    for line in (
        "python -m pip install -e '.[dev]'                # its name is then known to configs; pytest and mypy",
        "python -m pytest && python -m mypy",
        "inference-gateway check gateway.yaml",
        "inference-gateway serve --config gateway.yaml    # answers at 127.0.0.1:9001, with a Triton or without",
    ):
        _say(f"  {line}")
    return 0


def _models_build(arguments: argparse.Namespace) -> int:
    from gateway.models.catalogue import build  # noqa: PLC0415

    built = build(arguments.names, arguments.repository, force=arguments.force, report=_say)
    _say(f"built: {', '.join(built)}" if built else "everything is built already")
    return 0


def _models_add(arguments: argparse.Namespace) -> int:
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
    add(new, _say)
    return 0


def _models_list(arguments: argparse.Namespace) -> int:
    from gateway.models.catalogue import list_models  # noqa: PLC0415
    from gateway.triton.repository import survey  # noqa: PLC0415

    _require_repository(arguments.repository)
    listed = list_models(arguments.repository)
    for model in listed:
        size = f"{model.built_bytes / 1e6:.1f} MB" if model.built_bytes else ""
        note = "needs a GPU to build" if model.needs_gpu else ""
        if model.on_demand and not model.built_bytes:
            note = f"built by name only; {model.download_bytes / 1e6:.1f} MB to fetch"
        _say(f"{model.name:30} {model.state.value:8} {size:>9}  {model.task}  {note}".rstrip())
    shipped = {model.name for model in listed}
    for own in survey(arguments.repository) if arguments.repository.is_dir() else ():
        if own.name not in shipped:
            weights = (arguments.repository / own.name).glob("[0-9]*/**/*")
            size = f"{sum(file.stat().st_size for file in weights if file.is_file()) / 1e6:.1f} MB"
            note = f"can't be loaded here: {own.problem}" if own.problem else ""
            _say(f"{own.name:30} {'own':8} {size:>9}  {own.backend}  {note}".rstrip())
    return 0


def _require_repository(folder: Path, models: Sequence[str] = ()) -> None:
    if not folder.is_dir():
        raise Misused(
            f"There is no folder {folder} with models. `inference-gateway models add FILE` puts one of your own there, "
            "--repository FOLDER names another, and the project's checkout has those of the demo."
        )
    for model in models:
        if not (folder / model).is_dir():
            raise Misused(f"{folder} has no model {model!r}; `inference-gateway models list` names those it has.")


def _models_optimise(arguments: argparse.Namespace) -> int:
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
    build([arguments.name], arguments.repository, report=_say)
    return event_loop.run(optimise.optimise(sweep, os.environ, _say))


def _triton_start(arguments: argparse.Namespace) -> int:
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.triton import LocalTriton, install  # noqa: PLC0415
    from gateway.triton.command import stay_up  # noqa: PLC0415

    _require_repository(arguments.repository, arguments.model or ())
    install()  # outside the event loop, where Ctrl-C ends a download at once
    triton = LocalTriton(
        arguments.repository,
        models=arguments.model,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
        extra=[f"--model-config-name={arguments.model_config}"] if arguments.model_config else (),
    )
    return event_loop.run(stay_up(triton, _say))


def _demo(arguments: argparse.Namespace) -> int:
    examples = _ROOT / "deploy" / "examples"
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

    _log_to_stderr("error" if arguments.with_experiment else "warning")  # what its variants do wrong is meant
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

    _log_to_stderr("error")
    settings = experiment.ScenarioSettings(
        arguments.repository, arguments.listen, arguments.admin_listen, arguments.experiment == "short"
    )
    experiment.prepare(settings)
    return event_loop.run(experiment.run(settings))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
