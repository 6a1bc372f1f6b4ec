"""The gateway under test, started as a user starts it: a config file, one worker, its telemetry on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from perf import models
from perf.children import Child

TINY, WIDE_IN, WIDE_OUT, ECHO, IMAGENET = "tiny", "wide-in", "wide-out", "echo-any", "imagenet"
PHOTO = "photo"  # a pipeline: JPEG in, labels out

PUBLIC = {
    models.TINY_A: TINY,
    models.WIDE_IN: WIDE_IN,
    models.WIDE_OUT: WIDE_OUT,
    models.ECHO: ECHO,
    models.EFFICIENTNET: IMAGENET,
}
"""The public model in front of each of Triton's, for those that load goes to."""

Config = dict[str, Any]  # as YAML has it


def config(triton: int, *, routes: int = 1, variants: int = 2, merge: bool = False, shared: str = "") -> Config:
    """One upstream; every public model with a 90/10 split that is sticky by user.

    routes:   public models with a split, in all (at least those of PUBLIC).
    variants: of `tiny`, the first two being 90/10 and the others sharing what one would have.
    merge:    put small requests for `tiny` and `imagenet` together on their way.
    shared:   how much memory to share with Triton, for the tensors of large requests and of pipelines; "" for none.
    """
    public: dict[str, Any] = {}
    for model, name in PUBLIC.items():
        public[name] = _split([model, models.TINY_B if model == models.TINY_A else model])
    extra = {f"v{n}": {"upstream": "triton", "model": models.TINY_B} for n in range(2, variants)}
    public[TINY]["variants"] |= extra
    public[TINY]["split"] |= dict.fromkeys(extra, 10 / max(1, len(extra)))
    for name in (TINY, IMAGENET) if merge else ():
        public[name]["merge"] = {"recheck": "10ms"}
    for n in range(routes - len(public)):
        public[f"route-{n}"] = _split([models.TINY_A, models.TINY_B])
    public["scores"] = {"variants": {"only": {"upstream": "triton", "model": models.SCORES}}}
    public[PHOTO] = {"pipeline": _PHOTO}
    memory = {"bytes": shared} if shared else "off"
    return {
        "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{triton}"], "shared_memory": memory}},
        "models": public,
        "telemetry": {"access_log": {"destination": "stdout", "sample": 0.01}},
    }


def _split(model_names: list[str]) -> Config:
    variants = dict(zip("ab", ({"upstream": "triton", "model": name} for name in model_names), strict=True))
    return {"variants": variants, "split": {"a": 90, "b": 10}, "sticky": {"metadata": "x-user-id"}}


_PHOTO: Config = {
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}],
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
    ],
    "max_batch_size": 8,  # as the model that it calls
    "steps": [
        {"step": "decode_image", "with": {"size": 224, "resize": 256}},
        {"call": "scores", "inputs": {"x": "image"}, "outputs": {"y": "scores"}},
        {"step": "top_k", "with": {"k": 5, "softmax": True}},
    ],
}


def gateway(
    config: Config,
    name: str,
    folder: Path,
    ports: tuple[int, int],
    sink: str = "",
    traced: float = 0.01,
    under: Sequence[str] = (),
) -> Child:
    """Its process, not yet entered.

    ports: gRPC and admin. sink: where traces go (OTLP over HTTP). traced: the part of the calls that has one.
    under: the command of a program that runs it, such as valgrind.
    """
    file = folder / f"{name}.yaml"
    listening = {"listen": f"127.0.0.1:{ports[0]}", "admin": {"listen": f"127.0.0.1:{ports[1]}"}, "workers": 1}
    file.write_text(yaml.safe_dump({**listening, **config}, sort_keys=False))
    traces: Mapping[str, str] = {
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": sink,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(traced),
    }
    command = [*under, sys.executable, "-m", "gateway", "serve", "--config", str(file), "--log-level", "warning"]
    return Child(
        command,
        ports[0],
        folder / f"{name}.log",
        environment=traces if sink else {},
        stdout=subprocess.DEVNULL,
        patience=600.0 if under else 90.0,
    )


def triton(repository: Path, folder: Path, ports: tuple[int, int, int]) -> Child:
    """The local Triton's process, not yet entered. ports: gRPC, HTTP, metrics."""
    command = [sys.executable, "-m", "gateway", "triton", "start", "--repository", str(repository)]
    for flag, port in zip(("--grpc-port", "--http-port", "--metrics-port"), ports, strict=True):
        command += [flag, str(port)]
    # Fetching it, the first time, is 70 MB.
    return Child(command, ports[0], folder / "triton.log", environment={"PYTHONUNBUFFERED": "1"}, patience=600)


def commit() -> str:
    """The commit of the checkout, or "" outside of one."""
    told = subprocess.run(
        ["git", "-C", os.fspath(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip()
