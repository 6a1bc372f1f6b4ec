"""The wheel: the same sources give the same bytes wherever and whenever it is built, and it says what is in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from deployment_files import ROOT
from test_images import context

VERSIONS = dict(
    line.split(" ")[0].lower().replace("_", "-").split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and 'version < "3.11"' not in line
)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What builds a wheel without a compiler, installed once. `make pythons` builds one as pip does by itself."""
    folder = tmp_path_factory.mktemp("tools")
    (line,) = re.findall(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    needed = [text for text in re.findall(r'"([^"]+)"', line) if not text.startswith("mypy")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *needed]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def built(folder: Path, tools: Path, **environ: str) -> Path:
    """A wheel from what the images' build sees, made without a compiler: that the hot path can be compiled, this very
    installation shows."""
    for file in context():
        (folder / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / "src" / file)  # as new as files of a clone
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder))
    environ = {**os.environ, "CC": "none", "PYTHONPATH": str(tools), **environ}
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(command, cwd=folder / "src", env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("here"), tools, SOURCE_DATE_EPOCH="1790000000")


def test_the_same_sources_give_the_same_wheel(wheel: Path, tools: Path, tmp_path: Path) -> None:
    """In another folder, with another umask, time zone and hash seed."""
    old = os.umask(0o077)
    try:
        other = built(
            tmp_path / "elsewhere", tools, SOURCE_DATE_EPOCH="1790000000", TZ="Asia/Tokyo", PYTHONHASHSEED="7"
        )
    finally:
        os.umask(old)
    assert other.name == wheel.name
    assert other.read_bytes() == wheel.read_bytes()


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel: Path) -> None:
    """As PEP 770 has it: a CycloneDX document in its metadata."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if ".dist-info/sboms/" in name]
        found = json.loads(opened.read(name))
    assert (found["bomFormat"], found["metadata"]["component"]["name"]) == ("CycloneDX", "inference-gateway")
    assert found["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0"}]
    versions = {part["name"].lower().replace("_", "-"): part["version"] for part in found["components"]}
    assert {"grpcio", "protobuf", "pydantic", "pillow", "uvloop"} <= versions.keys()
    assert versions.items() <= VERSIONS.items()
    needed = next(each for each in found["dependencies"] if each["ref"].startswith("pkg:pypi/inference-gateway@"))
    assert len(needed["dependsOn"]) == len(versions)


def test_what_the_images_are_built_from_is_enough_for_the_wheel(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_nothing_else_than_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        tops = {name.partition("/")[0] for name in opened.namelist()}
    assert {top.partition("-")[0] for top in tops} == {"gateway", "inference_gateway"}


def test_the_template_of_a_step_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        there = {name for name in opened.namelist() if name.startswith("gateway/templates/")}
    files = ("gateway.yaml", "pyproject.toml", "test_tidy_text.py", "tidy_text.py")
    assert there == {f"gateway/templates/step/{name}" for name in files}
