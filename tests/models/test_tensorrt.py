"""The plan's command line, identity and record. Scripts that speak like NVIDIA's two programs stand in for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from gateway.models import catalogue, tensorrt
from gateway.models.catalogue import BuildFailed, State, find, state_of
from gateway.models.releases import DEPLOYED, OLDEST, RELEASES, UnsupportedRelease, typing_flags
from gateway.models.tensorrt import (
    Host,
    Profile,
    TensorRtFailed,
    build,
    command,
    look_at_host,
    read_profile,
    read_version,
)

MODEL = "efficientnet_lite0_tensorrt"
CONFIG = Path(__file__).parents[2] / "model_repository" / MODEL / "config.pbtxt"
BANNER = "&&&& RUNNING TensorRT.trtexec [TensorRT v{}] # trtexec"
L4 = "NVIDIA L4, 8.9, 560.35.03"
PROFILE = Profile("image", (3, 224, 224), least=1, usual=8, most=16)
HOST = Host(L4, "8.9", "11.2.1")


# The table of versions


def test_the_table_goes_from_the_oldest_to_the_newest() -> None:
    for field in ("container", "triton", "tensorrt", "onnxruntime"):
        numbers = [tuple(map(int, getattr(release, field).split("."))) for release in RELEASES]
        assert numbers == sorted(set(numbers)), field
    assert (RELEASES[0], RELEASES[-1]) == (OLDEST, DEPLOYED)


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        pytest.param("10.5.0", ("--stronglyTyped",), id="the oldest"),
        pytest.param("10.16.1", ("--stronglyTyped",), id="the last that has weak typing"),
        pytest.param("11.0.0", (), id="the first without"),
        pytest.param("11.2.1", (), id="the newest"),
        pytest.param("11.4.0", (), id="a later minor version"),
    ],
)
def test_precision_comes_from_the_graph_with_every_tensorrt(version: str, flags: tuple[str, ...]) -> None:
    assert typing_flags(version) == flags
    words = command("trtexec", Path("m.onnx"), Path("m.plan"), PROFILE, version)
    assert not [word for word in words if re.match(r"--(fp16|bf16|fp8|int8|int4|best)\b", word)]


@pytest.mark.parametrize("version", ["10.4.0", "8.6.1", "12.0.0", "unknown"])
def test_a_tensorrt_that_nobody_looked_up_is_refused_with_those_that_are_supported(version: str) -> None:
    with pytest.raises(UnsupportedRelease, match=rf"{OLDEST.tensorrt} .*{DEPLOYED.tensorrt} "):
        typing_flags(version)


def test_the_page_of_the_models_shows_the_table() -> None:
    page = (CONFIG.parents[1] / "README.md").read_text()
    rows = [
        f"| tritonserver:{each.container}-py3 | {each.triton} | {each.tensorrt} | {each.onnxruntime} "
        f"| tensorrt:{each.builder}-py3 | {' '.join(f'`{flag}`' for flag in typing_flags(each.tensorrt)) or '–'} |"
        for each in RELEASES
    ]
    assert "\n".join(["| --- | --- | --- | --- | --- | --- |", *rows, ""]) in page


# The command


def test_the_plan_takes_every_batch_that_triton_may_make() -> None:
    assert read_profile(CONFIG) == PROFILE
    assert command("trtexec", Path("m.onnx"), Path("m.plan"), PROFILE, "10.5.0") == [
        "trtexec",
        "--onnx=m.onnx",
        "--saveEngine=m.plan",
        "--stronglyTyped",
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


@pytest.mark.parametrize(
    ("number", "version"), [("8601", "8.6.1"), ("100500", "10.5.0"), ("101303", "10.13.3"), ("110201", "11.2.1")]
)
def test_the_version_is_read_from_the_banner_of_old_and_new_releases(number: str, version: str) -> None:
    assert read_version(BANNER.format(number)) == version
    assert read_version("something else") == "unknown"


# NVIDIA's programs


def _program(path: Path, script: str) -> str:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


Tools = Callable[..., dict[str, str]]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Makes `trtexec` and `nvidia-smi`, as `look_at_host` takes them."""

    def make(gpus: str = L4, number: str = "110201", builds: str | None = None) -> dict[str, str]:
        if builds is None:
            builds = f"""for a in "$@"; do
  case $a in --onnx=*) from=${{a#*=}};; --saveEngine=*) to=${{a#*=}};; esac
done
[ -z "$to" ] || {{ printf 'plan by {number} for {gpus} of '; sha256sum < "$from"; }} > "$to"
[ -z "$to" ] || echo built >> {tmp_path}/builds
"""
        return {
            "trtexec": _program(tmp_path / "trtexec", f"echo '{BANNER.format(number)}'\n{builds}"),
            "nvidia_smi": _program(tmp_path / "nvidia-smi", f"printf '{gpus}\\n'\n"),
        }

    return make


def test_a_host_is_told_by_its_gpu_and_its_trtexec(tools: Tools) -> None:
    assert look_at_host(**tools()) == HOST


def test_several_gpus_of_one_kind_are_one_host_and_of_several_kinds_are_not(tools: Tools) -> None:
    assert look_at_host(**tools(gpus=rf"{L4}\n{L4}")).capability == "8.9"
    with pytest.raises(TensorRtFailed, match=r"8\.0, 8\.9"):
        look_at_host(**tools(gpus=rf"{L4}\nNVIDIA A100-SXM4-80GB, 8.0, 560.35.03"))


