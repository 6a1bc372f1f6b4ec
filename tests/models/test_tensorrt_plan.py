"""The plan's command line and record. NVIDIA's two programs are stood in for by scripts that speak like them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.models.tensorrt import Profile, TensorRtFailed, build, command, read_profile, read_version

CONFIG = Path(__file__).parents[2] / "model_repository/efficientnet_lite0_tensorrt/config.pbtxt"
BANNER = "&&&& RUNNING TensorRT.trtexec [TensorRT v{}] # trtexec"


def test_the_plan_takes_every_batch_that_triton_may_make() -> None:
    assert read_profile(CONFIG) == Profile("image", (3, 224, 224), least=1, usual=8, most=16)
    assert command("trtexec", Path("m.onnx"), Path("m.plan"), read_profile(CONFIG)) == [
        "trtexec",
        "--onnx=m.onnx",
        "--saveEngine=m.plan",
        "--fp16",
        "--minShapes=image:1x3x224x224",
        "--optShapes=image:8x3x224x224",
        "--maxShapes=image:16x3x224x224",
        "--skipInference",
    ]


def test_another_batch_range_in_the_config_changes_the_plan(tmp_path: Path) -> None:
    text = 'max_batch_size: 32 input [{ name: "x" data_type: TYPE_FP32 dims: [ 7 ] }]'
    (tmp_path / "config.pbtxt").write_text(text)
    assert read_profile(tmp_path / "config.pbtxt") == Profile("x", (7,), least=1, usual=32, most=32)


def test_a_config_without_batching_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('input [{ name: "x" data_type: TYPE_FP32 dims: [ 7 ] }]')
    with pytest.raises(TensorRtFailed, match="max_batch_size of at least 1"):
        read_profile(tmp_path / "config.pbtxt")


@pytest.mark.parametrize(("number", "version"), [("8601", "8.6.1"), ("100500", "10.5.0"), ("101303", "10.13.3")])
def test_the_version_is_read_from_the_banner_of_old_and_new_releases(number: str, version: str) -> None:
    assert read_version(BANNER.format(number)) == version
    assert read_version("something else") == "unknown"


def _program(path: Path, script: str) -> str:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> str:
    return _program(tmp_path / "nvidia-smi", "echo 'NVIDIA L4, 8.9, 560.35.03'\n")


def test_the_record_beside_the_plan_says_what_it_was_built_with(tmp_path: Path, nvidia_smi: str) -> None:
    script = f"""echo '{BANNER.format(100500)}'
for a in "$@"; do case $a in --onnx=*) from=${{a#*=}};; --saveEngine=*) to=${{a#*=}};; esac; done
{{ printf 'plan of '; cat "$from"; }} > "$to"
"""
    files = build(b"graph", CONFIG, trtexec=_program(tmp_path / "trtexec", script), nvidia_smi=nvidia_smi)
    assert files["model.plan"] == b"plan of graph"
    assert json.loads(files["model.plan.json"]) == {
        "gpu": "NVIDIA L4, 8.9, 560.35.03",
        "tensorrt": "10.5.0",
        "precision": "fp16",
        "batch": {"min": 1, "opt": 8, "max": 16},
    }


def test_a_failing_trtexec_is_quoted(tmp_path: Path, nvidia_smi: str) -> None:
    trtexec = _program(tmp_path / "trtexec", "echo '[E] out of memory' >&2\nexit 1\n")
    with pytest.raises(TensorRtFailed, match=r"trtexec failed with exit code 1:\n.*out of memory"):
        build(b"graph", CONFIG, trtexec=trtexec, nvidia_smi=nvidia_smi)


def test_a_trtexec_that_writes_nothing_is_a_failure(tmp_path: Path, nvidia_smi: str) -> None:
    with pytest.raises(TensorRtFailed, match="wrote no plan"):
        build(b"graph", CONFIG, trtexec=_program(tmp_path / "trtexec", "exit 0\n"), nvidia_smi=nvidia_smi)


def test_a_host_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TensorRtFailed, match="needs a GPU"):
        build(b"graph", CONFIG, trtexec=_program(tmp_path / "trtexec", "exit 0\n"), nvidia_smi=str(tmp_path / "none"))
