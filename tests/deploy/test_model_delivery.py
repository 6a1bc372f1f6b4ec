"""How models reach the pods: every pool with every way of delivery, and the Job that fills the shared volume.

The containers' own commands run in a shell, over folders that stand for their volumes and images.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubelet
import pytest
from deployment_files import KUBERNETES, ROOT, Object, kustomize
from manifests import only

from gateway.models import catalogue
from gateway.triton.repository import survey

POOLS = {
    "triton-cpu": ("triton-cpu",),
    "triton-gpu": ("triton-gpu",),
    "triton-gpu with plans": ("triton-gpu", "tensorrt-build"),
}
DELIVERIES = sorted(each.name for each in (KUBERNETES / "components").glob("models-*"))
Compose = Callable[..., tuple[Object, ...]]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder /models of the image `models`: the repository, built, and then what the Dockerfile does to it."""
    source = ROOT / "model_repository"
    catalogue.build((), source)
    folder = tmp_path_factory.mktemp("image") / "models"
    shutil.copytree(source, folder, copy_function=_linked, ignore=shutil.ignore_patterns("plans", "README.md"))
    for recipe in set(catalogue.RECIPES) - set(catalogue.BY_DEFAULT):  # of a host with a GPU, or of another test
        shutil.rmtree(folder / recipe.name / "1", ignore_errors=True)
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    (loop,) = re.findall(r"&& (for model in /models/.*?done) \\", dockerfile)
    subprocess.run(["sh", "-euc", loop.replace("/models", str(folder))], check=True)
    return folder


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def test_a_model_that_was_not_built_is_not_in_the_image(image: Path) -> None:
    """In Triton's default mode one model that can't load is the end of the server."""
    there = {folder.name for folder in image.iterdir()}
    assert there == {recipe.name for recipe in catalogue.BY_DEFAULT}


# Every pool with every delivery


def delivered(objects: tuple[Object, ...], pod: Mapping[str, Any], image: Path, folder: Path) -> Path:
    """The folder that the pod's Triton reads models from, after everything that comes before it has run."""
    volumes = {}
    for volume in pod["volumes"]:
        if "image" in volume:
            volumes[volume["name"]] = image.parent
        elif "persistentVolumeClaim" in volume:
            volumes[volume["name"]] = folder / volume["persistentVolumeClaim"]["claimName"]
        else:
            volumes[volume["name"]] = folder / volume["name"]
        volumes[volume["name"]].mkdir(exist_ok=True)
    for job in (each for each in objects if each["kind"] == "Job" and each["metadata"]["name"].startswith("publish-")):
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        claim = {"repository": folder / "model-repository", "scripts": KUBERNETES / "components" / "models-pvc"}
        done = kubelet.run(container, {"/models": image, **kubelet.mounts(container, claim)})
        assert done.returncode == 0, done.stderr
    for container in pod.get("initContainers", ()):
        done = kubelet.run(container, {"/models": image, **kubelet.mounts(container, volumes)})
        assert done.returncode == 0, done.stderr
    (triton,) = pod["containers"]
    repository = kubelet.environment(triton)["MODEL_REPOSITORY"]
    if repository.startswith("s3://"):
        return image  # uploaded as it is
    return Path(kubelet.inside(repository, kubelet.mounts(triton, volumes)))


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("pool", POOLS)
def test_what_a_pool_loads_is_what_its_delivery_brings_and_nothing_waits(
    composed: Compose, image: Path, tmp_path: Path, pool: str, delivery: str
) -> None:
    """No pod waits before Triton starts: what is still being built is loaded when it is there."""
    components = POOLS[pool]
    objects = composed(*components, delivery)
    pod = only(objects, "Deployment", components[0])["spec"]["template"]["spec"]
    found = {model.name: model.problem for model in survey(delivered(objects, pod, image, tmp_path))}
    (triton,) = pod["containers"]
    environ = kubelet.environment(triton)
    loaded = [argument.partition("=")[2] for argument in triton["args"] if argument.startswith("--load-model=")]
    later = environ.get("LOAD_LATER", "").split()
    assert loaded
    for model in (*loaded, *later):
        assert found[model] == "" or ("gpu" in pool and "KIND_GPU" in found[model]), model
    wanted = {each.partition("=")[0] for each in environ.get("PLANS_WANTED", "").split()}
    assert bool(wanted) is ("tensorrt-build" in components)
    assert not wanted & found.keys(), "a model in two repositories is one that Triton does not load"


