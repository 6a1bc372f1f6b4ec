"""`models optimise`: a sweep over a real Triton, a program in place of perf_analyzer, and once the real one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from triton_fixture import LABELS, write_add, write_onnx_config

from gateway import optimise
from gateway.models.tuning import Setting
from gateway.optimise import OptimiseFailed, Sweep

PERF_ANALYZER = shutil.which(os.environ.get("PERF_ANALYZER") or "perf_analyzer")

PLAYED = """#!{python}
import sys
from tritonclient.grpc import InferenceServerClient
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with InferenceServerClient(given["-u"]) as client:
    config = client.get_model_config(given["-m"]).config
instances = config.instance_group[0].count
threads = int(config.parameters["intra_op_thread_count"].string_value)
rate = 100 * instances + 10 * threads + int(given.get("-b", 1))
open(given["-f"], "w").write("Concurrency,Inferences/Second,p50 latency,p99 latency\\n1,%d,1000,2000\\n" % rate)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_onnx_config(tmp_path / "models/labels", dims=len(LABELS), label_filename="labels.txt")
    (tmp_path / "models/labels/labels.txt").write_text("\n".join(LABELS))
    write_add(tmp_path / "models/labels/1/model.onnx", 0)
    return tmp_path / "models"


def program(folder: Path, text: str) -> dict[str, str]:
    """The environment in which it stands for perf_analyzer."""
    file = folder / "played"
    file.write_text(text)
    file.chmod(0o755)
    return {**os.environ, "PERF_ANALYZER": str(file)}


async def test_each_setting_is_served_as_it_is_measured_and_the_best_is_told(repository: Path, tmp_path: Path) -> None:
    before = (repository / "labels/config.pbtxt").read_bytes()
    said: list[str] = []
    environ = program(tmp_path, PLAYED.format(python=sys.executable))
    assert await optimise.optimise(Sweep(repository, "labels", cores=2), environ, said.append) == 0
    text = "\n".join(said)
    for setting, rate in ((Setting(1, 1), 111), (Setting(1, 2), 121), (Setting(2, 1), 211)):
        assert f"measured {setting}, 1 to a request: {rate}.0 rows/s" in text
    assert "count: 2" in text  # the choice
    assert "gain 3%, not worth a wait" in text
    assert (repository / "labels/config.pbtxt").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo could not connect >&2; exit 3", "no figures: could not connect"),
        ("echo unstable", "no figures: unstable"),
        ("sleep 60", "no figures: it did not end"),
    ],
)
def test_a_program_that_gives_no_figures_is_told_with_its_last_words(tmp_path: Path, text: str, told: str) -> None:
    environ = program(tmp_path, f"#!/bin/sh\n{text}\n")
    with pytest.raises(OptimiseFailed, match=told):
        optimise.run_once([environ["PERF_ANALYZER"]], 0.5, environ)


def test_without_perf_analyzer_it_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(OptimiseFailed, match="pip install perf-analyzer"):
        optimise.perf_analyzer({"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('backend: "onnxruntime" input [ { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] } ]', "say --shape IN:128"),
        ('backend: "python"', "backend of m is 'python'"),
        ('backend: "onnxruntime" model_transaction_policy { decoupled: true }', "answers in streams"),
        ('backend: "onnxruntime" sequence_batching { }', "keeps sequences"),
        ('backend: "onnxruntime" instance_group [ { kind: KIND_GPU } ]', "is for GPUs"),
    ],
)
def test_a_model_that_a_sweep_cannot_tell_of_is_refused(tmp_path: Path, config: str, told: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.pbtxt").write_text(config)
    with pytest.raises(OptimiseFailed, match=told):
        optimise.read_config(Sweep(tmp_path, "m", cores=1))


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptimiseFailed, match=r"no m/config\.pbtxt"):
        optimise.read_config(Sweep(tmp_path, "m", cores=1))


@pytest.mark.skipif(PERF_ANALYZER is None, reason="perf_analyzer is neither on PATH nor in PERF_ANALYZER")
async def test_the_real_perf_analyzer_gives_figures(repository: Path) -> None:
    said: list[str] = []
    config = repository / "labels/config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 1"))
    assert await optimise.optimise(Sweep(repository, "labels", cores=1), os.environ, said.append) == 0
    assert "1 instance of 1 thread" in said[-2]
