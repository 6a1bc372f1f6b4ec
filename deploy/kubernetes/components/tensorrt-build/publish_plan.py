"""Puts a built TensorRT plan where GPU pods look for theirs: PLANS/<model>/<identity>/, the model's whole folder.

`publish_plan.py BUILT PLANS`: BUILT is the model's folder after `inference-gateway models build`. The identity is in
the plan's record: graph, batch sizes, compute capability and TensorRT release. So a plan never takes another one's
place, and pods of an old release that restart find what they had.

Runs in NVIDIA's TensorRT container, so it needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

_NOT_SERVED = ("plans", ".*")  # the builder's own: all plans it has built, its stamp and its lock


def publish(built: Path, plans: Path) -> Path:
    """Copy the model's folder beside its place and rename it, so that a pod sees it whole or not at all. Its path."""
    record = json.loads((built / "1" / "model.plan.json").read_text(encoding="utf-8"))
    target = plans / built.name / record["identity"]
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)  # what a Job that was killed has left
    shutil.copytree(built, partial, ignore=shutil.ignore_patterns(*_NOT_SERVED))
    try:
        os.rename(partial, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)  # a plan of this identity is there, and pods may be reading it
        return target
    return target


if __name__ == "__main__":
    sys.stdout.write(f"published {publish(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
