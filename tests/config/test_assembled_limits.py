"""A variant's `limit` as workers have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.assemble import admission_of
from gateway.config import ConfigError, load
from gateway.forwarding.admission import NONE

UPSTREAM = 'upstreams: {gpu: {endpoints: ["t:1"]}}\n'


def file_of(folder: Path, text: str) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(UPSTREAM + text)
    return file


def variant(limit: object, model: str = "a") -> str:
    return f"{{variants: {{v: {{upstream: gpu, model: {model}, limit: {limit}}}}}}}"


def test_a_number_is_shared_out_to_the_workers_and_auto_needs_no_entry(tmp_path: Path) -> None:
    models = f"models: {{x: {variant(9)}, y: {variant('none', 'b')}, z: {variant('auto', 'c')}}}\n"
    text = f"workers: 2\n{models}admission: {{caller: x-tenant, priority: x-priority}}\n"
    admission = admission_of(load(file_of(tmp_path, text), {}).config)
    assert admission.limits == {("gpu", "a"): 4, ("gpu", "b"): NONE}
    assert (admission.caller, admission.priority) == ("x-tenant", "x-priority")


@pytest.mark.parametrize("limit", [0, -1, 10_001, 1.5, "many", True])
def test_what_is_no_limit_is_refused_with_what_would_be_right(limit: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"limit.*whole number, 'auto' or 'none'"):
        load(file_of(tmp_path, f"models: {{x: {variant(str(limit).lower())}}}\n"), {})


def test_one_model_of_one_upstream_has_one_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.y\.variants\.v\.limit: is 8 here and 9 for x\.v"):
        load(file_of(tmp_path, f"models: {{x: {variant(9)}, y: {variant(8)}}}\n"), {})


@pytest.mark.parametrize(
    ("text", "caller"),
    [
        ("access: {grants: [{anonymous: true}]}\n", "gateway-caller"),
        ("access: {grants: [{anonymous: true}]}\nadmission: {caller: x-tenant}\n", "x-tenant"),
        ("access: {open: true}\n", ""),
        ("", ""),
    ],
)
def test_callers_with_names_share_turns_by_them_unless_the_config_says_otherwise(
    text: str, caller: str, tmp_path: Path
) -> None:
    models = f"models: {{x: {variant(9)}}}\n"
    assert admission_of(load(file_of(tmp_path, models + text), {}).config).caller == caller
