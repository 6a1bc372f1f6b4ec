"""`inference-gateway demo` from start to end, with the real models, as a program whose output is not a terminal."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
import tritonclient.grpc as triton_client
from command_line import Command, command, descendants, free_address, is_running, run
from shared_regions import regions_of
from traffic import http, until

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments() -> tuple[str, ...]:
    return ("demo", "--listen", free_address(), "--admin-listen", free_address())


def shared_memory(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"inference-gateway-{pid}-*"))


async def until_nothing_is_left(demo: Command, processes: list[int]) -> None:
    assert len(processes) >= 3  # the keeper, Triton, a model's process
    await until(lambda: not any(map(is_running, processes)), 10, "the end of every process")
    await until(lambda: not shared_memory(demo.pid), 5, "the end of the shared memory")


async def test_once_answers_the_photo_both_ways_and_ends(arguments: tuple[str, ...], tmp_path: Path) -> None:
    async with command(*arguments, "--once", folder=tmp_path) as demo:
        assert await demo.wait() == 0
        assert demo.errors == ""
        lines = demo.output.splitlines()
        headings = [line.split(":")[0] for line in lines[: lines.index("")]]
        assert list(dict.fromkeys(headings)) == [
            "models",
            "triton",
            "gateway",
        ]  # models has a line for each that is built
        assert len(re.findall(r"espresso \d+\.\d\d", demo.output)) == 2  # by the typed API and by tritonclient
        assert re.search(r"language .* de 1\.00", demo.output)
        assert re.search(r"file-type .* python \d", demo.output)
        assert re.search(r"reading .* demo --task reading", demo.output)  # how to see what is not built by default
        assert re.search(r"\bonnx\b", demo.output)  # the variant; the GPU's is stepped in for
        assert "\x1b" not in demo.output
        assert max(map(len, lines)) <= 100
        assert not shared_memory(demo.pid)


async def test_a_task_answers_the_user_s_own_file(arguments: tuple[str, ...], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Le train de huit heures et demie est déjà parti.", "utf-8")
    code, output, errors = await run(*arguments, "--task", "language", "--input", str(own), "--once", folder=tmp_path)
    assert (code, errors) == (0, "")
    assert re.search(r"language .* fr \d", output)
    assert "espresso" not in output


@pytest.mark.parametrize(
    ("given", "ends_with", "told"),
    [
        (("--task", "ocr"), 2, "no task 'ocr'"),
        (("--input", "own.txt"), 2, "usage: inference-gateway demo "),
        (("--task", "language", "--input", "nowhere.txt"), 2, "nowhere.txt"),
        (("--config", "nowhere.yaml"), 2, "nowhere.yaml"),
    ],
)
async def test_what_cannot_be_shown_is_told_before_anything_starts(
    tmp_path: Path, given: tuple[str, ...], ends_with: int, told: str
) -> None:
    code, output, errors = await run("demo", *given, folder=tmp_path)
    assert (code, output) == (ends_with, "")
    assert told in errors


async def test_it_stays_up_for_other_clients_until_ctrl_c(arguments: tuple[str, ...], tmp_path: Path) -> None:
    async with command(*arguments, folder=tmp_path, group=True) as demo:
        await demo.until_said("stop Ctrl-C")
        processes = descendants(demo.pid)
        _, _, address, _, admin = arguments
        with triton_client.InferenceServerClient(address) as client:
            assert client.is_model_ready("imagenet")
            assert client.is_model_ready("photo-labels")
        assert (await http(admin, "/readyz"))[0] == 200
        assert f"-u {address}" in demo.output  # a line to copy
        await until(lambda: bool(regions_of(demo.pid)), 20, "memory that is shared with Triton")
        shared = regions_of(demo.pid)
        os.killpg(demo.pid, signal.SIGINT)
        assert await demo.wait() == 0
        assert "draining" in demo.output
        assert demo.errors == ""
        assert not any(file.exists() for file in shared)
        await until_nothing_is_left(demo, processes)


async def test_nothing_of_it_outlives_its_sudden_death(arguments: tuple[str, ...], tmp_path: Path) -> None:
    async with command(*arguments, folder=tmp_path) as demo:
        await demo.until_said("gateway: ready")
        processes = descendants(demo.pid)
        assert shared_memory(demo.pid)
        await until(lambda: bool(regions_of(demo.pid)), 20, "memory that is shared with Triton")
        shared = regions_of(demo.pid)
        demo.signal(signal.SIGKILL)
        await demo.wait()
        await until_nothing_is_left(demo, processes)
    async with command(*arguments, folder=tmp_path, group=True) as following:
        await until(lambda: not any(file.exists() for file in shared), 90, "the end of the dead gateway's memory")
        await following.until_said("stop Ctrl-C")
        shared = regions_of(following.pid)
        os.killpg(following.pid, signal.SIGINT)
        assert await following.wait() == 0
        assert not any(file.exists() for file in shared)


async def test_ctrl_c_ends_it_while_triton_starts(arguments: tuple[str, ...], tmp_path: Path) -> None:
    async with command(*arguments, folder=tmp_path, group=True) as demo:
        await demo.until_said("starting on")
        await until(lambda: len(descendants(demo.pid)) >= 2, 20, "Triton's process")
        processes = descendants(demo.pid)
        os.killpg(demo.pid, signal.SIGINT)
        assert await demo.wait() == 130
        assert demo.errors == ""
        await until(lambda: not any(map(is_running, processes)), 5, "the end of every process")
        assert not shared_memory(demo.pid)


@pytest.mark.parametrize("flag", ["--listen", "--admin-listen"])
async def test_a_taken_port_is_told_before_anything_is_fetched(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = "{}:{}".format(*server.getsockname())
        code, output, errors = await run("demo", flag, taken, folder=tmp_path)
    assert (code, output) == (1, "")
    assert taken in errors
    assert flag in errors
    assert "Traceback" not in errors
