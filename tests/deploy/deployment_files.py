"""What deploy/ is, as its own tools build it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

Object = Mapping[str, Any]
"""A Kubernetes object as it would be applied. Any: it is somebody else's format."""


def tool(name: str) -> str:
    """A program that a development dependency brings along."""
    return str(Path(sys.executable).with_name(name))


@cache
def kustomize(folder: Path) -> tuple[Object, ...]:
    """The objects of a kustomization, built by the real kustomize. Overlays need nothing from outside the checkout."""
    command = [tool("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # warnings, such as of deprecated fields
    return tuple(yaml.safe_load_all(done.stdout))


@cache
def elsewhere(overlay: Path) -> tuple[Object, ...]:
    """An overlay's objects in the namespace `elsewhere` of a cluster whose own things are called otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        up = Path(*[".."] * len(Path(folder).resolve().parts[1:]))
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "elsewhere",
            "resources": [str(up / overlay.relative_to("/"))],
            "transformers": [str(up / KUBERNETES.relative_to("/") / "parameters")],
            "configMapGenerator": [
                {
                    "name": "parameters",
                    "behavior": "merge",
                    "literals": [f"{key}={value}" for key, value in SURROUNDINGS.items()],
                }
            ],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(Path(folder))


SURROUNDINGS = {
    "prometheus-namespace": "watching",
    "prometheus-address": "http://prometheus.watching.svc:80",
    "prometheus-release": "watch",
    "runbooks": "https://wiki.test/runbooks",
}


def named_jobs(component: str) -> bool:
    """Whether a component has Jobs, whose names an overlay lets end in their image's tag."""
    return (KUBERNETES / "components" / component / "job-name").is_dir()


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Object, ...]]:
    """The base with some components, as an overlay of one's own would have them, and whatever else it may say."""

    def build(*components: str, **more: Any) -> tuple[Object, ...]:
        # kustomize wants relative paths, and nothing is to be written into the checkout.
        folder = tmp_path_factory.mktemp("overlay")
        up = Path(*[".."] * len(folder.resolve().parts[1:])) / KUBERNETES.relative_to("/")
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "inference",
            "resources": [str(up / "base")],
            "components": [str(up / "components" / name) for name in components],
            "transformers": [
                *(str(up / "components" / name / "job-name") for name in components if named_jobs(name)),
                str(up / "parameters"),
            ],
            "images": [{"name": "inference-gateway-models", "newName": "registry.test/models", "newTag": "2"}],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay | more))
        return kustomize(folder)

    return build
