"""Measure the built models on this machine: `python -m gateway.models.measure [model_repository]`.

Prints the tables of `model_repository/README.md`: the variants of the image model beside each other, by how they agree
with FP32 on photos that nothing was calibrated on, how large they are, how long a call takes and how much more memory
a process needs with one loaded; and how long the other models take. Builds the variants that are not there.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gateway.artifacts import fetch
from gateway.models.catalogue import build
from gateway.models.efficientnet import INPUT
from gateway.models.pictures import to_input, views
from gateway.models.sources import HELD_OUT

VARIANTS = {
    "FP32": "efficientnet_lite0_onnx",
    "FP16": "efficientnet_lite0_onnx_cuda",
    "int8": "efficientnet_lite0_onnx_int8",
    "pruned": "efficientnet_lite0_onnx_pruned",
}
OTHERS = ("magika", "langid")
_BATCH = 20
_ROUNDS = 5
_SECONDS = 0.4  # per round and figure
_MIB = 1 << 20
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


def milliseconds(models: list[tuple[Path, Inputs]], threads: int) -> list[float]:
    """The median time of a call of each, taken in turns, so that a busy moment of the machine meets all of them."""
    sessions = [(session(model, threads).run, inputs) for model, inputs in models]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(_ROUNDS):
        for taken, (run, inputs) in zip(times, sessions, strict=True):
            run(None, inputs)
            end = time.perf_counter() + _SECONDS
            while time.perf_counter() < end:
                began = time.perf_counter()
                run(None, inputs)
                taken.append(time.perf_counter() - began)
    return [float(np.median(taken)) * 1000 for taken in times]


def mebibytes(model: Path, inputs: Inputs) -> float:
    """What a process has more of, resident, with the model loaded and called."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (model, inputs))


def _grown(model: Path, inputs: Inputs) -> float:
    import onnxruntime  # noqa: F401, PLC0415  # loaded before the first look

    before = _resident()
    run = session(model, 1).run
    for _ in range(10):
        run(None, inputs)
    return (_resident() - before) / _MIB


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def variants_table(repository: Path) -> Iterator[str]:
    """The variants of the image model, as a table in Markdown."""
    build(tuple(VARIANTS.values()), repository)
    inputs, classes = held_out()
    files = [repository / model / "1/model.onnx" for model in VARIANTS.values()]
    found = [scores(file, inputs) for file in files]
    whole = found[0]
    one, eight = {INPUT: inputs[:1]}, {INPUT: inputs[:8]}
    times = zip(milliseconds([(f, one) for f in files], 1), milliseconds([(f, eight) for f in files], 1), strict=True)
    headings = ["variant", "size", "first class as FP32's", "in its first five", "right"]
    headings += ["batch 1", "batch 8", "memory, batch 1", "batch 8"]
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for name, file, answers, (short, long) in zip(VARIANTS, files, found, times, strict=True):
        same = (whole.argmax(1) == answers.argmax(1)).mean()
        five = (np.argsort(answers, 1)[:, -5:] == whole.argmax(1)[:, None]).any(1).mean()
        right = (answers.argmax(1) == classes).mean()
        memory = [f"{mebibytes(file, rows):.0f} MiB" for rows in (one, eight)]
        yield (
            f"| {name} | {file.stat().st_size / 1e6:.1f} MB | {same:.1%} | {five:.1%} | {right:.1%} "
            f"| {short:.1f} ms | {long:.0f} ms | {' | '.join(memory)} |"
        )


def others_table(repository: Path) -> Iterator[str]:
    """How long the other models of the demo take, as a table in Markdown."""
    build(OTHERS, repository)
    random = np.random.default_rng(0)
    # A text of two sentences has about 128 distinct features.
    rows: dict[str, Inputs] = {
        "magika": {"bytes": random.integers(0, 257, (1, 2048), np.int32)},
        "langid": {
            "features": random.integers(0, 100_000, (1, 128), np.int32),
            "counts": np.ones((1, 128), np.float32),
            "length": np.array([[200]], np.int32),
        },
    }
    batches = [{key: np.repeat(value, 8, 0) for key, value in rows[name].items()} for name in OTHERS]
    files = [repository / name / "1/model.onnx" for name in OTHERS]
    yield "| model | batch 1 | batch 8 |"
    yield "| --- | --- | --- |"
    ones = milliseconds(list(zip(files, (rows[name] for name in OTHERS), strict=True)), 1)
    for name, one, eight in zip(OTHERS, ones, milliseconds(list(zip(files, batches, strict=True)), 1), strict=True):
        yield f"| `{name}` | {one:.2f} ms | {eight:.2f} ms |"


def main() -> None:
    repository = Path(sys.argv[1] if len(sys.argv) > 1 else "model_repository")
    for line in (*variants_table(repository), "", *others_table(repository)):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
