"""A real Triton for the tests, serving models whose answers are known beforehand.

`triton` is one for the whole run; `triton_factory` starts further ones, to be killed and started again at will. What
each model does is said on top of its config or source in `triton_models/`, and in `_build_onnx_models`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import onnx
import pytest
from onnx import TensorProto, helper

from gateway.triton import LocalTriton

SOURCES = Path(__file__).with_name("triton_models")

DTYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
DTYPES += ("FP16", "BF16", "FP32", "FP64", "BYTES")
"""Every dtype of the V2 protocol; `identity_<dtype in lower case>` answers OUT = IN, shaped [-1, -1], for each."""

_shared: list[LocalTriton] = []

MODELS = (
    *(f"identity_{dtype.lower()}" for dtype in DTYPES),
    *("add_one_a", "add_one_b", "add_two", "classifier"),
    *("repeat", "by_id", "slow", "accumulate", "accumulate_text", "params_echo", "fails", "picky", "faulty"),
)
"""What `triton` serves."""

ODD_MODELS = ("counted", "silent", "words", "batched_echo", "changes", "größe")
"""The others in the test repository, for those who start a Triton with them."""

LABELS = ("ant", "bee", "cat", "dog")

# Every config here is complete, and looking whether something is to be completed costs a process per model.
FAST_START = ("--disable-auto-complete-config", "--model-load-thread-count=8")


class TritonFactory(Protocol):
    """Starts one more Triton over the test repository; it is killed at the end of the test."""

    async def __call__(self, models: Sequence[str], *, extra: Sequence[str] = ()) -> LocalTriton: ...


@pytest.fixture(scope="session")
def triton_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with all of MODELS and ODD_MODELS."""
    return build_repository(tmp_path_factory.mktemp("triton") / "models")


@pytest.fixture(scope="session")
async def triton(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """The Triton that serves all of MODELS; tests must leave it as they found it."""
    async with for_the_whole_run(LocalTriton(triton_repository, models=MODELS, extra=FAST_START)) as server:
        yield server


@contextlib.asynccontextmanager
async def for_the_whole_run(server: LocalTriton) -> AsyncIterator[LocalTriton]:
    """A server that tests share; `start_again_what_died` looks after it."""
    await server.start(timeout=250)
    _shared.append(server)
    yield server
    _shared.remove(server)
    await server.kill()  # nothing is in flight, and a graceful end takes three seconds
    await server.aclose()


async def start_again_what_died() -> None:
    """Triton 2.51 crashed in about one of thirteen rounds of the tests that cancel streams, whatever the gateway's way
    of serving them was: the tests after those must not fail for it."""
    for server in _shared:
        if not server.is_running:
            await server.kill()
            await server.start(timeout=250)
            await asyncio.sleep(2.5)  # until gateways have probed it


@pytest.fixture
async def triton_factory(triton_repository: Path) -> AsyncIterator[TritonFactory]:
    """Starts further servers, of which a test may do what it likes: `await t.kill()`, `await t.start()`."""
    started: list[LocalTriton] = []

    async def start(models: Sequence[str], *, extra: Sequence[str] = ()) -> LocalTriton:
        server = LocalTriton(triton_repository, models=models, extra=(*FAST_START, *extra))
        started.append(server)
        await server.start(timeout=250)
        return server

    yield start
    for server in started:
        await server.kill()
        await server.aclose()


def build_repository(folder: Path) -> Path:
    """Write all of MODELS and ODD_MODELS into `folder`."""
    for source in SOURCES.iterdir():
        if (source / "config.pbtxt").is_file():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SOURCES / "accumulate" / "1", folder / "accumulate_text" / "1")
    shutil.copytree(SOURCES / "counted" / "1", folder / "counted" / "2")
    (folder / "größe" / "1").mkdir()
    for dtype in DTYPES:
        _build_identity(folder / f"identity_{dtype.lower()}", "STRING" if dtype == "BYTES" else dtype)
    _build_onnx_models(folder)
    return folder


def _build_identity(folder: Path, config_dtype: str) -> None:
    shutil.copytree(SOURCES / "identity", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.pbtxt").write_text(
        f"""backend: "python"
        max_batch_size: 8
        dynamic_batching {{ }}
        input [ {{ name: "IN" data_type: TYPE_{config_dtype} dims: [ -1 ] }} ]
        output [ {{ name: "OUT" data_type: TYPE_{config_dtype} dims: [ -1 ] }} ]
        instance_group [ {{ kind: KIND_CPU count: 1 }} ]"""
    )


def _build_onnx_models(folder: Path) -> None:
    """`add_one_a`, `add_one_b`: OUT = IN + 1, one contract in two models, `b` with versions 1 and 2, of which the
    latest is served; `add_two`: OUT = IN + 2; FP32 [-1, -1] each. `classifier`: OUT = IN, FP32 [-1, 4], with LABELS.
    """
    for name, summand, versions in (("add_one_a", 1, 1), ("add_one_b", 1, 2), ("add_two", 2, 1)):
        write_onnx_config(folder / name, dims=-1)
        for version in range(1, versions + 1):
            write_add(folder / name / str(version) / "model.onnx", summand)
    write_onnx_config(folder / "classifier", dims=len(LABELS), label_filename="labels.txt")
    (folder / "classifier" / "labels.txt").write_text("\n".join(LABELS))
    write_add(folder / "classifier" / "1" / "model.onnx", 0)


def write_onnx_config(folder: Path, *, dims: int, label_filename: str = "") -> None:
    folder.mkdir(parents=True)
    labels = f'label_filename: "{label_filename}"' if label_filename else ""
    (folder / "config.pbtxt").write_text(
        f"""backend: "onnxruntime"
        max_batch_size: 8
        dynamic_batching {{ }}
        input [ {{ name: "IN" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
        output [ {{ name: "OUT" data_type: TYPE_FP32 dims: [ {dims} ] {labels} }} ]
        instance_group [ {{ kind: KIND_CPU count: 1 }} ]
        parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}"""
    )


def write_add(file: Path, summand: float) -> None:
    """An ONNX graph: OUT = IN + summand, FP32 of any two dimensions."""
    shape = ["rows", "columns"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["IN", "summand"], ["OUT"])],
        "add",
        [helper.make_tensor_value_info("IN", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("OUT", TensorProto.FLOAT, shape)],
        [helper.make_tensor("summand", TensorProto.FLOAT, [1], [summand])],
    )
    save_onnx(graph, file)


def save_onnx(graph: onnx.GraphProto, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Versions that every onnxruntime this package allows can read.
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
