"""docs/steps: what `new step` makes is what the page says of it, and works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_client
from command_line import command

from gateway.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "steps" / "README.md"
EXAMPLE = Path(__file__).parents[2] / "gateway" / "templates" / "step"
HERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the command makes, under another name than the example's."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "step", "shout-it"]) == 0
    return tmp_path / "shout_it"


def run(folder: Path, *arguments: str) -> str:
    """What a Python in this folder says; it must end well."""
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=HERE, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_the_command_s_name_makes_the_example_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One source: what the page shows, and what a user gets."""
    assert main(["new", "step", "tidy_text", "--folder", str(tmp_path / "new")]) == 0
    shipped = {file.name: file.read_text() for file in EXAMPLE.iterdir() if file.is_file()}
    assert {file.name: file.read_text() for file in (tmp_path / "new").iterdir()} == shipped
    said = capsys.readouterr().out
    assert all(name in said for name in shipped)


def test_its_own_test_passes_and_mypy_finds_nothing(made: Path) -> None:
    assert "3 passed" in run(made, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cloudcoil")
    assert "no issues found in 2 source files" in run(made, "-m", "mypy", "--cache-dir", os.devnull)


def test_its_config_is_right_wherever_the_gateway_was_started(made: Path, tmp_path: Path) -> None:
    for config in (made / "gateway.yaml", Path(os.path.relpath(made / "gateway.yaml", tmp_path))):
        assert run(tmp_path, "-m", "gateway", "check", str(config)).count("\n") == 1  # no warning


def test_its_entry_point_leads_to_the_step(made: Path) -> None:
    (value,) = re.findall(r'^shout_it = "(.+)"$', (made / "pyproject.toml").read_text(), re.MULTILINE)
    asked = f"print(EntryPoint('shout_it', '{value}', 'inference_gateway.steps').load().params_type.__name__)"
    assert run(made, "-c", f"from importlib.metadata import EntryPoint; {asked}") == "ShoutItParams\n"


async def test_the_gateway_serves_it_without_a_triton(made: Path) -> None:
    environ = {"GATEWAY_LISTEN": "127.0.0.1:0", "GATEWAY_ADMIN_LISTEN": "127.0.0.1:0", "TRITON_ENDPOINT": "127.0.0.1:1"}
    async with command("serve", "--config", str(made / "gateway.yaml"), folder=made, environ=environ) as running:
        address, _ = await running.until_serving()
        text = triton_client.InferInput("text", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"  Hello\n World "]], dtype=object))
        with triton_client.InferenceServerClient(address) as client:
            assert client.infer("shout-it", [text]).as_numpy("text").tolist() == [[b"hello world"]]


NO_NAMES = {
    "Shout": "lower-case",
    "shout-": "lower-case",
    "é": "lower-case",
    "": "lower-case",
    "class": "means something else",
    "params": "means something else",
    "bad-tensor": "means something else",
    "top-k": "has a step 'top_k'",
    "json": "has a module 'json'",
    "gateway": "has a module 'gateway'",
}


@pytest.mark.parametrize(("name", "reason"), NO_NAMES.items(), ids=NO_NAMES)
def test_a_name_that_would_mean_something_else_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "step", name]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_written_over(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "shout_it.py").write_text("mine")
    assert main(["new", "step", "shout_it"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert (made / "shout_it.py").read_text() == "mine"


def test_the_page_shows_the_example_s_code() -> None:
    source, page = (EXAMPLE / "tidy_text.py").read_text(), PAGE.read_text()
    shown = page.partition("```python\nclass TidyText")[2].partition("```")[0]
    lines = [line.removesuffix(" ...") for line in shown.splitlines()[1:] if line.strip()]
    assert len(lines) > 5
    for line in lines:
        assert line in source or "self.reads" in line or "self.writes" in line, line
