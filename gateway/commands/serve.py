"""I/O: `serve`: a worker, or a supervisor of several."""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

from gateway.commands.arguments import Commands, add_command

if TYPE_CHECKING:
    from gateway.config import Loaded


def add(commands: Commands) -> None:
    serve = add_command(commands, "serve", _serve, "serve, from a config file or transparently for one Triton")
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


def _serve(arguments: argparse.Namespace) -> int:
    # It asks for a reload, and must not end a process that does not listen for it yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from gateway import supervisor, worker  # noqa: PLC0415
    from gateway.app import Place  # noqa: PLC0415
    from gateway.config import load, transparent  # noqa: PLC0415
    from gateway.process import event_loop, scratch  # noqa: PLC0415
    from gateway.telemetry.process_log import log_to_stderr, name_process  # noqa: PLC0415

    log_to_stderr(arguments.log_level, arguments.log_format)
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