def test_a_gpu_pod_asks_for_its_gpus_once(composed: Compose) -> None:
    """Containers of a pod add up what they ask for, so whoever helps Triton works inside its container."""
    pod = only(composed("triton-gpu", "tensorrt-build", "models-pvc"), "Deployment", "triton-gpu")["spec"]["template"][
        "spec"
    ]
    asks = [each for each in pod["containers"] if "nvidia.com/gpu" in each["resources"].get("limits", {})]
    assert [each["name"] for each in asks] == ["triton"]


# Files that pipelines read


def test_the_gateway_gets_what_pipelines_read_and_no_weights(composed: Compose, image: Path, tmp_path: Path) -> None:
    pod = only(composed("gateway-model-files"), "Deployment", "inference-gateway")["spec"]["template"]["spec"]
    (container,) = pod["initContainers"]
    done = kubelet.run(container, {"/models": image, **kubelet.mounts(container, {"model-files": tmp_path})})
    assert done.returncode == 0, done.stderr
    there = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert there >= {"langid/1/next_state.npy", "magika/content_types.json", "efficientnet_lite0_onnx/labels.txt"}
    assert not [name for name in there if name.endswith(".onnx")]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "model-files"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/etc/inference-gateway/models", True)
    (volume,) = [each for each in pod["volumes"] if each["name"] == "model-files"]
    assert sum(file.stat().st_size for file in image.rglob("*") if file.is_file()) < 512 << 20
    assert volume["emptyDir"]["sizeLimit"] == "512Mi"


# The Job that fills the volume


SHELLS = [shell for shell in (["busybox", "sh"], ["sh"]) if shutil.which(shell[0])]


