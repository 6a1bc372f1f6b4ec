"""YAML text becomes plain data with lines, or findings. Invariant: `parse` never raises, whatever the bytes."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.config.text import MAX_BYTES, MAX_DEPTH, parse, plain


def findings(text: str | bytes) -> list[str]:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return [str(finding) for finding in parse(raw, "f").findings]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1", 1),
        ("a: -7", -7),
        ("a: 0x1F", 31),
        ("a: 1.5", 1.5),
        ("a: 1e3", 1000.0),
        ("a: true", True),
        ("a: null", None),
        ("a:", None),
        ("a: ~", None),
        ("a: no", "no"),
        ("a: on", "on"),
        ("a: 1:30", "1:30"),
        ("a: 2026-01-01", "2026-01-01"),
        ("a: 1_000", "1_000"),
        ("a: 0o17", "0o17"),
        ('a: "1"', "1"),
        ("a: 'true'", "true"),
        ("a: localhost:8001", "localhost:8001"),
        ("a: |\n  text\n", "text\n"),
        ("a: " + "9" * 30, "9" * 30),
        ("a: ! 12", "12"),
        ("a: .inf", ".inf"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """No surprises from YAML 1.1: `no` is a word, `1:30` is no number, a date is text."""
    found = parse(text.encode(), "f")
    assert (found.data, found.findings) == ({"a": value}, [])
    assert type(found.data["a"]) is type(value)


def test_keys_are_always_text() -> None:
    assert parse(b"{1: a, true: b, null: c, 1.5: d}", "f").data == {"1": "a", "true": "b", "null": "c", "1.5": "d"}


def test_every_value_has_a_line() -> None:
    document = parse(b"a: 1\nb:\n  c:\n  - 5\n  - {d: 6,\n     e: 7}\n", "f")
    assert [document.line(path) for path in (("a",), ("b", "c"), ("b", "c", 0), ("b", "c", 1, "e"))] == [1, 3, 4, 6]
    assert document.line(("b", "c", 1, "missing")) == 5


OUT_OF_RANGE = ["f: is not YAML: an escape, or the number in a %YAML line, is out of range"]

BAD_TEXTS = {
    "key written twice": ("a: 1\nb: 2\na: 3\n", ["f:3: a: is written twice, first on line 1; each key once"]),
    "key written twice deep down": (
        "a:\n  b: {c: 1, c: 2}\n",
        ["f:2: a.b.c: is written twice, first on line 2; each key once"],
    ),
    "not YAML": (
        "a: [1, 2\nb: 3\n",
        ["f:2: is not YAML: expected ',' or ']', but got ':' while parsing a flow sequence"],
    ),
    "tab for indentation": (
        "a:\n\tb: 1\n",
        ["f:2: is not YAML: found character '\\t' that cannot start any token while scanning for the next token"],
    ),
    "tag": (
        "a: !!python/object:os.system x",
        ["f:1: a: has the tag 'tag:yaml.org,2002:python/object:os.system'; values without tags"],
    ),
    "merge key": ("a: {b: 1}\nc:\n  <<: {b: 2}\n", ["f:3: c.<<: merge keys are not read; an alias for a whole value"]),
    "second document": ("a: 1\n---\nb: 2\n", ["f:2: a second document starts here; one document per file"]),
    "key that is a list": ("? [a]\n: 1\n", ["f:1: a key is not plain text"]),
    "alias of nothing": ("a: *b\n", ["f:1: the alias *b has no anchor before it"]),
    "alias inside its own anchor": ("a: &a\n  b: *a\n", ["f:2: the alias *a has no anchor before it"]),
    "control character": ("a: \x07\n", ["f:1: has the character 7; printable text only"]),
    "not UTF-8": (b"a: 1\nb: \xff\n", ["f:2: is not UTF-8 text; save the file as UTF-8"]),
    "surrogate": ('a: "\\ud800"\n', ["f:1: a: has half of a surrogate pair; the character itself"]),
    "escape beyond Unicode": ('a: "\\Uffffffff"\n', OUT_OF_RANGE),
    "version beyond measure": (f"%YAML 1.{'9' * 5000}\n---\na: 1\n", OUT_OF_RANGE),
}


@pytest.mark.parametrize(("text", "expected"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_what_cannot_be_read_says_where_and_why(text: str | bytes, expected: list[str]) -> None:
    assert findings(text) == expected


def test_an_alias_stands_for_the_whole_value() -> None:
    assert parse(b"a: &x [1, 2]\nb: *x\n", "f").data == {"a": [1, 2], "b": [1, 2]}


def test_an_alias_bomb_is_refused() -> None:
    """Nine levels of nine aliases each would be 387 million values from 400 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "has more than 100000 values" in findings("\n".join(lines))[0]


MODELS = {
    "10,000 of one variant": (10_000, "  m{n:05}: {{variants: {{a: {{upstream: gpu, model: net{n:05}}}}}}}\n"),
    "5,000 of two, with a split": (
        5_000,
        "  m{n:05}: {{variants: {{a: {{upstream: gpu, model: net{n:05}}}, b: {{upstream: cpu, model: int8{n:05}}}}},"
        " split: {{a: 90, b: 10}}}}\n",
    ),
}


@pytest.mark.parametrize(("most", "line"), MODELS.values(), ids=MODELS)
def test_a_file_of_so_many_models_is_within_the_limits(most: int, line: str) -> None:
    """The limit of values is for what aliases unfold to; a file without any ends at its size."""
    text = "models:\n" + "".join(line.format(n=n) for n in range(most))
    assert len(text) < MAX_BYTES
    document = parse(text.encode(), "f")
    assert (document.findings, len(document.data["models"])) == ([], most)


@pytest.mark.parametrize(("depth", "good"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (100_000, False)])
def test_depth_is_limited(depth: int, good: bool) -> None:
    """At the limit it is read, one deeper it is not, and far beyond it costs nothing."""
    assert (findings("[" * depth + "]" * depth) == []) is good


def test_aliases_cannot_go_deeper_than_brackets() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 40)]
    assert "nests deeper" in findings("\n".join(lines))[0]


@pytest.mark.parametrize(("size", "good"), [(MAX_BYTES, True), (MAX_BYTES + 1, False)])
def test_size_is_limited(size: int, good: bool) -> None:
    assert (findings(b"a: " + b"x" * (size - 3)) == []) is good


@given(st.text())
@example("? a")
@example("%YAML 1.99\n--- a")
@example("&a &b c")
@example("- - -\n ?")
def test_any_text_is_read_or_refused(text: str) -> None:
    findings(text)


@given(st.binary())
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    findings(raw)


TEXTS = st.text().filter(lambda text: text == "" or isinstance(plain(text), str))  # "1e3" is text in YAML 1.1 only
NUMBERS = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=1000), inner), max_leaves=20
)


@given(TREES)
def test_what_pyyaml_writes_is_read_as_it_was(tree: object) -> None:
    """PyYAML quotes everything that YAML 1.1 would misread, so both versions agree on what it writes."""
    written = yaml.safe_dump(tree)
    document = parse(written.encode("utf-8", "surrogatepass"), "f")
    if not document.findings:
        assert document.data == tree
    else:
        assert any(sign in str(document.findings[0]) for sign in ("surrogate", "UTF-8", "deeper", "character"))
