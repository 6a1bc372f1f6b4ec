"""I/O: `replay`: captured requests, sent again."""

from __future__ import annotations

import argparse
from pathlib import Path

from gateway.commands.arguments import Commands, WrongLine, add_command, address, at_least_one, say


def add(commands: Commands) -> None:
    replay = add_command(commands, "replay", _replay, "send captured requests again (telemetry.capture in the config)")
    replay.add_argument("files", nargs="+", metavar="FILE", help="captured files, or URLs that fsspec knows")
    replay.add_argument(
        "--to", required=True, type=address, metavar="HOST:PORT", help="a gateway, or a Triton that has the models"
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
    replay.add_argument("--at-once", type=at_least_one, default=1, metavar="N", help="calls in flight (default: 1)")


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
        say("\n".join(result.lines()))
        return 0 if result.codes.keys() <= {"OK"} else 1

    return event_loop.run(run())