@pytest.mark.parametrize("said", ["", "No devices were found", r"NVIDIA L4, [N/A], 560.35.03"])
def test_a_gpu_without_a_capability_is_none(tools: Tools, said: str) -> None:
    with pytest.raises(TensorRtFailed, match="compute capability"):
        look_at_host(**tools(gpus=said))


def test_a_tensorrt_out_of_the_table_builds_nothing(tools: Tools) -> None:
    with pytest.raises(TensorRtFailed, match=r"TensorRT 8\.6\.1 is not supported"):
        look_at_host(**tools(number="8601"))


def test_the_record_beside_the_plan_says_what_it_was_built_from_and_on(tools: Tools) -> None:
    files = build(b"graph", PROFILE, HOST, trtexec=tools()["trtexec"])
    graph = sha256(b"graph").hexdigest()
    assert files["model.plan"].decode().split()[-2] == graph
    assert json.loads(files["model.plan.json"]) == {
        "identity": f"{graph[:16]}-b1-8-16-cc8.9-trt11.2.1",
        "graph": graph,
        "batch": {"min": 1, "opt": 8, "max": 16},
        "gpu": L4,
        "compute_capability": "8.9",
        "tensorrt": "11.2.1",
        "plan": sha256(files["model.plan"]).hexdigest(),
    }


def test_a_failing_trtexec_is_quoted(tools: Tools) -> None:
    with pytest.raises(TensorRtFailed, match=r"trtexec failed with exit code 1:\n(.*\n)*.*out of memory"):
        build(b"graph", PROFILE, HOST, trtexec=tools(builds="echo '[E] out of memory' >&2\nexit 1\n")["trtexec"])


def test_a_trtexec_that_writes_nothing_is_a_failure(tools: Tools) -> None:
    with pytest.raises(TensorRtFailed, match="wrote no plan"):
        build(b"graph", PROFILE, HOST, trtexec=tools(builds="exit 0\n")["trtexec"])


def test_a_host_without_a_gpu_is_told_so(tools: Tools, tmp_path: Path) -> None:
    with pytest.raises(TensorRtFailed, match="needs a GPU"):
        look_at_host(trtexec=tools()["trtexec"], nvidia_smi=str(tmp_path / "none"))


# Identity: graph and batches, compute capability, release


@pytest.fixture
def on(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Moves this test to another host."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def move(**host: str) -> None:
        tools(**host)

    return move


def builds(folder: Path) -> int:
    log = folder / "builds"
    return log.read_text().count("built") if log.exists() else 0


def test_a_plan_of_another_gpu_or_release_is_stale_and_the_plan_of_this_one_is_built_beside_it(
    on: Callable[..., None], empty_repository: Path, tmp_path: Path
) -> None:
    """After the image is bumped nobody is told that everything is built already."""
    hosts = ({}, {"gpus": "NVIDIA A100-SXM4-80GB, 8.0, 560.35.03"}, {"number": "110101"})
    plan = empty_repository / MODEL / "1/model.plan"
    for n, host in enumerate(hosts):
        on(**host)
        assert state_of(find(MODEL), empty_repository) is (State.STALE if n else State.MISSING)
        assert catalogue.build([MODEL], empty_repository) == [MODEL]
        assert catalogue.build([MODEL], empty_repository) == []
        assert f"for {host.get('gpus', L4)}" in plan.read_text()
    names = sorted(file.name for file in (empty_repository / MODEL / "plans").glob("*.plan"))
    assert [re.sub(r"^[0-9a-f]{16}-", "", name) for name in names] == [
        "b1-8-16-cc8.0-trt11.2.1.plan",
        "b1-8-16-cc8.9-trt11.1.1.plan",
        "b1-8-16-cc8.9-trt11.2.1.plan",
    ]
    on()  # back again: the plan is there, and only takes its place
    assert catalogue.build([MODEL], empty_repository) == [MODEL]
    assert (f"for {L4}" in plan.read_text(), builds(tmp_path)) == (True, 3)
    assert catalogue.build([MODEL], empty_repository, force=True) == [MODEL]
    assert builds(tmp_path) == 4


def test_a_plan_for_other_batches_is_stale(on: Callable[..., None], empty_repository: Path) -> None:
    on()
    catalogue.build([MODEL], empty_repository)
    config = empty_repository / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 16", "max_batch_size: 32"))
    assert state_of(find(MODEL), empty_repository) is State.STALE


def test_half_a_plan_is_not_used(on: Callable[..., None], empty_repository: Path, tmp_path: Path) -> None:
    on()
    catalogue.build([MODEL], empty_repository)
    (plan,) = (empty_repository / MODEL / "plans").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:5])
    assert catalogue.build([MODEL], empty_repository) == [MODEL]
    assert builds(tmp_path) == 2


def test_where_no_plan_can_be_built_none_is_called_current(
    on: Callable[..., None], empty_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on()
    catalogue.build([MODEL], empty_repository)
    monkeypatch.setattr(tensorrt.shutil, "which", lambda _name: None)
    with pytest.raises(BuildFailed, match="trtexec"):
        catalogue.build([MODEL], empty_repository)
