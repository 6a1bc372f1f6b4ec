"""Puts a built TensorRT plan into a model repository under a name that says what it was built on.

`publish_plan.py BUILT PUBLISHED`: BUILT is the model's folder after `inference-gateway models build`, PUBLISHED its
folder in the repository that Triton reads. A plan runs on one kind of GPU and with one TensorRT release only. Several
may lie side by side: the published config maps each compute capability to its plan (`cc_model_filenames`), and Triton
takes its own.

Runs in NVIDIA's TensorRT container, so it needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

_ENTRY = re.compile(r'^cc_model_filenames \{ key: "([^"]+)" value: "([^"]+)" \}$', re.MULTILINE)


def plan_name(record: dict[str, str]) -> tuple[str, str]:
    """The GPU's compute capability and the plan's file name.

    record:  model.plan.json; `gpu` is "name, compute capability, driver" as nvidia-smi prints it.
    raises:  ValueError if it names no compute capability.
    """
    parts = [part.strip() for part in record["gpu"].split(",")]
    if len(parts) < 2 or not re.fullmatch(r"\d+\.\d+", parts[1]):
        raise ValueError(f"the plan's record does not say which GPU it is for: {record['gpu']!r}")
    device = re.sub(r"[^a-z0-9]+", "-", parts[0].lower()).strip("-")
    return parts[1], f"model.{device}.cc{parts[1]}.trt{record['tensorrt']}.plan"


def config_with(config: str, published: str, capability: str, name: str) -> str:
    """The model's config with the plans that were published before and this one."""
    plans = {**dict(_ENTRY.findall(published)), capability: name}
    entries = [f'cc_model_filenames {{ key: "{key}" value: "{plan}" }}' for key, plan in sorted(plans.items())]
    return "\n".join([_ENTRY.sub("", config).rstrip("\n"), *entries, ""])


def publish(built: Path, published: Path) -> str:
    """Copy the plan, then its record, then the config that names it, each in one step. The plan's name."""
    record = json.loads((built / "1" / "model.plan.json").read_text(encoding="utf-8"))
    capability, name = plan_name(record)
    (published / "1").mkdir(parents=True, exist_ok=True)
    for file in built.iterdir():
        if file.is_file() and file.name != "config.pbtxt":
            _put(file.read_bytes(), published / file.name)
    _put((built / "1" / "model.plan").read_bytes(), published / "1" / name)
    _put(json.dumps(record, indent=2).encode(), published / "1" / f"{name}.json")
    target = published / "config.pbtxt"
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    config = (built / "config.pbtxt").read_text(encoding="utf-8")
    _put(config_with(config, before, capability, name).encode(), target)
    return name


def _put(content: bytes, target: Path) -> None:
    """Write beside the target and rename, so that a Triton that loads meanwhile sees the old file or the new one."""
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)  # over what a Job that was killed has left
    os.replace(partial, target)


if __name__ == "__main__":
    sys.stdout.write(f"published {publish(Path(sys.argv[1]), Path(sys.argv[2]))}\n")
