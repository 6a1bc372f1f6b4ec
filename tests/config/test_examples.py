"""The example configs are valid as they stand, for the loader and for editors."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from gateway.config import json_schema, load
from gateway.config.text import parse

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))

VOCABULARY = """{"split": "chinese", "source": {}, "target": ["", ""], "start": 0, "end": 1, "source_end": 1,
"join": " ", "unknown_word": null, "most_words": 1, "most_tokens": 1, "forbidden": [], "forbidden_first": []}"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples beside the committed part of the model repository, with stand-ins for the tables that are built."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "deploy" / "examples", root / "deploy" / "examples")
    built = shutil.ignore_patterns("[0-9]*")
    shutil.copytree(ROOT / "model_repository", root / "model_repository", ignore=built)
    tables = {
        "next_state": np.zeros(256, "uint32"),
        "row_base": np.zeros(1, "uint32"),
        "feature": np.full(1, -1, "int32"),
    }
    (root / "model_repository" / "langid" / "1").mkdir()
    for name, table in tables.items():
        content = io.BytesIO()
        np.save(content, table)
        (root / "model_repository" / "langid" / "1" / f"{name}.npy").write_bytes(content.getvalue())
    for model in ("cn2en", "arabic_names"):
        (root / "model_repository" / model / "1").mkdir()
        (root / "model_repository" / model / "1" / "vocabulary.json").write_text(VOCABULARY, "utf-8")
    (root / "model_repository" / "recommend" / "1").mkdir()
    (root / "model_repository" / "recommend" / "1" / "items.txt").write_text("one\n", "utf-8")
    return root


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_without_a_finding(tree: Path, example: Path) -> None:
    assert load(tree / "deploy" / "examples" / example.name, {}).warnings == ()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_editor_finds_nothing_in_an_example(example: Path) -> None:
    data = parse(example.read_bytes(), example.name).data
    assert list(jsonschema.Draft202012Validator(json_schema()).iter_errors(data)) == []
