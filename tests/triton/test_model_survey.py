"""The survey tells which models of a repository the local server can serve, and why not the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.triton import repository
from gateway.triton.repository import survey

ENSEMBLE = 'platform: "ensemble" ensemble_scheduling {{ step [ {{ model_name: "{}" model_version: -1 }} ] }}'


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "has_gpu", lambda: False)


def add(folder: Path, name: str, config: str | None, *files: str) -> None:
    (folder / name).mkdir()
    if config is not None:
        (folder / name / "config.pbtxt").write_text(config)
    for file in files:
        (folder / name / file).parent.mkdir(exist_ok=True)
        (folder / name / file).write_bytes(b"")


@pytest.mark.parametrize(
    ("config", "files", "problem"),
    [
        pytest.param('backend: "onnxruntime"', ["1/model.onnx"], "", id="onnx"),
        pytest.param('platform: "onnxruntime_onnx"', ["1/model.onnx"], "", id="platform"),
        pytest.param('backend: "python"', ["1/model.py"], "", id="python"),
        pytest.param(None, ["1/model.onnx"], "", id="no config"),
        pytest.param('backend: "onnxruntime" default_model_filename: "m.onnx"', ["2/m.onnx"], "", id="file name"),
        pytest.param('backend: "onnxruntime" of_tomorrow: 1', ["1/model.onnx"], "", id="newer field"),
        pytest.param('backend: "onnxruntime"', ["01/model.onnx"], "weights are missing", id="no version"),
        pytest.param('backend: "onnxruntime"', ["1/model.plan"], "no model.onnx in a version folder", id="no weights"),
        pytest.param('platform: "tensorrt_plan"', ["1/model.plan"], "it needs a GPU", id="tensorrt"),
        pytest.param(
            'backend: "onnxruntime" instance_group [{ kind: KIND_GPU }]', ["1/model.onnx"], "is KIND_GPU", id="on a GPU"
        ),
        pytest.param('backend: "pytorch"', ["1/model.pt"], "the local server has no pytorch backend", id="other"),
        pytest.param("backend: ", ["1/model.onnx"], "its config.pbtxt cannot be read: 1:", id="broken config"),
        pytest.param(ENSEMBLE.format("part"), [], "", id="ensemble"),
        pytest.param(ENSEMBLE.format("gone"), [], "its step gone is not served: it is not in the", id="ensemble part"),
        pytest.param(ENSEMBLE.format("it"), [], "it contains itself through it", id="ensemble circle"),
    ],
)
def test_problem(tmp_path: Path, config: str | None, files: list[str], problem: str) -> None:
    add(tmp_path, "it", config, *files)
    add(tmp_path, "part", 'backend: "python"', "1/model.py")
    (tmp_path / "README.md").write_text("no model")
    found = {model.name: model for model in survey(tmp_path)}
    assert set(found) == {"it", "part"}
    if problem:
        assert problem in found["it"].problem
    else:
        assert found["it"].problem == ""


def test_a_gpu_does_not_bring_the_local_server_a_tensorrt_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "has_gpu", lambda: True)
    add(tmp_path, "it", 'platform: "tensorrt_plan"', "1/model.plan")
    assert "NVIDIA's container may" in survey(tmp_path)[0].problem
