"""A user's step is imported once: what a process can't know of newer code, its findings say."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from gateway.config import ConfigError, Loaded, load

_numbers = itertools.count()

STEP = """
from gateway.steps import Params, Step, TensorSpec

class TagParams(Params):
    longest: int = 1

class Tag(Step[TagParams]):
    params_type = TagParams

    def __init__(self, params, read):
        self.reads = self.writes = (TensorSpec("text", "BYTES", (1,)),)

    def __call__(self, tensors):
        return tensors
"""

RESTART = "was imported before, and Python does so once: if its code has changed, restart"


class Folder:
    """A config with two pipelines of one step, whose module lies beside it."""

    def __init__(self, path: Path) -> None:
        self.module = f"tagging_{next(_numbers)}"
        self.code = path / f"{self.module}.py"
        self.code.write_text(STEP)
        self.file = path / "g.yaml"

    def load(self, step: str = "Tag", parameters: str = "longest: 1", extra: str = "") -> Loaded:
        part = f'{{step: "{self.module}:{step}", with: {{{parameters}}}{extra}}}'
        ends = (
            "inputs: [{name: text, datatype: BYTES, shape: [1]}], outputs: [{name: text, datatype: BYTES, shape: [1]}]"
        )
        self.file.write_text(
            "upstreams: {cpu: {endpoints: [triton:8001]}}\ndirect: {models: all}\nmodels:\n"
            + "".join(f"  {name}: {{pipeline: {{{ends}, steps: [{part}]}}}}\n" for name in "ab")
        )
        return load(self.file, {})

    def findings(self, **changed: str) -> list[str]:
        with pytest.raises(ConfigError) as refused:
            self.load(**changed)
        return [finding.right for finding in refused.value.findings]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Folder(tmp_path)


WRONG = {
    "a parameter": {"parameters": "shortest: 1"},
    "its value": {"parameters": "longest: many"},
    "a class": {"step": "Tags"},
    "a tensor": {"extra": ", inputs: {words: text}"},
}


@pytest.mark.parametrize("changed", WRONG.values(), ids=WRONG)
def test_a_finding_about_a_step_says_whether_its_code_may_be_old(folder: Folder, changed: dict[str, str]) -> None:
    """One that is imported by the very load that finds it, as `check` does, is as new as its file."""
    assert not any(RESTART in right for right in folder.findings(**changed))
    folder.load()
    later = folder.findings(**changed)
    assert len(later) == 2
    assert all(f"'{folder.module}' {RESTART}" in right for right in later)


def test_a_config_that_runs_with_old_code_says_so(folder: Folder) -> None:
    assert folder.load().warnings == ()
    assert folder.load().warnings == ()
    folder.code.write_text(STEP + "# newer\n")
    warnings = [str(warning) for warning in folder.load().warnings]
    assert len(warnings) == 2
    for warning, (line, model) in zip(warnings, ((4, "a"), (5, "b")), strict=True):
        assert (
            f"g.yaml:{line}: warning: models.{model}.pipeline.steps[0].step: the file of '{folder.module}'" in warning
        )
        assert "restart to run its new code" in warning
    folder.code.write_text(STEP)
    assert folder.load().warnings == ()


def test_a_shipped_step_has_no_code_of_the_user(folder: Folder) -> None:
    folder.load()
    text = folder.file.read_text().replace(f"{folder.module}:Tag", "softmax")
    for _ in range(2):
        folder.file.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load(folder.file, {})
        assert RESTART not in str(refused.value)
