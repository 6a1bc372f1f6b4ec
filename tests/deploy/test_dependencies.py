"""No version that is used or allowed has an advisory that is known here. `make audit` asks for those that are not."""

from __future__ import annotations

import re

import pytest
from deployment_files import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LINES = [
    line.split(maxsplit=2) for line in (ROOT / ".ci" / "advisories.txt").read_text().splitlines() if line[0] != "#"
]
FLOORS = {canonicalize_name(name): Version(version) for name, version, _ in LINES}

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIRED = [
    Requirement(text) for text in re.findall(r'^  "([A-Za-z][\w.-]*(?:\[\w+\])?[<>=!~][^"]*)"', PROJECT, re.MULTILINE)
]
"""Of every group, as wide as they are. Python 3.10 has no reader of TOML."""

PINNED = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("each", [r for r in PINNED if canonicalize_name(r.name) in FLOORS], ids=str)
def test_what_the_tests_and_images_use_has_no_known_advisory(each: Requirement) -> None:
    (pin,) = each.specifier
    assert pin.operator == "=="
    assert Version(pin.version) >= FLOORS[canonicalize_name(each.name)]


@pytest.mark.parametrize("each", [r for r in REQUIRED if canonicalize_name(r.name) in FLOORS], ids=str)
def test_nobody_who_installs_the_package_may_get_a_version_with_one(each: Requirement) -> None:
    least = [Version(part.version) for part in each.specifier if part.operator in (">=", "==")]
    assert least
    assert max(least) >= FLOORS[canonicalize_name(each.name)]


def test_every_runtime_dependency_is_pinned_for_tests_and_images() -> None:
    pinned = {canonicalize_name(each.name) for each in PINNED}
    assert len(REQUIRED) > 30
    assert {canonicalize_name(each.name) for each in REQUIRED} <= pinned | {"mypy", "setuptools", "grpcio-tools"}


def test_what_builds_the_wheel_is_pinned() -> None:
    (line,) = re.findall(r"^requires = \[(.*)\]$", PROJECT, re.MULTILINE)
    for text in re.findall(r'"([^"]+)"', line):
        assert re.search(r"==|,<", text), text
