"""Instructions that a small call takes in the gateway, by function: `python -m perf.instructions`. It needs valgrind.

On a busy machine CPU time says little, and nothing of a change of a hundredth; what is executed hardly varies. The
gateway under callgrind is fifty times slower, so it finds many requests at once: system calls and wake-ups are not in
these figures, and many calls share what a read and a write cost. They are for comparing a change with what was before.
With `--experiments NAME` the gateway has that config of `perf.experiments`, and the calls are of a hundred users.

source: valgrind's manual, "Callgrind Format Specification".
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from gateway.transport.dialer import ChannelOptions, WireChannel
from perf import experiments, gateways, machine
from perf.children import Child, NotStarted, Ports
from perf.stack import until_ready
from perf.users import Users

_PATIENCE = 300.0  # seconds until a gateway under valgrind is ready
_WARM = 3.0  # seconds of calls before it is counted
_NAMED = re.compile(r"\((\d+)\)(?: (.*))?$")
_USERS = 100  # so few that all are known once it is counted
_CALL = "CPyDef_call___Call___begin"  # runs once for each call; only if the hot path is compiled


@dataclass(slots=True)
class Costs:
    """Instructions in functions' own code, in it and all that it calls, and how often each was called."""

    own: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


def read(lines: Iterable[str]) -> Costs:
    """What a file of callgrind's says."""
    costs, names = Costs(), dict[str, str]()
    function = called = ""
    times = 0

    def name(told: str) -> str:
        found = _NAMED.match(told)
        if found is None:
            return told
        if found[2] is not None:
            names[found[1]] = found[2]
        return names[found[1]]

    for line in lines:
        key, _, value = line.rstrip().partition("=")
        if key == "fn":
            function = name(value)
        elif key == "cfn":
            called = name(value)
        elif key == "calls":
            times = int(value.split()[0])
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            cost = int(line.split()[-1])
            if not times:
                costs.own[function] += cost
            elif called != function:
                costs.calls[called] += times
                costs.whole[called] += cost
            times = 0
    return costs


def table(costs: Costs, rows: int) -> Iterable[str]:
    """Lines of text: what a call takes, and the functions that take most of it."""
    calls = costs.calls[_CALL]
    yield f"{calls:,} calls, {sum(costs.own.values()) / calls:,.0f} instructions each"
    yield f"{'times a call':>12} {'own':>8} {'with all below':>15}"
    for function, own in costs.own.most_common(rows):
        whole = costs.whole[function] / calls
        yield f"{costs.calls[function] / calls:12.2f} {own / calls:8,.0f} {whole:15,.0f}  {function}"


async def count(answers: int, callers: int, folder: Path, name: str | None) -> Path:
    """Answers callgrind's file.

    name: of a config of `perf.experiments`; None: a plain one.

    :raises NotStarted: if valgrind is missing or the gateway does not start.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotStarted("valgrind is not here (Debian: valgrind)")
    ports, out = Ports(), folder / "callgrind"
    with ExitStack() as ended:
        port = ports.take()
        server = [sys.executable, "-m", "perf.quick_server", str(port)]
        ended.enter_context(Child(server, port, folder / "server.log"))
        model, users = (gateways.TINY, 1) if name is None else (experiments.MODEL, _USERS)
        if name is None:
            config = gateways.config(port)
            config["telemetry"]["access_log"] |= {"sample": 0.0, "slow": "1h"}  # under callgrind many a call is slow
        else:
            config = experiments.config(name, port, f"sqlite:///{folder}/experiments.db")
        under = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        child = gateways.gateway(config, "gateway", folder, (ports.take(), ports.take()), under=under)
        ended.enter_context(child)
        until_ready(child.address, [model], _PATIENCE)
        async with WireChannel(child.address, ChannelOptions(connections=4, together=8)) as channel:
            await Users(channel, model, users).call(_WARM, callers)
            _control(child, "--instr=on")
            load = Users(channel, model, users)
            while load.answers < answers:
                await load.call(1.0, callers)
            _control(child, "--instr=off")
            _control(child, "--dump")
    return Path(f"{out}.1")


def _control(child: Child, what: str) -> None:
    subprocess.run(["callgrind_control", what, str(child.process.pid)], check=True, capture_output=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.instructions", description=__doc__)
    parser.add_argument("--answers", type=int, default=2000, help="at least (default: 2000)")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--rows", type=int, default=60, help="functions to show (default: 60)")
    parser.add_argument(
        "--experiments", metavar="NAME", choices=experiments.NAMES, help="a config of `perf.experiments`"
    )
    given = parser.parse_args(arguments)
    print(f"Python {machine.python()}")
    with tempfile.TemporaryDirectory() as folder:
        found = uvloop.run(count(given.answers, given.callers, Path(folder), given.experiments))
        costs = read(found.read_text().splitlines())
    print(*table(costs, given.rows), sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NotStarted as error:
        sys.exit(str(error))
