"""`python -m perf`: measure, print the table, write JSON, Markdown and pictures.

Exits 0 if it could measure, whatever the figures are; 1 if not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.artifacts import FetchFailed
from gateway.models.catalogue import BuildFailed
from perf import bars, gateways, machine, memory, merging, pictures, plots, report
from perf.bench import Bench, Say
from perf.children import NotStarted
from perf.load import LoadFailed, Loads, perf_analyzer
from perf.report import Run
from perf.scenarios import CONNECTIONS, LARGE, PAYLOAD, SMALL, STREAM, TINY
from perf.stack import Stack, System
from perf.summary import DIRECT, ENVOY, GATEWAY, MERGING, NULL, SHARING, SYSTEMS

GROUPS = ("tiny", "merging", "large", "stream", "picture", "payload", "growth", "memory")
_FEWER = 3  # rounds of what only draws a curve


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each scenario (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.8, help="that one run measures (default: 1.8)")
    parser.add_argument("--only", type=some_of(GROUPS), default=GROUPS, metavar="GROUPS", help=",".join(GROUPS))
    parser.add_argument(
        "--systems", type=some_of(SYSTEMS), default=(), help=f"of {','.join(SYSTEMS)} (default: all that are here)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/perf"), metavar="FOLDER")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that what was started is ended
    try:
        run, titles = _measure(arguments)
    except (LoadFailed, NotStarted, FetchFailed, BuildFailed) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    _write(run, titles, arguments.out)
    return 0 if run.samples or run.memory else 1


def some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """For an argument that is a list of names with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        given = tuple(each.strip() for each in text.split(","))
        unknown = [each for each in given if each not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(map(repr, unknown))}, but {', '.join(names)}")
        return given

    return read


def _measure(arguments: argparse.Namespace) -> tuple[Run, dict[str, str]]:
    perf_analyzer()  # before anything is started
    work = (arguments.out / "work").resolve()  # some proxies take relative paths from their own folders
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    with Stack(work) as stack:
        peers = {peer.name: peer.version for peer in stack.peers}
        run = Run({**machine.describe(), **peers}, _settings(arguments))
        titles = _run(stack, run, arguments, say)
    run.settings["took"] = f"{(time.monotonic() - began) / 60:.0f} min"
    return run, titles


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    return {
        "commit": gateways.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": f"{arguments.rounds} ({min(_FEWER, arguments.rounds)} for curves), {arguments.seconds:g} s each",
    }


def _run(stack: Stack, run: Run, arguments: argparse.Namespace, say: Say) -> dict[str, str]:
    """Fill in `run`. Answers what each scenario is, in words."""
    groups: Sequence[str] = arguments.only
    rounds, few = arguments.rounds, min(_FEWER, arguments.rounds)

    def miss(text: str) -> None:
        run.failures.append(text)
        say(f"NOT MEASURED  {text}")

    loads = Loads(stack.triton.address, stack.work, arguments.seconds)
    bench = Bench(stack, loads, run.samples.append, miss, say)
    say(f"Python {machine.python()}")
    say("starting the proxies and the gateway")
    started = stack.systems(arguments.systems)
    everyone = [each for each in started if each.name != SHARING]
    systems = [each for each in everyone if each.name not in (MERGING, NULL)]
    titles = dict(pictures.TITLES)
    if "tiny" in groups:
        bench.rounds(TINY, everyone, rounds)
        titles |= {each.name: each.title for each in TINY}
    if "merging" in groups:
        titles |= {each.name: each.title for each in merging.measure(bench, started, rounds, run.samples)}
    with_large = [each for each in started if each.name not in (MERGING, NULL)]
    for group, scenarios, wanted in (("large", LARGE, with_large), ("stream", STREAM, systems)):
        if group in groups:
            bench.rounds(scenarios, wanted, rounds)
            titles |= {each.name: each.title for each in scenarios}
    gateway, sharing = _named(systems, GATEWAY), _named(started, SHARING)
    if "large" in groups and gateway and sharing:
        bench.rounds((SMALL,), [gateway, sharing], rounds)
        titles[SMALL.name] = SMALL.title
    if "picture" in groups and gateway:
        both = [gateway] if sharing is None else [gateway, sharing]
        pictures.measure(stack, both, rounds, 2 * arguments.seconds, run.samples.append, miss, say)
    if "payload" in groups:
        bench.rounds(PAYLOAD, [each for each in systems if each.name != DIRECT], few)
        titles |= {each.name: each.title for each in PAYLOAD}
    if "growth" in groups:
        bench.rounds(CONNECTIONS, [each for each in systems if each.name in (GATEWAY, ENVOY)], few)
        titles |= {each.name: each.title for each in (*CONNECTIONS, *bench.growth(few))}
    if "memory" in groups:
        run.memory += memory.measure(stack, say, miss)
    say(f"the gateways exported {stack.sink.batches} batches of traces")
    return titles


def _named(systems: list[System], name: str) -> System | None:
    return next((each for each in systems if each.name == name), None)


def _write(run: Run, titles: dict[str, str], folder: Path) -> None:
    text = report.markdown(run, titles)
    (folder / "results.md").write_text("# Results\n\n" + text)
    (folder / "results.json").write_text(json.dumps({**dataclasses.asdict(run), "titles": titles}, indent=1) + "\n")
    try:
        drawn = plots.draw(run, folder)
    except ModuleNotFoundError:
        drawn = []
        print("no pictures: `pip install matplotlib` (the extra `perf`)")
    for line in bars.lines(run.samples):
        mark = {"aim": "✓✓", "must": "✓", "no": "✗", "": " "}[line.met]
        print(f"{mark:3}{line.what:62} must {line.must:7} aim {line.aim:7} measured {line.measured}")
    print(f"written: {folder / 'results.md'}, results.json, {', '.join(each.name for each in drawn)}")


if __name__ == "__main__":
    sys.exit(main())
