"""Plans from the Job that builds them to the pod that takes its own, with tools that act as NVIDIA's without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import kubelet
import pytest
import yaml
from deployment_files import KUBERNETES, ROOT, kustomize
from manifests import only

from gateway.models import catalogue, tensorrt
from gateway.models.releases import DEPLOYED

MODEL = "efficientnet_lite0_tensorrt"
COMPONENTS = KUBERNETES / "components"
PUBLISH = COMPONENTS / "tensorrt-build" / "publish_plan.py"
L4 = "NVIDIA L4, 8.9, 610.43.02"


def banner(version: str) -> str:
    major, minor, patch = map(int, version.split("."))
    return f"&&&& RUNNING TensorRT.trtexec [TensorRT v{major}{minor:02}{patch:02}] # trtexec"


@pytest.fixture
def nvidia(tmp_path: Path) -> Callable[..., Mapping[str, str]]:
    """An environment with `trtexec` and `nvidia-smi` that say and leave what NVIDIA's do, on some host."""

    def make(gpu: str = L4, version: str = DEPLOYED.tensorrt) -> Mapping[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        capability = gpu.split(", ")[1]
        scripts = {
            "nvidia-smi": f'case "$*" in *name,*) echo "{gpu}";; *) echo {capability};; esac',
            "trtexec": f'echo "{banner(version)}"\n'
            f'for a in "$@"; do case $a in --saveEngine=*) echo "{version} on {gpu}" > "${{a#*=}}";; esac; done',
            "inference-gateway": f'cd "{ROOT}" && exec "{sys.executable}" -m gateway "$@"',
        }
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    return make


def wanted() -> str:
    """What the pods are told to want, by the manifest."""
    (triton,) = only(kustomize(KUBERNETES / "overlays" / "gpu"), "Deployment", "triton-gpu")["spec"]["template"][
        "spec"
    ]["containers"]
    model, _, name = kubelet.environment(triton)["PLANS_WANTED"].partition("=")
    assert model == MODEL
    return name


def test_the_pods_want_plans_of_the_graph_that_is_built() -> None:
    """The digest in the manifest is the one that `models build` gives the plan; another graph is another plan."""
    repository = ROOT / "model_repository"
    catalogue.build(["efficientnet_lite0_onnx_cuda"], repository)
    graph = (repository / "efficientnet_lite0_onnx_cuda/1/model.onnx").read_bytes()
    assert wanted() == tensorrt.wanted(graph, tensorrt.read_profile(repository / MODEL / "config.pbtxt"))


# The Job


@pytest.fixture
def build_job(tmp_path: Path, nvidia: Callable[..., Mapping[str, str]]) -> Callable[..., Path]:
    """Runs the Job on some host; the folder of its volume of plans."""
    for name in ("build", "plans", "tmp"):
        (tmp_path / name).mkdir()
    sources = tmp_path / "opt"
    shutil.copytree(
        ROOT / "model_repository" / MODEL, sources / MODEL, ignore=shutil.ignore_patterns("[0-9]*", "plans")
    )
    job = only(kustomize(KUBERNETES / "overlays" / "gpu"), "Job", f"build-tensorrt--0.1.0-{DEPLOYED.container}")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    folders = {
        "build": tmp_path / "build",
        "tmp": tmp_path / "tmp",
        "plans": tmp_path / "plans",
        "publish": PUBLISH.parent,
    }
    paths = {"/opt/models": sources, **kubelet.mounts(container, folders)}
    cache = {name: value for name, value in os.environ.items() if name in ("XDG_CACHE_HOME", "VIRTUAL_ENV")}

    def run(**host: str) -> Path:
        shutil.rmtree(tmp_path / "build")
        (tmp_path / "build").mkdir()
        done = kubelet.run(container, paths, environ={**cache, **nvidia(**host)}, timeout=250)
        assert done.returncode == 0, done.stderr
        return tmp_path / "plans"

    return run


def test_plans_of_every_gpu_and_release_lie_side_by_side_as_whole_models(build_job: Callable[..., Path]) -> None:
    hosts = [{}, {"gpu": "NVIDIA A100-SXM4-80GB, 8.0, 610.43.02"}, {"version": "11.1.0"}]
    for host in hosts:
        plans = build_job(**host)
    found = {plan.name.removeprefix(f"{wanted()}-"): plan for plan in (plans / MODEL).iterdir()}
    assert found.keys() == {f"cc8.9-trt{DEPLOYED.tensorrt}", f"cc8.0-trt{DEPLOYED.tensorrt}", "cc8.9-trt11.1.0"}
    for identity, plan in found.items():
        files = {str(file.relative_to(plan)) for file in plan.rglob("*") if file.is_file()}
        assert files == {"config.pbtxt", "labels.txt", "1/model.plan", "1/model.plan.json"}
        assert identity.rpartition("trt")[2] in (plan / "1" / "model.plan").read_text()


def built(folder: Path, identity: str = "graph-b1-8-16-cc8.9-trt11.2.1", plan: str = "a plan") -> Path:
    """A model's folder as `models build` leaves it."""
    version = folder / MODEL / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text("config")
    (version / "model.plan").write_text(plan)
    (version / ".built.json").touch()
    (version / "model.plan.json").write_text(json.dumps({"identity": identity}))
    return version.parent


def publish(model: Path, plans: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PUBLISH), str(model), str(plans)], capture_output=True, text=True, check=False
    )


