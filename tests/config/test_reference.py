"""The reference page and the JSON Schema say what the loader does."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from gateway.config import json_schema, json_schema_text, reference
from gateway.config.text import parse
from gateway.config.words import resolve

ROOT = Path(__file__).parents[2]


def test_the_committed_reference_is_up_to_date() -> None:
    """If this fails: .venv/bin/python -c 'from gateway.config import reference; print(reference(), end="")'"""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_the_json_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(json_schema_text()))


SECTIONS = {"": json_schema(), **json_schema()["$defs"]}
KEYS = {
    f"{name}.{key}": node
    for name, section in SECTIONS.items()
    for form in (section, *section.get("anyOf", ()))
    for key, node in form.get("properties", {}).items()
}


@pytest.mark.parametrize("node", KEYS.values(), ids=KEYS)
def test_every_key_says_what_it_is_for(node: dict[str, object]) -> None:
    assert resolve(node, json_schema()).get("description")


ACCEPTED = {
    "durations and sizes": "server: {drain: 5s, drain_delay: 0.5, max_message_bytes: 1MiB}",
    "shorthands": "models: {m: {variants: {a: {upstream: u, model: x, version: 1}}, fallback: forbid, rules: [{name: "
    "r, variant: a, match: {metadata: {a: 1, b: [x, y], c: {prefix: p}}}}]}}",
    "a variable": "upstreams: {u: {endpoints: ['${TRITON:-t:1}']}}",
}
REFUSED = {
    "unknown key": "wokers: 1",
    "range": "workers: 65",
    "choice": "server: {control: everybody}",
    "condition": "models: {m: {variants: {a: {upstream: u, model: x}}, rules: [{name: r, variant: a, match: {metadata: "
    "{c: {prefx: p}}}}]}}",
}


def problems(text: str) -> list[str]:
    data = {"upstreams": {"u": {"endpoints": ["t:1"]}}, **parse(text.encode(), "f").data}
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(data)]


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_editors_accept_what_the_loader_accepts(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_editors_mark_what_the_loader_refuses(text: str) -> None:
    assert problems(text)
