"""The one table of versions: which TensorRT, ONNX Runtime and `trtexec` flags belong to which release of Triton.

Values only. The command that builds plans, the tests of deploy/ and the docs read this table; whoever moves to another
release adds a row here, and the tests name every image tag that is then out of date.

source: triton-inference-server/server, `build.py` of the release's branch (Triton, ONNX Runtime, and the upstream
container that the server's TensorRT is taken from, which is not always the one of the same month); NVIDIA's TensorRT
documentation, "Migrating trtexec Usage from TensorRT 10.x to 11.x"; TensorRT's version of each image as its users
report it. None of these images was run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True)
class Release:
    """One release of NVIDIA's containers.

    container:     tag of `nvcr.io/nvidia/tritonserver`, without `-py3`.
    builder:       tag of `nvcr.io/nvidia/tensorrt` with the same TensorRT: what plans for this Triton are built in.
    triton, tensorrt, onnxruntime:  versions inside the Triton container.
    """

    container: str
    triton: str
    tensorrt: str
    onnxruntime: str
    builder: str


RELEASES = (
    Release("24.10", triton="2.51.0", tensorrt="10.5.0", onnxruntime="1.19.2", builder="24.10"),
    Release("26.07", triton="2.71.0", tensorrt="11.1.0", onnxruntime="1.27.0", builder="26.07"),
    Release("26.08", triton="2.72.0", tensorrt="11.2.1", onnxruntime="1.28.0", builder="26.08"),
)
"""Oldest first. What lies between the first and the last works the same way; only these were looked up."""

OLDEST = RELEASES[0]
"""The server that the tests run (2.51, from NVIDIA's wheel)."""

DEPLOYED = RELEASES[-1]
"""What deploy/ names, and the newest that is supported."""

CHECKED = date(2026, 11, 28)
"""When the rows were last looked up. Of the releases after the last row not all versions were found."""

_ALWAYS_STRONG = 11  # TensorRT's major version from which every network is strongly typed and no flag says so


class UnsupportedRelease(Exception):
    """No row of the table says how plans are built with this TensorRT; the text names those that are supported."""


def typing_flags(tensorrt: str) -> tuple[str, ...]:
    """What tells `trtexec` of this TensorRT to take every tensor's type from the graph.

    Up to TensorRT 10 that is `--stronglyTyped`; from 11 on nothing else is possible, and precision flags (`--fp16` and
    its like) are errors.

    tensorrt: "10.5.0", as `trtexec` says it.
    :raises UnsupportedRelease: for a version below the oldest or of a major version above the newest.
    """
    version = _numbers(tensorrt)
    if not _numbers(OLDEST.tensorrt) <= version or version[0] > _numbers(DEPLOYED.tensorrt)[0]:
        raise UnsupportedRelease(
            f"TensorRT {tensorrt} is not supported: plans are built with TensorRT {OLDEST.tensorrt} (container "
            f"{OLDEST.container}) to {DEPLOYED.tensorrt} (container {DEPLOYED.container})."
        )
    return () if version[0] >= _ALWAYS_STRONG else ("--stronglyTyped",)


def _numbers(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split("."))
    except ValueError:
        return (0,)  # "unknown"
