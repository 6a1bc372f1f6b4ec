"""The TensorRT variant: an FP16 plan built by NVIDIA's `trtexec` from the same ONNX graph, on the GPU that will run it.

A plan only runs on the kind of GPU and with the TensorRT version it was built with, so it is built where it is served:
in NVIDIA's TensorRT container of the same release as the Triton container. The record beside it says with what.

source: NVIDIA TensorRT documentation, "Command-Line Programs: trtexec" and "Working with Dynamic Shapes".
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

_VERSION = re.compile(r"TensorRT v(\d+)")
_MOST_WORDS = 20  # lines of trtexec's output that an error shows; its cause is at the end


class TensorRtFailed(Exception):
    """The plan could not be built here; the text says why and what to do."""


@dataclass(frozen=True)
class Profile:
    """The batch sizes a plan is made for: any from `least` to `most`, fastest at `usual`."""

    tensor: str
    row: tuple[int, ...]
    least: int
    usual: int
    most: int

    def shapes(self, batch: int) -> str:
        """As trtexec writes it: `image:8x3x224x224`."""
        return f"{self.tensor}:{'x'.join(map(str, (batch, *self.row)))}"


def read_profile(config: Path) -> Profile:
    """The profile that a model's config.pbtxt needs: what Triton may batch is what the plan must take.

    `usual` is the smallest preferred batch size, as most batches do not get fuller; `max_batch_size` if none is given.
    :raises TensorRtFailed: if the config has not exactly one input, or no batching.
    """
    parsed = text_format.Parse(config.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    if len(parsed.input) != 1 or parsed.max_batch_size < 1:
        raise TensorRtFailed(f"{config} must have one input and a max_batch_size of at least 1.")
    (tensor,) = parsed.input
    preferred = min(parsed.dynamic_batching.preferred_batch_size, default=parsed.max_batch_size)
    return Profile(tensor.name, tuple(tensor.dims), 1, preferred, parsed.max_batch_size)


def command(trtexec: str, onnx: Path, plan: Path, profile: Profile) -> list[str]:
    """The command line that builds `plan`. Inputs and outputs stay FP32 (trtexec's default), as the contract says."""
    return [
        trtexec,
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        "--fp16",
        f"--minShapes={profile.shapes(profile.least)}",
        f"--optShapes={profile.shapes(profile.usual)}",
        f"--maxShapes={profile.shapes(profile.most)}",
        "--skipInference",  # build only
    ]


def build(onnx: bytes, config: Path, *, trtexec: str = "trtexec", nvidia_smi: str = "nvidia-smi") -> dict[str, bytes]:
    """The plan and the record of what it was built with, by file name: `model.plan`, `model.plan.json`.

    config:  the model's config.pbtxt, whose batch range the plan takes.
    :raises TensorRtFailed: if there is no trtexec or no GPU, or the build fails.
    """
    if shutil.which(trtexec) is None:
        raise TensorRtFailed(
            f"A TensorRT plan is built by `{trtexec}`, which is not here. Run this on a host with the GPU that will "
            "serve the model, in NVIDIA's TensorRT container of the same release as the Triton container."
        )
    gpu = _ask_for_gpu(nvidia_smi)
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        source.write_bytes(onnx)
        profile = read_profile(config)
        said = _run(command(trtexec, source, plan, profile))
        if not plan.is_file():
            raise TensorRtFailed(f"trtexec ended well and wrote no plan. It said:\n{_last_words(said)}")
        record = {
            "gpu": gpu,
            "tensorrt": read_version(said),
            "precision": "fp16",
            "batch": {"min": profile.least, "opt": profile.usual, "max": profile.most},
        }
        return {"model.plan": plan.read_bytes(), "model.plan.json": (json.dumps(record, indent=2) + "\n").encode()}


def read_version(said: str) -> str:
    """TensorRT's version from trtexec's banner, "unknown" if there is none.

    `[TensorRT v8601]` is 8.6.1, and since version 10 `[TensorRT v100500]` is 10.5.0.
    """
    found = _VERSION.search(said)
    if found is None:
        return "unknown"
    number = int(found[1])
    major, rest = divmod(number, 10_000 if number >= 100_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _ask_for_gpu(nvidia_smi: str) -> str:
    if shutil.which(nvidia_smi) is None:
        raise TensorRtFailed(
            f"A TensorRT plan needs a GPU to be built on, and there is no `{nvidia_smi}` here to find one."
        )
    said = _run([nvidia_smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"])
    return said.strip().splitlines()[0] if said.strip() else "unknown"


def _run(arguments: list[str]) -> str:
    """What the program wrote, stdout and stderr."""
    done = subprocess.run(  # noqa: S603  # NVIDIA's tools, with arguments made here
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        program = Path(arguments[0]).name
        raise TensorRtFailed(f"{program} failed with exit code {done.returncode}:\n{_last_words(done.stdout)}")
    return done.stdout


def _last_words(said: str) -> str:
    return "\n".join(f"  {line}" for line in said.splitlines()[-_MOST_WORDS:])
