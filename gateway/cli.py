"""The command `inference-gateway`: parses the command line, runs a command, turns errors into a message and exit code.

0: done. 1: failed, for a reason outside the command line. 2: wrong command line or config. 130: ended by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.commands import (
    check,
    demo,
    experiment,
    explain,
    keys,
    models,
    new,
    replay,
    rollout,
    schema,
    serve,
    triton,
)
from gateway.commands.arguments import WrongLine, say
from gateway.errors import INTERRUPTED, CommandFailed, Misused

_GROUPS: Final = (serve, check, explain, keys, schema, replay, experiment, rollout, new, models, triton, demo)
"""In the order of `--help`."""

_EXTRAS: Final = {
    "onnx": "local",
    "onnxruntime": "local",
    "rich": "local",
    "scipy": "experiments",
    "pyarrow": "experiments",
}
"""Of this package, by what they bring that commands import when they need it."""


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
    for group in _GROUPS:
        group.add(commands)
    return parser


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import version  # noqa: PLC0415

    say(version("inference-gateway"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
