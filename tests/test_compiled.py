"""The hot path compiled and as it stands: what an installation has, and how to choose the source."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

import pytest

from gateway.compiled import is_compiled

ROOT = Path(__file__).parents[1]


def _hatch_build() -> ModuleType:
    """The build hook, which is no part of the package; what it needs of hatchling is a base class."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, interface.__name__, interface)
        spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _listed(key: str) -> list[str]:
    """The paths of one list of the hook's settings. Python 3.10 has no reader of TOML."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{key} = \[\n(.*?)^\]$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r'^  "(gateway/[^"]+)",', found[1], re.MULTILINE)


hatch_build = _hatch_build()
SETTINGS = {key: _listed(key) for key in ("compiled", "interpreted")}
MODULES: list[str] = hatch_build.modules_of(ROOT, **SETTINGS)
IS_COMPILED = "from gateway.compiled import is_compiled; print(is_compiled())"


def asked(environ: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", IS_COMPILED], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_is_to_be_compiled_is_there() -> None:
    assert MODULES
    assert all((ROOT / name).exists() for names in SETTINGS.values() for name in names)


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


def test_what_is_left_out_of_a_package_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in SETTINGS["interpreted"]:
        assert re.search(rf'^  "{re.escape(name)}", *# \w+', text, re.MULTILINE), name


def test_native_modules_run_where_they_are_made_of_these_sources_and_nobody_chose_otherwise() -> None:
    chosen = not os.environ.get("GATEWAY_NO_EXTENSIONS")
    assert is_compiled() is (hatch_build.is_current(ROOT, MODULES) and chosen)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package, with a native module for this Python that is none, made of these sources."""
    shutil.copytree(ROOT / "gateway", tmp_path / "gateway", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in MODULES:
        (tmp_path / name).with_suffix(suffix).touch()
    (tmp_path / f"gateway__mypyc{suffix}").touch()
    (tmp_path / hatch_build.MADE_OF).write_text(json.dumps(hatch_build.digests(tmp_path, MODULES)))
    return tmp_path


def told(checkout: Path) -> tuple[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "GATEWAY_NO_EXTENSIONS"}
    command = [sys.executable, "-c", IS_COMPILED]
    done = subprocess.run(command, env=environ, cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("age", [-3600, 3600], ids=["older", "newer"])
@pytest.mark.parametrize("name", ["gateway/http2/engine.py", "gateway/types.py"])
def test_an_edited_source_runs_in_place_of_the_module_that_was_made_of_another(
    checkout: Path, name: str, age: int
) -> None:
    """Whatever the times say: a checkout of another commit, or an archive, makes them what they like."""
    assert told(checkout) == ("True", "")
    source = checkout / name
    source.write_text(source.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")
    os.utime(source, (time.time() + age, time.time() + age))
    compiled, said = told(checkout)
    assert compiled == "False"
    assert name.removeprefix("gateway/") in said
    assert not hatch_build.is_current(checkout, MODULES)


def test_native_modules_of_unknown_sources_are_ignored(checkout: Path) -> None:
    (checkout / hatch_build.MADE_OF).unlink()
    compiled, said = told(checkout)
    assert compiled == "False"
    assert "compiled.json" in said


@pytest.mark.parametrize(
    ("version", "asked", "compiles"), [("editable", "", False), ("editable", "1", True), ("standard", "", True)]
)
def test_a_checkout_is_compiled_when_asked_and_a_wheel_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, asked: str, compiles: bool
) -> None:
    monkeypatch.setenv("GATEWAY_COMPILE", asked)
    tried: list[object] = []
    monkeypatch.setattr(hatch_build, "generate", lambda root: None)
    monkeypatch.setattr(hatch_build, "compile_modules", lambda *given: tried.append(given) or ())
    hook = hatch_build.BuildHook()
    hook.root, hook.config, hook.target_name = str(tmp_path), SETTINGS, "sdist"
    hook.initialize(version, {"force_include": {}})
    assert bool(tried) is compiles


def test_the_source_can_be_chosen() -> None:
    assert asked({**os.environ, "GATEWAY_NO_EXTENSIONS": "1"}) == "False"
