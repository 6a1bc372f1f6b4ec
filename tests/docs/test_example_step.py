"""docs/steps: the example is what the page says of it, and works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "steps" / "README.md"
EXAMPLE = PAGE.parent / "example"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=False
    )


def test_the_example_s_own_test_passes() -> None:
    ran = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:cloudcoil",
        "--rootdir",
        str(EXAMPLE),
        "-c",
        os.devnull,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_config_that_uses_it_is_right() -> None:
    ran = run("-m", "gateway", "check", "gateway.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_step_beside_its_config_is_found_wherever_the_gateway_was_started(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for config in (EXAMPLE / "gateway.yaml", Path(os.path.relpath(EXAMPLE / "gateway.yaml", tmp_path))):
        command = [str(Path(sys.executable).parent / "inference-gateway"), "check", str(config)]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_page_shows_the_example_s_code() -> None:
    source, page = (EXAMPLE / "tidy_text.py").read_text(), PAGE.read_text()
    shown = page.partition("```python\n")[2].partition("```")[0]
    lines = [line.removesuffix(" ...") for line in shown.splitlines() if line.strip()]
    assert len(lines) > 5
    for line in lines:
        assert line in source or "self.reads" in line or "self.writes" in line, line