def test_a_plan_that_is_there_stays_and_what_a_killed_job_left_goes(tmp_path: Path) -> None:
    """A pod may be reading it, and a plan of the same identity is as good."""
    plans = tmp_path / "plans" / MODEL
    half = plans / ".graph-b1-8-16-cc8.9-trt11.2.1"
    half.mkdir(parents=True)
    (half / "half").touch()
    for n in (1, 2):
        done = publish(built(tmp_path / str(n), plan=f"plan {n}"), tmp_path / "plans")
        assert done.returncode == 0, done.stderr
    assert [plan.name for plan in plans.iterdir()] == ["graph-b1-8-16-cc8.9-trt11.2.1"]
    (plan,) = plans.iterdir()
    assert (plan / "1" / "model.plan").read_text() == "plan 1"
    assert not list(plan.rglob("half"))


def test_a_plan_without_an_identity_is_not_published(tmp_path: Path) -> None:
    model = built(tmp_path)
    (model / "1" / "model.plan.json").write_text("{}")
    assert publish(model, tmp_path / "plans").returncode != 0
    assert not (tmp_path / "plans").exists()


# Names and times of Jobs


def test_a_jobs_name_changes_with_its_image_and_it_goes_by_itself() -> None:
    """`apply` of a changed Job under an old name is refused, which stops GitOps for good."""
    jobs = [each for each in kustomize(KUBERNETES / "overlays" / "gpu") if each["kind"] == "Job"]
    assert len(jobs) == 2
    for job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert job["metadata"]["name"].endswith(f"--{container['image'].rpartition(':')[2]}")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", job["metadata"]["name"])
        assert len(job["metadata"]["name"]) <= 63
        assert job["spec"]["ttlSecondsAfterFinished"] > 0


def test_another_tag_in_an_overlay_is_another_job(tmp_path: Path) -> None:
    up = Path(*[".."] * len(tmp_path.resolve().parts[1:])) / COMPONENTS.relative_to("/")
    jobs = {"models-pvc": "publish-models", "tensorrt-build": "build-tensorrt"}
    overlay = {
        "resources": [str(up.parent / "base")],
        "components": [str(up / name) for name in ("triton-gpu", *jobs)],
        "transformers": [str(up / name / "job-name") for name in jobs],
        "images": [
            {"name": f"inference-gateway-{name}", "newName": "registry.test/it", "newTag": "7.0"}
            for name in ("models", "tensorrt")
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    names = {each["metadata"]["name"] for each in kustomize(tmp_path) if each["kind"] == "Job"}
    assert names == {f"{name}--7.0" for name in jobs.values()}


def test_the_builders_tag_names_the_release_of_its_tensorrt() -> None:
    """So that another release is another Job."""
    text = (COMPONENTS / "tensorrt-build" / "job.yaml").read_text()
    assert re.findall(r"image: inference-gateway-tensorrt:[\d.]+-(\S+)", text) == [DEPLOYED.builder]


# How a pod knows what it is: load_later.py; tests/integration/test_gpu_fallback.py runs it beside a Triton


def test_a_pod_knows_its_tensorrt_by_the_images_word_or_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(COMPONENTS / "triton-gpu"))
    import load_later  # noqa: PLC0415  # type: ignore[import-not-found]

    assert load_later.tensorrt({"TRT_VERSION": "11.2.1.2+cuda13.4"}, tmp_path) == "11.2.1"
    with pytest.raises(LookupError):
        load_later.tensorrt({}, tmp_path)
    library = tmp_path / "usr/lib/x86_64-linux-gnu/libnvinfer.so.10.5.0"
    library.parent.mkdir(parents=True)
    library.touch()
    (library.parent / "libnvinfer.so.10").symlink_to(library.name)
    assert load_later.tensorrt({}, tmp_path) == "10.5.0"


def test_a_pod_that_cannot_tell_what_it_is_takes_no_plan_and_loads_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(COMPONENTS / "triton-gpu"))
    import load_later  # noqa: PLC0415

    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    environ = {"PLANS": str(tmp_path), "PLANS_WANTED": f"{MODEL}=graph", "LOAD_LATER": "other", "TRT_VERSION": "11.2.1"}
    loader = load_later.Loader(environ)
    assert (loader.open, loader.plans) == (["other"], {})


def test_triton_is_the_containers_process_that_signals_reach(tmp_path: Path) -> None:
    """The loader runs behind it, and Triton gets the arguments as they are."""
    (container,) = only(kustomize(KUBERNETES / "overlays" / "gpu"), "Deployment", "triton-gpu")["spec"]["template"][
        "spec"
    ]["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    triton = tmp_path / "tritonserver"
    triton.write_text('#!/bin/sh\necho "$$ $#"\n')
    triton.chmod(0o755)
    (tmp_path / "load_later.py").touch()
    words = [kubelet.inside(word, {"/scripts": tmp_path}) for word in container["command"]]
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen([*words, *container["args"]], env=environ, stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=120)
    assert said.split() == [str(process.pid), str(len(container["args"]))]
