"""Measure the built models on this machine: `python -m gateway.models.measure [model_repository]`.

How often int8 and FP16 agree with FP32 on photos that nothing was calibrated on, how long a batch takes, how large the
files are. These are the figures in `model_repository/README.md`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gateway.artifacts import fetch
from gateway.models.efficientnet import INPUT
from gateway.models.pictures import to_input, views
from gateway.models.sources import HELD_OUT

_BATCH = 20
_SECONDS = 2.0  # per figure
Inputs = dict[str, NDArray[Any]]


def held_out() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Twenty ImageNet photos in ten views each, and their classes: [200, 3, 224, 224], [200]."""
    files = sorted((fetch(HELD_OUT) / "foolbox/data").glob("imagenet_*.jpg"))
    rows, classes = [], []
    for file in files:
        with Image.open(file) as image:
            seen = [to_input(view) for view in views(image.convert("RGB"))]
        rows += seen
        classes += [int(file.stem.split("_")[-1])] * len(seen)
    return np.stack(rows), np.array(classes)


def session(model: Path, threads: int) -> Any:
    """An onnxruntime session; its library is not typed."""
    import onnxruntime  # noqa: PLC0415  # of the extra `local`

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def scores(model: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    run = session(model, 2).run
    parts = [run(None, {INPUT: inputs[i : i + _BATCH]})[0] for i in range(0, len(inputs), _BATCH)]
    return np.concatenate(parts)


def milliseconds(model: Path, inputs: Inputs, threads: int) -> float:
    """The median time of one call."""
    run = session(model, threads).run
    run(None, inputs)
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        run(None, inputs)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1000


def agreement(repository: Path) -> list[str]:
    inputs, classes = held_out()
    fp32 = scores(repository / "efficientnet_lite0_onnx/1/model.onnx", inputs)
    lines = [
        f"{len(inputs)} views of {len(inputs[::10])} held-out photos",
        f"correct: FP32 {(fp32.argmax(1) == classes).mean():.1%}",
    ]
    for name, model in (("int8", "efficientnet_lite0_onnx_int8"), ("FP16", "efficientnet_lite0_onnx_cuda")):
        other = scores(repository / model / "1/model.onnx", inputs)
        same = fp32.argmax(1) == other.argmax(1)
        in_five = (np.argsort(other, 1)[:, -5:] == fp32.argmax(1)[:, None]).any(1)
        lines.append(
            f"{name} has FP32's first class: {same.mean():.1%} (whole photos: {same[::10].mean():.0%}), "
            f"has it among its first five: {in_five.mean():.1%}, correct: {(other.argmax(1) == classes).mean():.1%}, "
            f"largest difference of a logit: {np.abs(fp32 - other).max():.3f}"
        )
    return lines


def speed(repository: Path) -> list[str]:
    random = np.random.default_rng(0)
    lines = []
    for name, row in _rows(random).items():
        model = repository / name / "1/model.onnx"
        figures = [
            f"{threads} thread{'s'[: threads - 1]}, batch {batch}: "
            f"{milliseconds(model, {k: np.repeat(v, batch, 0) for k, v in row.items()}, threads):.2f} ms"
            for threads in (1, 2)
            for batch in (1, 8)
        ]
        lines.append(f"{name} ({model.stat().st_size / 1e6:.1f} MB): {'; '.join(figures)}")
    return lines


def _rows(random: np.random.Generator) -> dict[str, Inputs]:
    """One row of input per model; a text has 128 distinct features, about two sentences."""
    image = {INPUT: random.uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)}
    text = {
        "features": random.integers(0, 100_000, (1, 128), np.int32),
        "counts": np.ones((1, 128), np.float32),
        "length": np.array([[200]], np.int32),
    }
    return {
        "efficientnet_lite0_onnx": image,
        "efficientnet_lite0_onnx_int8": image,
        "magika": {"bytes": random.integers(0, 257, (1, 2048), np.int32)},
        "langid": text,
    }


def main() -> None:
    repository = Path(sys.argv[1] if len(sys.argv) > 1 else "model_repository")
    for line in (*agreement(repository), *speed(repository)):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
