"""The hot path compiled and as it stands: what an installation has, and how to choose the source."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gateway.native import is_compiled

ROOT = Path(__file__).parents[1]
MODULES = re.findall(r'^  "(gateway/.*\.py)",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
IS_COMPILED = "from gateway.native import is_compiled; print(is_compiled())"


def asked(environ: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", IS_COMPILED], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_is_to_be_compiled_is_there() -> None:
    assert MODULES
    assert all((ROOT / name).is_file() for name in MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_compiled_is_suspended_while_it_handles_an_exception(name: str) -> None:
    """mypyc keeps the exception that is being handled with the thread, not with the coroutine: others would see it."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    waiting = (ast.Await, ast.AsyncWith, ast.AsyncFor, ast.Yield, ast.YieldFrom)
    handling: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.AsyncWith)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            handling += [inner for part in (*node.handlers, *node.finalbody) for inner in ast.walk(part)]
    assert not [node.lineno for node in handling if isinstance(node, waiting)]


def test_it_is_compiled_where_there_is_a_compiler() -> None:
    able = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
    able = able and Path(sysconfig.get_path("include"), "Python.h").exists()
    chosen = not os.environ.get("GATEWAY_NO_EXTENSIONS")
    assert is_compiled() is (able and chosen)


def test_the_source_can_be_chosen() -> None:
    assert asked({**os.environ, "GATEWAY_NO_EXTENSIONS": "1"}) == "False"
