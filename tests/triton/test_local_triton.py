"""The local Triton starts, tells why it does not, and leaves nothing behind however it or its parent ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from triton_fixture import FAST_START, TritonFactory, write_add, write_onnx_config

from gateway.triton import LocalTriton, PortTaken, StartFailed
from gateway.triton import server as server_module

pytestmark = pytest.mark.integration

SHM = Path("/dev/shm")
PARENT = """
import asyncio, sys
from pathlib import Path
from gateway.triton import LocalTriton

async def main():
    async with LocalTriton(Path(sys.argv[1]), models=["add_two", "slow"], extra=sys.argv[2:], exit_seconds=1):
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def traces(owner: int) -> list[str]:
    """What exists of the servers that process `owner` has started: processes and shared memory."""
    mark = f"inference-gateway-{owner}-"
    found = [region.name for region in SHM.glob(f"{mark}*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if mark in command:
            found.append(f"{process.name} {Path(command.partition(chr(0))[0]).name}")
    return sorted(found)


def wait_until_gone(owner: int, *, but: Sequence[str] = ()) -> None:
    give_up = time.monotonic() + 60
    while left := set(traces(owner)) - set(but):
        assert time.monotonic() < give_up, left
        time.sleep(0.05)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().split()[3])  # proc_pid_stat(5)


async def works(server: LocalTriton) -> bool:
    values = grpcclient.InferInput("IN", [1, 2], "FP32")
    values.set_data_from_numpy(np.ones((1, 2), np.float32))
    async with grpcclient.InferenceServerClient(server.grpc_address) as client:
        return (await client.infer("add_two", [values])).as_numpy("OUT").tolist() == [[3, 3]]


@pytest.fixture
def parent(triton_repository: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs a local Triton."""
    command = [sys.executable, "-c", PARENT, str(triton_repository), *FAST_START]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_the_parent_gets(parent: subprocess.Popen[str], number: signal.Signals) -> None:
    assert len(traces(parent.pid)) == 6, "the keeper, the server, two stubs and their two regions"
    parent.send_signal(number)
    parent.wait(60)
    wait_until_gone(parent.pid)


async def test_death_is_noticed_at_once_and_leaves_nothing(triton_factory: TritonFactory) -> None:
    before = traces(os.getpid())
    server = await triton_factory(["add_two"])
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    status = await asyncio.wait_for(server.wait_closed(), 60)
    assert status == 128 + signal.SIGKILL
    assert not server.is_running
    assert traces(os.getpid()) == before


async def test_nothing_is_left_when_the_keeper_is_killed(triton_factory: TritonFactory) -> None:
    before = traces(os.getpid())
    server = await triton_factory(["add_two"])
    assert server.pid is not None
    os.kill(parent_of(server.pid), signal.SIGKILL)
    await asyncio.wait_for(server.wait_closed(), 60)
    await asyncio.to_thread(wait_until_gone, os.getpid(), but=before)  # stubs look for their server every 0.3 s


async def test_it_starts_again_on_the_same_ports(triton_factory: TritonFactory) -> None:
    server = await triton_factory(["add_two"])
    address = server.grpc_address
    await server.kill()
    assert not server.is_running
    await server.start()
    assert server.grpc_address == address
    assert await works(server)


async def test_asked_to_end_it_ends_with_status_zero(triton_repository: Path) -> None:
    before = traces(os.getpid())
    async with LocalTriton(triton_repository, models=["add_two"], extra=FAST_START) as server:
        assert await works(server)
    assert await server.wait_closed() == 0
    assert traces(os.getpid()) == before


async def test_one_that_does_not_end_is_killed(triton_repository: Path) -> None:
    before = traces(os.getpid())
    async with LocalTriton(triton_repository, models=["add_two"], extra=FAST_START, exit_seconds=0) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
    assert traces(os.getpid()) == before


def in_temp(owner: int) -> list[str]:
    """The folders that servers of process `owner` have in the temporary directory, and the Python backend's."""
    temp = Path(tempfile.gettempdir())
    return sorted(map(str, [*temp.glob(f"inference-gateway-{owner}-*"), *Path("/tmp").glob("python_env_*")]))


async def test_a_killed_server_leaves_no_folder_in_the_temporary_directory(triton_factory: TritonFactory) -> None:
    before = in_temp(os.getpid())
    server = await triton_factory(["slow"])
    assert len(in_temp(os.getpid())) >= len(before) + 2
    await server.kill()
    assert not [folder for folder in set(in_temp(os.getpid())) - set(before) if is_nobodys(Path(folder))]


def is_nobodys(folder: Path) -> bool:
    """Tests that run at the same time have servers of their own, whose folders stay for them to take away."""
    if folder.name.startswith("inference-gateway"):
        return True
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            others = "libtriton_python" in (process / "maps").read_text()
            if others and process.stat().st_ctime <= folder.stat().st_mtime:
                return False
    return folder.exists()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_the_next_start_takes_away_what_a_gateway_left_that_was_killed_with_its_keeper(
    parent: subprocess.Popen[str], triton_factory: TritonFactory
) -> None:
    for pid in (*children_of(parent.pid), parent.pid):  # the keeper first: it would clean up
        os.kill(pid, signal.SIGKILL)
    parent.wait(60)
    assert [folder for folder in in_temp(parent.pid) if f"-{parent.pid}-" in folder]
    await triton_factory(["add_two"])
    assert not [folder for folder in in_temp(parent.pid) if f"-{parent.pid}-" in folder]
    wait_until_gone(parent.pid)


async def test_models_import_nothing_from_the_directory_that_the_gateway_was_started_in(
    triton_factory: TritonFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "numpy", "time"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    server = await triton_factory(["add_two"])
    assert await works(server)


async def test_a_cancelled_start_leaves_nothing(triton_repository: Path) -> None:
    before = traces(os.getpid())
    server = LocalTriton(triton_repository, models=["add_two"], extra=FAST_START)
    starting = asyncio.create_task(server.start())
    while server.pid is None:  # noqa: ASYNC110  # nothing announces it
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert traces(os.getpid()) == before


async def test_a_taken_port_is_named_before_anything_starts(triton_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = LocalTriton(triton_repository, models=["add_two"], grpc_port=port)
        with pytest.raises(PortTaken, match=f"Triton's gRPC port {port} on 127.0.0.1 is taken"):
            await server.start()
    assert server.pid is None


async def test_a_port_that_is_lost_before_triton_binds_it_is_chosen_anew(
    triton_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        lost = other.getsockname()[1]
        chosen = iter([[lost]])
        sample = random.sample
        monkeypatch.setattr(random, "sample", lambda *of: next(chosen, None) or sample(*of))
        monkeypatch.setattr(server_module, "_is_free", lambda host, port: True)
        async with LocalTriton(triton_repository, models=["add_two"], extra=FAST_START) as triton:
            assert triton.is_running
            assert triton.grpc_port != lost
    assert next(chosen, None) is None


async def test_a_failed_start_shows_the_log(triton_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    log.write_text("E an older line\n")
    server = LocalTriton(triton_repository, models=["absent"], extra=FAST_START, log=log)
    with pytest.raises(StartFailed) as caught:
        await server.start()
    text = str(caught.value)
    assert "failed to poll model 'absent'" in text
    assert str(log) in text
    assert "older" not in text
    assert "failed to poll" in log.read_text()


async def test_a_model_that_keeps_it_from_starting_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    for name in ("pocketsphinx", "nowhere_at_all"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").write_text(
            f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')"
        )
        (tmp_path / name / "config.pbtxt").write_text('backend: "python"')
    with pytest.raises(StartFailed) as caught:
        await LocalTriton(tmp_path).start()
    lines = str(caught.value).splitlines()
    why = "The model {0} was not loaded: ModuleNotFoundError: No module named '{0}'; {1}"
    assert why.format("pocketsphinx", "pip install 'inference-gateway[tasks]'") in lines[1:3]
    assert why.format("nowhere_at_all", "install nowhere_at_all in this environment") in lines[1:3]
    assert lines[3] == "To go on without it, name those to load: --model NAME"


async def test_one_that_is_not_ready_in_time_is_ended(triton_repository: Path) -> None:
    before = traces(os.getpid())
    server = LocalTriton(triton_repository, models=["add_two"], extra=FAST_START)
    with pytest.raises(StartFailed, match=r"not ready within 0\.01 s"):
        await server.start(timeout=0.01)
    assert traces(os.getpid()) == before


async def test_what_this_host_cannot_serve_stays_unloaded(tmp_path: Path) -> None:
    write_onnx_config(tmp_path / "on_cpu", dims=-1)
    write_add(tmp_path / "on_cpu" / "1" / "model.onnx", 1)
    (tmp_path / "on_gpu" / "1").mkdir(parents=True)
    (tmp_path / "on_gpu" / "config.pbtxt").write_text('platform: "tensorrt_plan"')
    (tmp_path / "on_gpu" / "1" / "model.plan").write_bytes(b"plan")
    async with LocalTriton(tmp_path, exit_seconds=0) as server:
        async with grpcclient.InferenceServerClient(server.grpc_address) as client:
            index = (await client.get_model_repository_index()).models
            assert {(model.name, model.state) for model in index} == {("on_cpu", "READY"), ("on_gpu", "")}
        await server.kill()
