"""The TensorRT variant: a plan built by NVIDIA's `trtexec` from the FP16 graph, on the GPU that will run it.

A plan belongs to the graph and the batch sizes that it was built from, to the GPU's compute capability, and to one
release of TensorRT; that is its identity, and its name. So it is built where it is served, in NVIDIA's TensorRT
container with the TensorRT of the Triton container (`gateway.models.releases`), and plans of several identities lie
side by side.

source: NVIDIA TensorRT documentation, "Command-Line Programs: trtexec", "Working with Dynamic Shapes" and "Migrating
trtexec Usage from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.models.releases import UnsupportedRelease, typing_flags

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


@dataclass(frozen=True)
class Host:
    """What of this host a plan depends on.

    gpu:  name, compute capability and driver, as nvidia-smi says it.
    capability:  "8.9".
    tensorrt:    "11.2.1", of the `trtexec` here, which is also the library that it builds with.
    """

    gpu: str
    capability: str
    tensorrt: str


def look_at_host(*, trtexec: str = "trtexec", nvidia_smi: str = "nvidia-smi") -> Host:
    """
    :raises TensorRtFailed: if there is no trtexec or no GPU, GPUs of several kinds, or a TensorRT of another time.
    """
    if shutil.which(trtexec) is None:
        raise TensorRtFailed(
            f"A TensorRT plan is built by `{trtexec}`, which is not here. Run this on a host with the GPU that will "
            "serve the model, in NVIDIA's TensorRT container of the same release as the Triton container."
        )
    gpus = _ask_for_gpus(nvidia_smi)
    capabilities = sorted({gpu.split(",")[1].strip() for gpu in gpus})
    if len(capabilities) > 1:
        raise TensorRtFailed(
            f"The GPUs here have the compute capabilities {', '.join(capabilities)}, and a plan is for one of them. "
            "Show this container one kind of GPU."
        )
    version = read_version(_run([trtexec, "--help"]))  # the banner comes first, whatever is asked
    try:
        typing_flags(version)
    except UnsupportedRelease as e:
        raise TensorRtFailed(str(e)) from e
    return Host(gpus[0], capabilities[0], version)


def identity(onnx: bytes, profile: Profile, host: Host) -> str:
    """The name under which plans lie side by side: `<graph>-b1-8-16-cc8.9-trt11.2.1`.

    Whoever serves a plan knows the first two parts from the model, the other two from itself.
    """
    return f"{wanted(onnx, profile)}-cc{host.capability}-trt{host.tensorrt}"


def wanted(onnx: bytes, profile: Profile) -> str:
    """The part of the identity that belongs to the model: the graph's digest and the batch sizes."""
    return f"{hashlib.sha256(onnx).hexdigest()[:16]}-b{profile.least}-{profile.usual}-{profile.most}"


def command(trtexec: str, onnx: Path, plan: Path, profile: Profile, tensorrt: str) -> list[str]:
    """The command line that builds `plan`. Every tensor's type is the graph's: FP32 at the edges, FP16 inside.

    :raises UnsupportedRelease: if nobody knows the flags of this TensorRT.
    """
    return [
        trtexec,
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        *typing_flags(tensorrt),
        f"--minShapes={profile.shapes(profile.least)}",
        f"--optShapes={profile.shapes(profile.usual)}",
        f"--maxShapes={profile.shapes(profile.most)}",
        "--skipInference",  # build only
    ]


def build(onnx: bytes, profile: Profile, host: Host, *, trtexec: str = "trtexec") -> dict[str, bytes]:
    """The plan and the record of what it was built from and on, by file name: `model.plan`, `model.plan.json`.

    onnx:  the graph in the precision that is to be computed in.
    :raises TensorRtFailed: if the build fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        source.write_bytes(onnx)
        said = _run(command(trtexec, source, file, profile, host.tensorrt))
        if not file.is_file():
            raise TensorRtFailed(f"trtexec ended well and wrote no plan. It said:\n{_last_words(said)}")
        plan = file.read_bytes()
    record = {
        "identity": identity(onnx, profile, host),
        "graph": hashlib.sha256(onnx).hexdigest(),
        "batch": {"min": profile.least, "opt": profile.usual, "max": profile.most},
        "gpu": host.gpu,
        "compute_capability": host.capability,
        "tensorrt": host.tensorrt,
        "plan": hashlib.sha256(plan).hexdigest(),
    }
    return {"model.plan": plan, "model.plan.json": (json.dumps(record, indent=2) + "\n").encode()}


def find_built(plans: Path, name: str) -> dict[str, bytes]:
    """The files of the plan of that identity, as `build` gives them; {} if it is not in the folder whole."""
    try:
        plan, record = (plans / f"{name}.plan").read_bytes(), (plans / f"{name}.plan.json").read_bytes()
        is_whole = json.loads(record)["plan"] == hashlib.sha256(plan).hexdigest()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return {"model.plan": plan, "model.plan.json": record} if is_whole else {}


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


def _ask_for_gpus(nvidia_smi: str) -> list[str]:
    if shutil.which(nvidia_smi) is None:
        raise TensorRtFailed(
            f"A TensorRT plan needs a GPU to be built on, and there is no `{nvidia_smi}` here to find one."
        )
    said = _run([nvidia_smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"])
    gpus = [line.strip() for line in said.splitlines() if line.strip()]
    if not gpus or not all(re.fullmatch(r"[^,]+, *\d+\.\d+ *,.*", gpu) for gpu in gpus):
        raise TensorRtFailed(f"nvidia-smi names no GPU with a compute capability; it said:\n{_last_words(said)}")
    return gpus


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
