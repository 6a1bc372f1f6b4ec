"""The Job that fills the shared volume, by its own words in a shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deployment_files import KUBERNETES, kustomize
from manifests import only


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models in an image, and a volume where one of them has been for a while."""
    for model, content in (("old", "from the image"), ("new", "from the image")):
        (tmp_path / "models" / model / "1").mkdir(parents=True)
        (tmp_path / "models" / model / "1" / "model.onnx").write_text(content)
    (tmp_path / "repository" / "old" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "old" / "1" / "model.nvidia-l4.plan").write_text("built there")
    return tmp_path


def publish(folder: Path) -> str:
    job = only(kustomize(KUBERNETES / "overlays" / "gpu"), "Job", "publish-models")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["args"][0].replace("cd /models", f"cd {folder}/models")
    script = script.replace("/repository/", f"{folder}/repository/")
    done = subprocess.run([*container["command"], script], capture_output=True, text=True, check=True)
    return done.stdout


def test_new_models_are_published_whole_and_those_that_are_there_are_left_alone(folder: Path) -> None:
    assert publish(folder) == "published new\n"
    assert (folder / "repository" / "new" / "1" / "model.onnx").read_text() == "from the image"
    assert [file.name for file in (folder / "repository" / "old" / "1").iterdir()] == ["model.nvidia-l4.plan"]


def test_a_job_that_was_killed_is_done_again(folder: Path) -> None:
    (folder / "repository" / ".new" / "1").mkdir(parents=True)
    (folder / "repository" / ".new" / "1" / "half").touch()
    publish(folder)
    assert [file.name for file in (folder / "repository" / "new" / "1").iterdir()] == ["model.onnx"]
    assert not (folder / "repository" / ".new").exists()
    assert publish(folder) == ""
