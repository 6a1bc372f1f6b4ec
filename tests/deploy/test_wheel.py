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
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from test_images import context
from triton_fixture import write_add

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


CODE = {
    "java": ("com/gateway/v1/ClassifyRequest.java", "package com.gateway.v1;"),
    "csharp": ("Classification.cs", "namespace Gateway.V1 {"),
    "php": ("Gateway/V1/ClassifyRequest.php", r"namespace Gateway\V1;"),
    "objc": ("gateway/v1/Classification.pbobjc.h", "@interface GXXClassifyRequest "),
    "ruby": ("gateway/v1/classification_pb.rb", "module Gateway\n  module V1\n"),
}
"""A file that protoc itself makes in each language, and what is in it by that language's rules."""


@pytest.mark.skipif(shutil.which("protoc") is None, reason="protoc (Debian: protobuf-compiler) is not here")
@pytest.mark.parametrize("language", CODE)
def test_the_protos_make_code_where_each_language_expects_it(language: str, tmp_path: Path) -> None:
    protos = [str(file) for file in sorted((ROOT / "protos").rglob("*.proto"))]
    command = ["protoc", f"-I{ROOT / 'protos'}", f"--{language}_out={tmp_path}", *protos]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    name, said = CODE[language]
    assert said in (tmp_path / name).read_text()


def test_the_wheel_has_the_descriptors_with_their_comments(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        declared = FileDescriptorSet.FromString(opened.read("gateway/v1/gateway.binpb"))
    ours = [file for file in declared.file if file.package == "gateway.v1"]
    assert len(ours) == len(list((ROOT / "protos" / "gateway" / "v1").glob("*.proto")))
    assert all(file.source_code_info.location for file in ours)
    for file in ours:
        options, name = file.options, Path(file.name).stem
        assert options.java_outer_classname == f"{name.title()}Proto"
        assert options.java_multiple_files
        packages = (options.go_package, options.java_package, options.csharp_namespace, options.ruby_package)
        assert packages == ("gateway/v1;gatewayv1", "com.gateway.v1", "Gateway.V1", "Gateway::V1")
        assert (options.php_namespace, options.php_metadata_namespace) == ("Gateway\\V1", "Gateway\\V1\\GPBMetadata")
        assert options.objc_class_prefix == "GXX"


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


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder)
    return folder


def outside(unpacked: Path, folder: Path, *arguments: str) -> tuple[int, str]:
    """The command of the wheel, as it is used where no checkout is."""
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "gateway", *arguments]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


NEEDS_A_CHECKOUT = {
    "the demo": (("demo",), "Run it there: `make run`"),
    "its models": (("models", "build"), "part of the project's checkout and not of its package"),
    "models, of which there are none yet": (("triton", "start"), "There is no folder model_repository"),
}


@pytest.mark.parametrize(("arguments", "told"), NEEDS_A_CHECKOUT.values(), ids=NEEDS_A_CHECKOUT)
def test_what_the_wheel_does_not_bring_is_said(
    unpacked: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    code, text = outside(unpacked, tmp_path, *arguments)
    assert code == 2
    assert told in text
    assert str(unpacked) not in text  # a folder of packages is no place to look for models


def test_the_wheel_alone_serves_a_model_of_one_s_own(unpacked: Path, tmp_path: Path) -> None:
    write_add(tmp_path / "plus.onnx", 1)
    code, text = outside(unpacked, tmp_path, "models", "add", "plus.onnx")
    assert code == 0, text
    assert "zeros were answered" in text
    assert "triton start --model plus --repository model_repository" in text
    code, text = outside(unpacked, tmp_path, "models", "list")
    assert code == 0
    assert re.search(r"^plus +own +0\.0 MB  onnxruntime$", text, re.MULTILINE)
    assert outside(unpacked, tmp_path, "new", "step", "shout")[0] == 0