@pytest.fixture(params=SHELLS, ids=lambda shell: shell[0])
def publish(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the Job over tmp_path/models (the image) and tmp_path/repository (the volume)."""
    (tmp_path / "models").mkdir()
    (tmp_path / "repository").mkdir()
    job = only(kustomize(KUBERNETES / "overlays" / "gpu"), "Job", "publish-models--0.1.0")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    folders = {"repository": tmp_path / "repository", "scripts": KUBERNETES / "components" / "models-pvc"}
    assert container["command"][0] == "sh"
    container = {**container, "command": [*request.param, *container["command"][1:]]}

    def run(**environ: str) -> subprocess.CompletedProcess[str]:
        return kubelet.run(
            container, {"/models": tmp_path / "models", **kubelet.mounts(container, folders)}, environ=environ
        )

    return run


Publish = Callable[..., subprocess.CompletedProcess[str]]


def model(folder: Path, config: str = "config", **versions: str) -> Path:
    """A model's folder with versions `v1="…"`."""
    for name, content in versions.items():
        (folder / name[1:]).mkdir(parents=True, exist_ok=True)
        (folder / name[1:] / "model.onnx").write_text(content)
    (folder / "config.pbtxt").write_text(config)
    (folder / "labels.txt").write_text(f"labels of {config}")
    return folder


def state(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_new_model_appears_whole_and_a_second_run_changes_nothing(publish: Publish, tmp_path: Path) -> None:
    model(tmp_path / "models" / "new", v1="one")
    assert publish().stdout == "published new\n"
    assert state(tmp_path / "repository") == state(tmp_path / "models")
    assert (publish().stdout, publish().returncode) == ("", 0)


def test_a_new_version_and_its_config_appear_and_the_old_one_stays(publish: Publish, tmp_path: Path) -> None:
    model(tmp_path / "repository" / "it", "old", v1="one")
    model(tmp_path / "models" / "it", "new", v2="two")
    done = publish()
    assert done.stdout.split("\n")[:-1] == ["published it/2", "published it/labels.txt", "published it/config.pbtxt"]
    assert state(tmp_path / "repository" / "it") == {
        "1/model.onnx": "one",
        "2/model.onnx": "two",
        "config.pbtxt": "new",
        "labels.txt": "labels of new",
    }


def test_old_versions_go_if_so_many_are_to_stay(publish: Publish, tmp_path: Path) -> None:
    model(tmp_path / "repository" / "it", v2="two", v9="nine")
    model(tmp_path / "models" / "it", v10="ten")
    assert publish(KEEP_VERSIONS="2").stdout.split("\n")[:-1] == ["published it/10", "removed it/2"]
    assert {file.name for file in (tmp_path / "repository" / "it").iterdir() if file.is_dir()} == {"9", "10"}


@pytest.mark.parametrize("number", ["0", "", "-1", "two", "1 2"])
def test_no_number_of_versions_to_keep_takes_the_last_one(publish: Publish, tmp_path: Path, number: str) -> None:
    model(tmp_path / "repository" / "it", v1="one")
    model(tmp_path / "models" / "it", v1="one")
    assert publish(KEEP_VERSIONS=number).returncode == 2
    assert (tmp_path / "repository" / "it" / "1").is_dir()


def test_a_changed_version_under_an_old_number_is_refused_and_the_others_are_published(
    publish: Publish, tmp_path: Path
) -> None:
    """Exit 0 over a volume that is not what the image says would be a lie."""
    before = state(model(tmp_path / "repository" / "it", "old", v1="one"))
    model(tmp_path / "models" / "it", "new", v1="another one", v2="two")
    model(tmp_path / "models" / "other", v1="one")
    done = publish()
    assert (done.returncode, done.stdout) == (1, "published other\n")
    assert "it/1 is on the volume with other contents" in done.stderr
    assert state(tmp_path / "repository" / "it") == before


def test_a_file_that_is_missing_or_more_in_a_version_is_a_change(publish: Publish, tmp_path: Path) -> None:
    model(tmp_path / "models" / "it", v1="one")
    publish()
    (tmp_path / "models" / "it" / "1" / "table.npy").touch()
    assert publish().returncode == 1
    (tmp_path / "models" / "it" / "1" / "table.npy").unlink()
    (tmp_path / "models" / "it" / "1" / ".built.json").touch()  # the builder's own, no part of the model
    assert publish().returncode == 0


def test_a_job_that_was_killed_is_done_again(publish: Publish, tmp_path: Path) -> None:
    """What a killed run leaves begins with a dot, so no Triton reads it."""
    model(tmp_path / "models" / "new", v1="one")
    model(tmp_path / "models" / "it", v1="one", v2="two")
    model(tmp_path / "repository" / "it", v1="one")
    for partial in (tmp_path / "repository" / ".new" / "1", tmp_path / "repository" / "it" / ".2"):
        partial.mkdir(parents=True)
        (partial / "half").touch()
    assert publish().returncode == 0
    assert state(tmp_path / "repository") == state(tmp_path / "models")


def test_who_looks_all_the_time_never_sees_half_a_version(publish: Publish, tmp_path: Path) -> None:
    """Nor half a label file, nor a config that names a version before it is there."""
    model(tmp_path / "repository" / "it", "old", v1="one")
    image = model(tmp_path / "models" / "it", "new" * 100_000, v2="two")
    for n in range(200):
        (image / "2" / f"part{n}").write_bytes(bytes(10_000))
    repository, seen, done = tmp_path / "repository" / "it", set(), threading.Event()

    def look() -> None:
        while not done.is_set():
            config = (repository / "config.pbtxt").read_text()
            version = repository / "2"
            parts = len(list(version.iterdir())) if version.is_dir() else 0
            seen.add((len(config), len((repository / "labels.txt").read_text()), parts))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            assert publish().returncode == 0
        finally:
            done.set()
        looking.result()
    sizes, labels = {3, 300_000}, {len("labels of old"), len("labels of ") + 300_000}
    assert {each[0] for each in seen} <= sizes
    assert {each[1] for each in seen} <= labels
    assert {each[2] for each in seen} <= {0, 201}
    assert not [each for each in seen if each[0] == 300_000 and each[2] == 0]
