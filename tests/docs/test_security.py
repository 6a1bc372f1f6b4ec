"""docs/security.md: each defence names tests that there are, and what is fetched is what the code pins."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from gateway.artifacts import Artifact
from gateway.models import sources

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ((?:[STRIDE], )*[STRIDE]) \| (.*) \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
NAMED = sorted(set(re.findall(r"`(test_\w+)`", PAGE)))
BORDERS = {
    title: text
    for part in PAGE.partition("\n## Borders\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    for title, _, text in [part.partition("\n")]
}

WITH_ACCESS = {
    "test_a_forbidden_model_looks_like_one_that_there_is_not",
    "test_credentials_and_names_that_only_the_gateway_gives_end_at_the_door",
    "test_each_rpc_is_for_whom_the_table_says_however_its_path_is_written",
    "test_no_attack_on_a_token_gets_through",
    "test_nothing_hides_behind_the_front_of_a_large_request",
    "test_what_is_not_granted_in_a_request_is_refused_before_it_is_forwarded",
    "test_who_is_not_known_is_told_what_would_be_right_and_nothing_is_sent",
}
"""Tests of `access`."""


@cache
def known_tests() -> set[str]:
    """The names of all tests."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, kinds)
    }


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_is_there(name: str) -> None:
    assert name in known_tests() or (name in WITH_ACCESS and not (ROOT / "gateway" / "access").exists())


def test_every_threat_has_a_defence_and_a_test() -> None:
    assert len(ROWS) > 40
    for kinds, threat, defence, shown in ROWS:
        assert threat, kinds
        assert defence, threat
        assert re.search(r"`test_\w+`", shown), threat


@pytest.mark.parametrize(("title", "text"), BORDERS.items(), ids=BORDERS)
def test_a_border_is_looked_at_from_several_sides(title: str, text: str) -> None:
    assert len(set(re.findall(r"^\| ([STRIDE])", text, re.MULTILINE))) >= 3, title


def test_what_models_build_fetches_is_told_with_its_hash() -> None:
    told = set(re.findall(r"^\| ([\w-]+) \| ([\w.]+) \| `([0-9a-f]{12})` \|", PAGE, re.MULTILINE))
    pinned = [value for value in vars(sources).values() if isinstance(value, Artifact)]
    assert told == {(each.project, each.version, each.sha256[:12]) for each in pinned}
