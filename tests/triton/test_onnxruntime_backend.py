"""Our ONNX Runtime backend reads configs as NVIDIA's does, merges what Triton hands over, and fails one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from onnx import TensorProto, helper
from triton_fixture import save_onnx, write_add
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from gateway.triton import LocalTriton, StartFailed

pytestmark = pytest.mark.integration

ON_CPU = 'backend: "onnxruntime" instance_group [ { kind: KIND_CPU count: 1 } ] '
WAITS = "dynamic_batching { max_queue_delay_microseconds: 200000 preferred_batch_size: [ 4 ] } "


def write_graph(file: Path, op: str, dtype: int, *, outputs: int = 1, rank: int = 2) -> None:
    """`op` from IN to OUT0 …, each of the same dtype."""
    shape = [f"d{axis}" for axis in range(rank)]
    names = [f"OUT{number}" for number in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, ["IN"], [name]) for name in names],
        op,
        [helper.make_tensor_value_info("IN", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, shape) for name in names],
    )
    save_onnx(graph, file)


def write_lookup(file: Path) -> None:
    """OUT0 = (0, 10, 20)[IN], INT64; any other IN is an error at run time."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "IN"], ["OUT0"])],
        "lookup",
        [helper.make_tensor_value_info("IN", TensorProto.INT64, ["rows", 1])],
        [helper.make_tensor_value_info("OUT0", TensorProto.INT64, ["rows", 1])],
        [helper.make_tensor("table", TensorProto.INT64, [3], [0, 10, 20])],
    )
    save_onnx(graph, file)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose configs leave out what the backend is to complete."""
    folder = tmp_path_factory.mktemp("onnx")
    write_graph(folder / "pair/1/model.onnx", "Neg", TensorProto.FLOAT, outputs=2)
    write_graph(folder / "half/1/model.onnx", "Neg", TensorProto.FLOAT16)
    write_graph(folder / "text/1/model.onnx", "Identity", TensorProto.STRING)
    write_graph(folder / "unbatched/1/model.onnx", "Neg", TensorProto.FLOAT, rank=1)
    write_graph(folder / "settings/1/other.onnx", "Neg", TensorProto.FLOAT)
    write_lookup(folder / "lookup/1/model.onnx")
    for name in ("pair", "half", "text", "lookup"):
        (folder / name / "config.pbtxt").write_text(ON_CPU + WAITS + "max_batch_size: 4")
    (folder / "unbatched" / "config.pbtxt").write_text(ON_CPU)
    (folder / "settings" / "config.pbtxt").write_text(
        ON_CPU
        + """max_batch_size: 4 default_model_filename: "other.onnx" optimization { graph { level: -1 } }
        parameters { key: "intra_op_thread_count" value { string_value: "2" } }
        parameters { key: "inter_op_thread_count" value { string_value: "2" } }
        parameters { key: "execution_mode" value { string_value: "1" } }
        parameters { key: "enable_mem_arena" value { string_value: "0" } }
        parameters { key: "enable_mem_pattern" value { string_value: "0" } }"""
    )
    return folder


@pytest.fixture(scope="module")
async def client(repository: Path) -> AsyncIterator[grpcclient.InferenceServerClient]:
    server = LocalTriton(repository)
    await server.start()
    async with grpcclient.InferenceServerClient(server.grpc_address) as client:
        yield client
    await server.kill()
    await server.aclose()


async def infer(
    client: grpcclient.InferenceServerClient, model: str, values: np.ndarray, wanted: tuple[str, ...] = ("OUT0",)
) -> dict[str, np.ndarray]:
    tensor = grpcclient.InferInput("IN", values.shape, np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values)
    result = await client.infer(model, [tensor], outputs=[grpcclient.InferRequestedOutput(name) for name in wanted])
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


async def test_inputs_and_outputs_come_from_the_graph(client: grpcclient.InferenceServerClient) -> None:
    metadata = await client.get_model_metadata("pair", as_json=True)
    assert metadata["inputs"] == [{"name": "IN", "datatype": "FP32", "shape": ["-1", "-1"]}]
    assert [output["name"] for output in metadata["outputs"]] == ["OUT0", "OUT1"]
    assert (await client.get_model_metadata("unbatched")).inputs[0].shape == [-1]


@pytest.mark.parametrize("wanted", [("OUT0",), ("OUT1",), ("OUT1", "OUT0")])
async def test_only_the_wanted_outputs_are_answered(
    client: grpcclient.InferenceServerClient, wanted: tuple[str, ...]
) -> None:
    assert set(await infer(client, "pair", np.ones((1, 3), np.float32), wanted)) == set(wanted)


async def test_requests_that_come_together_run_together(client: grpcclient.InferenceServerClient) -> None:
    """Each gets its own rows and outputs, whatever the others asked for."""
    before = (await client.get_inference_statistics("pair")).model_stats[0]
    sent = [np.full((rows, 2), rows, np.float32) for rows in (1, 2, 1)]
    wanted = [("OUT0",), ("OUT0", "OUT1"), ("OUT1",)]
    got = await asyncio.gather(*(infer(client, "pair", *call) for call in zip(sent, wanted, strict=True)))
    for values, names, answer in zip(sent, wanted, got, strict=True):
        assert set(answer) == set(names)
        assert all(np.array_equal(array, -values) for array in answer.values())
    after = (await client.get_inference_statistics("pair")).model_stats[0]
    assert after.inference_count - before.inference_count == 4
    assert after.execution_count - before.execution_count == 1


async def test_requests_of_different_shapes_are_answered(client: grpcclient.InferenceServerClient) -> None:
    sent = [np.ones((1, columns), np.float32) for columns in (1, 2, 3)]
    got = await asyncio.gather(*(infer(client, "pair", values) for values in sent))
    assert all(np.array_equal(answer["OUT0"], -values) for answer, values in zip(got, sent, strict=True))


async def test_a_bad_request_fails_alone(client: grpcclient.InferenceServerClient) -> None:
    sent = [np.array([[index]], np.int64) for index in (1, 99, 2)]
    good, bad, other = await asyncio.gather(*(infer(client, "lookup", at) for at in sent), return_exceptions=True)
    assert (good["OUT0"].item(), other["OUT0"].item()) == (10, 20)
    assert isinstance(bad, InferenceServerException)
    assert "onnxruntime: " in str(bad)
    assert "indices element out of data bounds" in str(bad)


@pytest.mark.parametrize("rows", [1, 3])
async def test_half_works(client: grpcclient.InferenceServerClient, rows: int) -> None:
    values = np.full((rows, 2), 0.5, np.float16)
    assert np.array_equal((await infer(client, "half", values))["OUT0"], -values)


async def test_texts_work_alone_and_merged(client: grpcclient.InferenceServerClient) -> None:
    sent = [np.array([texts], np.object_) for texts in ((b"", b"a"), ("größe".encode(), b"b"))]
    for calls in ([sent[1]], sent):
        got = await asyncio.gather(*(infer(client, "text", values) for values in calls))
        assert [answer["OUT0"].tolist() for answer in got] == [values.tolist() for values in calls]


async def test_a_text_that_is_not_utf8_fails_alone(client: grpcclient.InferenceServerClient) -> None:
    sent = [np.array([[text]], np.object_) for text in (b"a", b"\xff")]
    good, bad = await asyncio.gather(*(infer(client, "text", values) for values in sent), return_exceptions=True)
    assert good["OUT0"].tolist() == [[b"a"]]
    assert "'utf-8' codec can't decode" in str(bad)


async def test_a_model_without_batching_works(client: grpcclient.InferenceServerClient) -> None:
    assert (await infer(client, "unbatched", np.ones(3, np.float32)))["OUT0"].tolist() == [-1, -1, -1]


async def test_file_name_threads_and_level_come_from_the_config(client: grpcclient.InferenceServerClient) -> None:
    assert (await infer(client, "settings", np.ones((1, 1), np.float32)))["OUT0"].item() == -1


@pytest.mark.parametrize(
    ("config", "weights", "reason"),
    [
        pytest.param(
            "max_batch_size: 4", False, r"its weights .*model\.onnx are missing; build them first", id="weights"
        ),
        pytest.param(
            'output [ { name: "nope" data_type: TYPE_FP32 dims: [ -1, -1 ] } ]',
            True,
            "has no output 'nope'",
            id="output",
        ),
    ],
)
async def test_a_model_that_cannot_load_says_why(tmp_path: Path, config: str, weights: bool, reason: str) -> None:
    write_add(tmp_path / "broken" / "1" / "model.onnx", 1)
    (tmp_path / "broken" / "config.pbtxt").write_text(ON_CPU + config)
    if not weights:
        (tmp_path / "broken" / "1" / "model.onnx").unlink()
    with pytest.raises(StartFailed, match=reason):
        await LocalTriton(tmp_path, models=["broken"]).start()
