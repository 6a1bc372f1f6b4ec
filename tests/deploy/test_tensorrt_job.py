"""The Job that builds a TensorRT plan, with tools that act as NVIDIA's on a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deployment_files import KUBERNETES, ROOT, kustomize
from google.protobuf import text_format
from manifests import only
from tritonclient.grpc import model_config_pb2

MODEL = "efficientnet_lite0_tensorrt"
SCRIPT = KUBERNETES / "components" / "tensorrt-build" / "publish_plan.py"


def built(folder: Path, gpu: str = "NVIDIA L4, 8.9, 550.54.15", plan: bytes = b"a plan") -> Path:
    """The model's folder as `inference-gateway models build` leaves it."""
    model = folder / gpu.replace(" ", "-").replace(",", "") / MODEL
    shutil.copytree(ROOT / "model_repository" / MODEL, model, ignore=shutil.ignore_patterns("[0-9]*"))
    (model / "1").mkdir()
    (model / "1" / "model.plan").write_bytes(plan)
    record = {"gpu": gpu, "tensorrt": "10.5.0", "precision": "fp16", "batch": {"min": 1, "opt": 8, "max": 16}}
    (model / "1" / "model.plan.json").write_text(json.dumps(record))
    return model


def publish(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(source), str(target)], capture_output=True, text=True, check=False
    )


def config_of(folder: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_a_plan_is_named_after_its_gpu_and_release_and_triton_is_told(tmp_path: Path) -> None:
    assert publish(built(tmp_path), tmp_path / "repository" / MODEL).returncode == 0
    published = tmp_path / "repository" / MODEL
    name = "model.nvidia-l4.cc8.9.trt10.5.0.plan"
    assert (published / "1" / name).read_bytes() == b"a plan"
    assert json.loads((published / "1" / f"{name}.json").read_text())["gpu"].startswith("NVIDIA L4")
    assert dict(config_of(published).cc_model_filenames) == {"8.9": name}
    assert (published / "labels.txt").is_file()


def test_plans_for_several_kinds_of_gpu_lie_side_by_side(tmp_path: Path) -> None:
    published = tmp_path / "repository" / MODEL
    publish(built(tmp_path), published)
    publish(built(tmp_path, "NVIDIA A100-SXM4-80GB, 8.0, 550.54.15"), published)
    publish(built(tmp_path / "again", plan=b"a newer plan"), published)
    assert dict(config_of(published).cc_model_filenames) == {
        "8.0": "model.nvidia-a100-sxm4-80gb.cc8.0.trt10.5.0.plan",
        "8.9": "model.nvidia-l4.cc8.9.trt10.5.0.plan",
    }
    assert (published / "1" / "model.nvidia-l4.cc8.9.trt10.5.0.plan").read_bytes() == b"a newer plan"
    assert not [file for file in published.rglob("*") if "partial" in file.name]


def test_all_else_in_the_config_stays_as_it_is(tmp_path: Path) -> None:
    published = tmp_path / "repository" / MODEL
    publish(built(tmp_path), published)
    config = config_of(published)
    config.ClearField("cc_model_filenames")
    assert config == config_of(ROOT / "model_repository" / MODEL)


def test_a_plan_of_an_unknown_gpu_is_not_published(tmp_path: Path) -> None:
    done = publish(built(tmp_path, gpu="unknown"), tmp_path / "repository" / MODEL)
    assert done.returncode != 0
    assert "which GPU" in done.stderr
    assert not (tmp_path / "repository").exists()


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    """A folder with `trtexec` and `nvidia-smi` that say and leave what NVIDIA's do."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "nvidia-smi": 'case "$*" in *name,*) echo "NVIDIA L4, 8.9, 550.54.15";; *) echo 8.9;; esac',
        "trtexec": 'for a in "$@"; do case $a in --saveEngine=*) echo plan > "${a#*=}";; esac; done\n'
        'echo "&&&& PASSED TensorRT.trtexec [TensorRT v100500]"',
        "inference-gateway": f'exec "{sys.executable}" -m gateway "$@"',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_jobs_own_words_build_and_publish_what_the_gpu_pods_wait_for(tmp_path: Path, nvidia: Path) -> None:
    """The shell of the Job, then that of the pool's init container; their folders are below a temporary one."""
    objects = kustomize(KUBERNETES / "overlays" / "gpu")
    for name in ("build", "models"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "model_repository" / MODEL, tmp_path / "opt" / "models" / MODEL)
    (tmp_path / "publish").symlink_to(SCRIPT.parent)
    job = only(objects, "Job", "build-tensorrt")["spec"]["template"]["spec"]["containers"][0]
    pool = only(objects, "Deployment", "triton-gpu")["spec"]["template"]["spec"]["initContainers"][0]
    environ = {**os.environ, "PATH": f"{nvidia}:{os.environ['PATH']}", "MODEL_REPOSITORY": str(tmp_path / "models")}
    for container in (job, pool):
        script = container["args"][0]
        for folder in ("/build", "/models", "/publish", "/opt/models"):
            script = script.replace(f" {folder}/", f" {tmp_path}{folder}/").replace(
                f" {folder}\n", f" {tmp_path}{folder}\n"
            )
        done = subprocess.run(
            [*container["command"], script],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "model.nvidia-l4.cc8.9.trt10.5.0.plan" in done.stdout
