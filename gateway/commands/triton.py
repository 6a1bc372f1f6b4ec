"""I/O: `triton`: the local Triton alone."""

from __future__ import annotations

import argparse

from gateway.commands.arguments import Commands, add_command, port, say
from gateway.commands.checkout import add_repository, require_repository


def add(commands: Commands) -> None:
    triton = add_command(commands, "triton", None, "the local Triton alone")
    start = add_command(triton.add_subparsers(metavar="ACTION", required=True), "start", _start, "start it and stay up")
    start.add_argument("--grpc-port", type=port, default=8001, metavar="PORT", help="default: 8001")
    start.add_argument("--http-port", type=port, default=8000, metavar="PORT", help="default: 8000")
    start.add_argument("--metrics-port", type=port, default=8002, metavar="PORT", help="default: 8002")
    start.add_argument("--model", action="append", metavar="NAME", help="load only these (default: all that can run)")
    start.add_argument("--model-config", metavar="NAME", help="use configs/NAME.pbtxt of models that have one")
    add_repository(start)


def _start(arguments: argparse.Namespace) -> int:
    from gateway.process import event_loop  # noqa: PLC0415
    from gateway.triton import LocalTriton, install  # noqa: PLC0415
    from gateway.triton.command import stay_up  # noqa: PLC0415

    require_repository(arguments.repository, arguments.model or ())
    install()  # outside the event loop, where Ctrl-C ends a download at once
    triton = LocalTriton(
        arguments.repository,
        models=arguments.model,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
        extra=[f"--model-config-name={arguments.model_config}"] if arguments.model_config else (),
    )
    return event_loop.run(stay_up(triton, say))
