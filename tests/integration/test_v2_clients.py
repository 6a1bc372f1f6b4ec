"""Existing clients, unchanged but for the address: tritonclient in all its ways, and perf_analyzer."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import tritonclient.grpc as sync
import tritonclient.grpc.aio as aio
import tritonclient.utils.shared_memory as shm
from triton_fixture import TritonFactory
from tritonclient.utils import InferenceServerException
from v2_gateways import transparent_to

from gateway.app import Gateway

pytestmark = pytest.mark.integration

T = TypeVar("T")
DIMS = {"data_type": "TYPE_FP32", "dims": [-1]}
VALUES = np.arange(8, dtype=np.float32).reshape(2, 4)


def tensor(made: Any, values: np.ndarray[Any, Any], datatype: str = "FP32", name: str = "IN") -> Any:
    made = made.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


async def with_client(gateway: Gateway, use: Callable[[sync.InferenceServerClient], T]) -> T:
    """Run what uses the blocking client on a thread, as the gateway runs on this one."""

    def run() -> T:
        with sync.InferenceServerClient(gateway.listen) as client:
            return use(client)

    return await asyncio.to_thread(run)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[aio.InferenceServerClient]:
    async with aio.InferenceServerClient(gateway.listen) as made:
        yield made


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_the_blocking_client_infers(gateway: Gateway, compression: str | None) -> None:
    def use(client: sync.InferenceServerClient) -> np.ndarray[Any, Any]:
        result = client.infer(
            "adder", [tensor(sync, VALUES)], request_id="r1", priority=1, timeout=10**6, headers={"x-user": "7"},
            compression_algorithm=compression, client_timeout=10,
        )  # fmt: skip
        assert result.get_response().id == "r1"
        return result.as_numpy("OUT")

    np.testing.assert_array_equal(await with_client(gateway, use), VALUES + 1)


async def test_the_blocking_clients_callbacks_and_futures_work(gateway: Gateway) -> None:
    def use(client: sync.InferenceServerClient) -> list[Any]:
        done: queue.Queue[Any] = queue.Queue()
        for _ in range(10):
            client.async_infer("adder", [tensor(sync, VALUES)], lambda result, error: done.put((result, error)))
        return [done.get(timeout=10) for _ in range(10)]

    for result, error in await with_client(gateway, use):
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("OUT"), VALUES + 1)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_the_blocking_clients_stream_works(gateway: Gateway, compression: str | None) -> None:
    def use(client: sync.InferenceServerClient) -> list[Any]:
        done: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: done.put((result, error)), compression_algorithm=compression)
        for number in range(50):
            client.async_stream_infer("adder", [tensor(sync, VALUES)], request_id=str(number))
        client.async_stream_infer("nobody", [tensor(sync, VALUES)], request_id="wrong")
        times = tensor(sync, np.array([3], np.int32), "INT32")
        client.async_stream_infer("counter", [times], request_id="counted", enable_empty_final_response=True)
        answers = [done.get(timeout=10) for _ in range(55)]
        client.stop_stream()
        return answers

    answers = await with_client(gateway, use)
    (error,) = [error for _, error in answers if error is not None]
    assert "nobody" in str(error)
    results = [result for result, error in answers if error is None]
    counted = [result for result in results if result.get_response().id == "counted"]
    assert [result.get_response().id for result in results if result not in counted] == [str(n) for n in range(50)]
    assert [result.as_numpy("OUT") for result in counted[:3]] == [0, 1, 2]
    assert counted[3].get_response().parameters["triton_final_response"].bool_param


async def test_many_clients_of_one_process_have_a_stream_each(gateway: Gateway) -> None:
    """They share one connection, as grpcio has it, so that it carries 130 streams, and the calls of one more client."""

    def use(client: sync.InferenceServerClient) -> np.ndarray[Any, Any]:
        done: queue.Queue[Any] = queue.Queue()
        clients = [sync.InferenceServerClient(gateway.listen) for _ in range(130)]
        try:
            for each in clients:
                each.start_stream(lambda result, error: done.put((result, error)))
                each.async_stream_infer("adder", [tensor(sync, VALUES)])
            for _ in clients:
                result, error = done.get(timeout=20)
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("OUT"), VALUES + 1)
            return client.infer("adder", [tensor(sync, VALUES)], client_timeout=10).as_numpy("OUT")
        finally:
            for each in clients:
                each.stop_stream(cancel_requests=True)
                each.close()

    np.testing.assert_array_equal(await with_client(gateway, use), VALUES + 1)


async def test_the_asyncio_client_infers(client: aio.InferenceServerClient) -> None:
    results = await asyncio.gather(*(client.infer("adder", [tensor(aio, VALUES)]) for _ in range(20)))
    for result in results:
        np.testing.assert_array_equal(result.as_numpy("OUT"), VALUES + 1)


async def test_the_asyncio_clients_stream_works_and_can_be_cancelled(client: aio.InferenceServerClient) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for times in (2, 1000):
            yield {"model_name": "counter", "inputs": [tensor(aio, np.array([times], np.int32), "INT32")]}

    got = 0
    answers = client.stream_infer(requests())
    async for result, error in answers:
        assert error is None
        assert result.as_numpy("OUT").shape == (1,)
        got += 1
        if got == 20:
            answers.cancel()
            break
    assert got == 20


async def test_errors_reach_clients_as_tritons(client: aio.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nobody' is not found") as caught:
        await client.infer("nobody", [tensor(aio, VALUES)])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_every_question_of_the_client_is_answered(client: aio.InferenceServerClient) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("adder")
    assert (await client.get_server_metadata()).name == "triton"
    assert (await client.get_model_metadata("adder")).name == "adder"
    assert (await client.get_model_config("adder")).config.name == "adder"
    assert "adder" in {model.name for model in (await client.get_model_repository_index()).models}
    assert (await client.get_inference_statistics("adder")).model_stats[0].name == "adder"
    assert "trace_level" in (await client.get_trace_settings()).settings
    assert "log_info" in (await client.get_log_settings()).settings
    assert (await client.update_log_settings({"log_verbose_level": 0})).settings["log_verbose_level"].uint32_param == 0
    assert await client.update_trace_settings("add_two", {"trace_rate": "1000"})
    assert not (await client.get_cuda_shared_memory_status()).regions


async def test_models_are_loaded_and_unloaded(triton_factory: TritonFactory) -> None:
    triton = await triton_factory([])
    async with (
        transparent_to(triton.grpc_address) as gateway,
        aio.InferenceServerClient(gateway.listen) as client,
    ):
        assert not await client.is_model_ready("add_two")
        await client.load_model("add_two")
        assert await client.is_model_ready("add_two")
        assert (await client.infer("add_two", [tensor(aio, VALUES)])).get_response().model_version == "1"
        override = {"backend": "onnxruntime", "max_batch_size": 4, "input": [DIMS | {"name": "IN"}]}
        await client.load_model("add_two", config=json.dumps(override | {"output": [DIMS | {"name": "OUT"}]}))
        assert (await client.get_model_config("add_two")).config.max_batch_size == 4
        await client.unload_model("add_two")
        with pytest.raises(InferenceServerException):
            await client.infer("add_two", [tensor(aio, VALUES)])


async def test_shared_memory_carries_tensors_in_and_out(bare: Gateway) -> None:
    """The regions are registered through the gateway, with its one Triton, and hold both tensors."""
    size = VALUES.nbytes

    def use(client: sync.InferenceServerClient) -> np.ndarray[Any, Any]:
        regions = [shm.create_shared_memory_region(f"test_{way}", f"/test_{way}_{os.getpid()}", size) for way in "io"]
        try:
            shm.set_shared_memory_region(regions[0], [VALUES])
            for way in "io":
                client.register_system_shared_memory(f"test_{way}", f"/test_{way}_{os.getpid()}", size)
            assert set(client.get_system_shared_memory_status().regions) >= {"test_i", "test_o"}
            given = sync.InferInput("IN", list(VALUES.shape), "FP32")
            given.set_shared_memory("test_i", size)
            wanted = sync.InferRequestedOutput("OUT")
            wanted.set_shared_memory("test_o", size)
            result = client.infer("add_one_a", [given], outputs=[wanted])
            assert list(result.get_response().raw_output_contents) == [b""]  # it is in the region
            return np.array(shm.get_contents_as_numpy(regions[1], np.float32, list(VALUES.shape)))
        finally:
            for way in "io":
                client.unregister_system_shared_memory(f"test_{way}")
            for region in regions:
                shm.destroy_shared_memory_region(region)

    np.testing.assert_array_equal(await with_client(bare, use), VALUES + 1)
    async with aio.InferenceServerClient(bare.listen) as client:
        assert not (await client.get_system_shared_memory_status()).regions


PERF_ANALYZER = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer")


@pytest.mark.skipif(PERF_ANALYZER is None, reason="perf_analyzer is neither on PATH nor in PERF_ANALYZER")
@pytest.mark.parametrize("way", [[], ["--streaming"], ["--async"]], ids=["plain", "streaming", "async"])
async def test_perf_analyzer_needs_no_more_than_model_and_address(gateway: Gateway, way: list[str]) -> None:
    assert PERF_ANALYZER is not None
    # What bounds its run; nothing here tells it about the gateway. Its default protocol is HTTP.
    short = ["--request-count", "20"]
    command = [PERF_ANALYZER, "-m", "labels", "-u", gateway.listen, "-i", "grpc", *short, *way]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    assert "Throughput" in output.decode()
