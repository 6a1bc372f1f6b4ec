"""The gateway that is installed imports, checks a config, and serves a call; any Python, in seconds, with no Triton.

`.ci/pythons` runs this against a wheel on every Python that the machine has.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from pathlib import Path

import grpc
import pytest
from upstreams import INFER, FakeTriton, infer_request, infer_response

import gateway.cli

COMMAND = [sys.executable, "-m", "gateway"]
OF_EXTRAS = {
    "jwt",
    "onnx",
    "onnxruntime",
    "pocketsphinx",
    "psycopg",
    "pyarrow",
    "redis",
    "rich",
    "scipy",
    "triton_python_backend_utils",
}
"""What only extras, or a Triton, bring."""

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
upstreams: {{main: {{endpoints: ["127.0.0.1:{port}"]}}}}
models: {{public: {{variants: {{only: {{upstream: main, model: m}}}}}}}}
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=50)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(CONFIG.format(port=1))
    return file


def test_every_module_imports() -> None:
    names = [each.name for each in pkgutil.walk_packages(gateway.__path__, "gateway.") if "__main__" not in each.name]
    assert "gateway.v1.prediction_pb2" in names
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name in OF_EXTRAS, f"{name} needs {error.name}"  # noqa: PT017  (which one is the question)


def test_the_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="inference-gateway")
    assert command.load() is gateway.cli.main


def test_the_command_tells_the_version_that_is_installed() -> None:
    told = run("--version")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == version("inference-gateway") + "\n"


def test_the_command_checks_a_config(config: Path) -> None:
    assert run("check", str(config)).returncode == 0
    config.write_text(config.read_text().replace("models:", "modles:"))
    wrong = run("check", str(config))
    assert wrong.returncode == 2
    assert "models" in wrong.stdout + wrong.stderr


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """The command, until it is told to end, which it must do with 0; gives where it serves."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--config", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    assert process.stdout
    try:
        said, until = b"", time.monotonic() + 120
        while not (found := re.search(rb"serving gRPC on (\S+),", said)):
            assert select.select([process.stdout], [], [], until - time.monotonic())[0], said.decode()
            piece = os.read(process.stdout.fileno(), 65_536)
            assert piece, said.decode()
            said += piece
        yield found[1].decode()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_call_is_served_from_its_upstream(config: Path) -> None:
    triton = FakeTriton()
    with triton.served() as port:
        config.write_text(CONFIG.format(port=port))
        with serving(config) as address, grpc.insecure_channel(address) as channel:
            infer = channel.unary_unary(INFER.decode())
            for size in (0, 5, 1_000_000):
                answer = infer(infer_request("public", str(size)), wait_for_ready=True, timeout=60)
                assert answer.endswith(bytes(size))
                assert len(answer) >= len(infer_response("m", str(size), size))
            with pytest.raises(grpc.RpcError) as caught:
                infer(infer_request("nobody"), timeout=60)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert triton.executions == 3
