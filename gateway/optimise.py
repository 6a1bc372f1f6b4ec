"""I/O: `inference-gateway models optimise NAME`: measures a model in several settings, and says which it would choose.

Each setting gets a local Triton of its own with a copy of the model's folder whose config says it, and perf_analyzer
sends requests in a closed loop. Nothing in the repository is changed.

source: triton-inference-server/perf_analyzer, docs/cli.md.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.errors import CommandFailed
from gateway.models.tuning import (
    Figures,
    NoFigures,
    Setting,
    batches,
    choose,
    config_text,
    middle,
    read_figures,
    settings,
    table,
)
from gateway.triton import LocalTriton

_WINDOWS = 3  # perf_analyzer's own least
_LEAST_WINDOW = 1000  # ms; in shorter ones it finds too little now and then, and ends without figures
_ALWAYS_STABLE = "999"  # per cent: it is not to wait for calm, which may never come
_PATIENCE = 20.0  # seconds that a run may take beyond thrice its time
_TRIES = 2  # perf_analyzer does not end now and then, whatever it calls


class OptimiseFailed(CommandFailed):
    """The model can't be measured; the text says why and what to do."""


class NotForSweeps(OptimiseFailed):
    """There is no such model, or none that settings of a CPU would change; the text says which."""

    exit_code = 2


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    seconds:  for one measurement. rounds: of each, of which the median counts.
    most_ms:  what the p99 of a request may be; None if that is all the same.
    extra:    arguments for perf_analyzer: `--shape`, `--input-data`.
    """

    repository: Path
    name: str
    cores: int
    seconds: float = 3.0
    rounds: int = 1
    most_ms: float | None = None
    extra: tuple[str, ...] = ()


def perf_analyzer(environ: Mapping[str, str]) -> str:
    """The program. raises: OptimiseFailed if there is none."""
    found = shutil.which(environ.get("PERF_ANALYZER") or "perf_analyzer", path=environ.get("PATH"))
    if found is None:
        raise OptimiseFailed(
            "perf_analyzer is neither on PATH nor named by PERF_ANALYZER. Where glibc is 2.38 or newer, "
            "`pip install perf-analyzer==2.60.0` has it."
        )
    return found


def read_config(sweep: Sweep) -> Any:
    """The model's config, a ModelConfig, whose class is not typed.

    :raises NotForSweeps: if there is no such model, or it is none that settings of a CPU would change.
    """
    file = sweep.repository / sweep.name / "config.pbtxt"
    if not file.is_file():
        raise NotForSweeps(f"{sweep.repository} has no {sweep.name}/config.pbtxt; `models list` names the models.")
    config = text_format.Parse(file.read_bytes(), model_config_pb2.ModelConfig())
    if config.model_transaction_policy.decoupled or config.HasField("sequence_batching"):
        raise NotForSweeps(f"{sweep.name} answers in streams or keeps sequences; a sweep of single calls can't tell.")
    if config.backend != "onnxruntime":
        raise NotForSweeps(f"The backend of {sweep.name} is {config.backend!r}; threads are those of onnxruntime only.")
    if any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU for group in config.instance_group):
        raise NotForSweeps(f"{sweep.name} is for GPUs, and the local server has none.")
    open_inputs = [tensor.name for tensor in config.input if -1 in tensor.dims]
    unsaid = [name for name in open_inputs if not any(each.startswith(f"{name}:") for each in sweep.extra)]
    if unsaid and "--input-data" not in sweep.extra:
        raise NotForSweeps(
            f"{sweep.name} leaves the size of {unsaid[0]!r} open; say --shape {unsaid[0]}:128, for example."
        )
    return config


async def optimise(sweep: Sweep, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Measure, and say the table, the config and the reasons. The exit code.

    :raises OptimiseFailed: if it can't be measured.
    :raises LocalTritonError, FetchFailed: if the server can't be had.
    """
    program, config = perf_analyzer(environ), read_config(sweep)
    measured: dict[tuple[Setting, int], Figures] = {}
    for setting in settings(sweep.cores):
        with tempfile.TemporaryDirectory() as name:
            _copy(sweep, config, setting, Path(name))
            async with LocalTriton(Path(name), models=[sweep.name]) as triton:
                for batch in batches(config.max_batch_size):
                    command = [program, *_options(sweep, setting, batch, triton.grpc_address)]
                    measured[setting, batch] = await asyncio.to_thread(_measure, command, sweep, environ)
                    say(f"measured {setting}, {batch} to a request: {measured[setting, batch].rate:.1f} rows/s")
    choice = choose(measured, sweep.most_ms)
    where = f"# In {sweep.name}/config.pbtxt, in place of what it says of these; a queue's limits stay as they are:"
    lines = ["", *table(measured), "", where, config_text(choice, batched=config.HasField("dynamic_batching")), ""]
    for line in (*lines, *(f"- {reason}" for reason in choice.why)):
        say(line)
    return 0


def _copy(sweep: Sweep, config: Any, setting: Setting, repository: Path) -> None:
    """A repository with this model alone, in this setting; its weights are the same files."""
    source, folder = sweep.repository / sweep.name, repository / sweep.name
    folder.mkdir()
    for entry in source.iterdir():
        if entry.name != "config.pbtxt":
            (folder / entry.name).symlink_to(entry.resolve())
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    del changed.instance_group[:]
    changed.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=setting.instances)
    changed.parameters["intra_op_thread_count"].string_value = str(setting.threads)
    changed.parameters["inter_op_thread_count"].string_value = "1"
    (folder / "config.pbtxt").write_text(text_format.MessageToString(changed), "utf-8")


def _options(sweep: Sweep, setting: Setting, batch: int, address: str) -> list[str]:
    window = str(max(_LEAST_WINDOW, int(1000 * sweep.seconds / _WINDOWS)))
    at_once = str(2 * setting.instances)  # so that a request is there whenever an instance is free
    options = ["-m", sweep.name, "-i", "grpc", "-u", address, "--concurrency-range", f"{at_once}:{at_once}"]
    options += ["-b", str(batch)] if batch > 1 else []
    return [*options, "-p", window, "-r", str(_WINDOWS), "-s", _ALWAYS_STABLE, *sweep.extra]


def _measure(command: Sequence[str], sweep: Sweep, environ: Mapping[str, str]) -> Figures:
    return middle(run_once(command, 3 * sweep.seconds + _PATIENCE, environ) for _ in range(sweep.rounds))


def run_once(command: Sequence[str], patience: float, environ: Mapping[str, str]) -> Figures:
    """One run of perf_analyzer. raises: OptimiseFailed if it gives no figures."""
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder) / "figures.csv", "it did not end"
        for _ in range(_TRIES):
            try:
                ended = subprocess.run(  # noqa: S603  # the program that the user has put there
                    [*command, "-f", str(file)],
                    capture_output=True,
                    text=True,
                    timeout=patience,
                    env=dict(environ),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                continue
            said = " / ".join((ended.stdout + ended.stderr).strip().splitlines()[-30:])
            if ended.returncode == 0 and file.exists():
                try:
                    return read_figures(file.read_text(encoding="utf-8"))
                except NoFigures as error:
                    said = f"{error}; {said}"
            break
    raise OptimiseFailed(f"perf_analyzer gave no figures: {said}")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))
