"""The automaton's walk through a text, on one small enough to follow: it finds "ab" (feature 0) and "b" (feature 1)."""

from __future__ import annotations

import io
import time
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slowness import slowness

from gateway.steps import StepError
from gateway.steps.language import TextFeatures, TextFeaturesParams, normalise


def npy(values: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def tables() -> dict[str, bytes]:
    start, after_a = np.full(256, 0, np.uint32), np.full(256, 0, np.uint32)
    start[ord("a")] = after_a[ord("a")] = 1
    start[ord("b")], after_a[ord("b")] = 3, 2
    return {
        "t/next_state.npy": npy(np.concatenate([start, after_a])),
        "t/row_base.npy": npy(np.array([0, 256, 0, 0], np.uint32)),
        "t/feature.npy": npy(np.array([-1, -1, 0, 1], np.int32)),
    }


def build(files: dict[str, bytes]) -> TextFeatures:
    def read(path: str) -> bytes:
        if path not in files:
            raise FileNotFoundError(2, "No such file or directory")
        return files[path]

    return TextFeatures(TextFeaturesParams(tables="t"), read)


def features(*texts: bytes) -> dict[str, Any]:
    column = np.empty((len(texts), 1), np.object_)
    column[:, 0] = texts
    return build(tables())({"text": column})


def test_features_are_counted() -> None:
    made = features(b"ab ab b", b"aaab", b"", b"xyz")
    assert made["features"][:, :2].tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert made["counts"][:, :2].tolist() == [[2, 1], [1, 0], [0, 0], [0, 0]]
    assert made["length"].tolist() == [[7], [4], [0], [3]]


def test_places_are_a_power_of_two_so_that_requests_can_be_merged() -> None:
    assert features(b"ab")["features"].shape == (1, 64)
    assert features()["features"].shape == (0, 64)
    assert features()["length"].shape == (0, 1)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"Hello", b"Hello"),
        (b"HELLO", b"hello"),
        ("Zu\u0308rich".encode(), "Zürich".encode()),
        ("zürich".encode()[:2], b"z"),
        ("日本".encode()[:-1], "日".encode()),
        (b"caf\xe9 noir", b"caf\xe9 noir"),
        (b"\xff\xfe", b""),
        (b"", b""),
    ],
)
def test_a_text_is_brought_to_one_form(data: bytes, want: bytes) -> None:
    assert normalise(data) == want


@given(st.text(alphabet="ae\u00e9\u0300\u0316\u0327\u0f73\u1100\u1161\u11a8\U0001d15e", max_size=30))
def test_marks_that_a_script_may_have_are_put_in_their_order(text: str) -> None:
    assert normalise(text.encode()).decode() == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("marks", ["\u0300\u0316", "\u0344\u0316", "\u0f73"], ids=ascii)
def test_a_text_of_nothing_but_marks_costs_no_more_than_another(marks: str) -> None:
    """Sorting marks takes the square of their number, and holds the interpreter meanwhile: this took minutes."""
    data = f"a{marks * (1 << 19)}".encode()[: 1 << 20]
    began = time.thread_time()
    made = normalise(data)
    assert time.thread_time() - began < 2 * slowness()
    assert 0 < len(made) <= 3 * len(data)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("t/feature.npy", None, "cannot read 't/feature.npy': No such file or directory"),
        ("t/feature.npy", b"text", "'t/feature.npy' is not a .npy file of format 1.0"),
        ("t/feature.npy", npy(np.zeros(3, np.int32)), "the tables in 't' do not belong together"),
        ("t/next_state.npy", npy(np.full(512, 4, np.uint32)), "the tables in 't' lead to states that do not exist"),
        ("t/next_state.npy", npy(np.zeros(511, np.uint32)), "the tables in 't' lead to states that do not exist"),
        ("t/next_state.npy", npy(np.zeros(512)), "'t/next_state.npy' holds float64, not integers"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(name: str, content: bytes | None, wrong: str) -> None:
    files = {path: data for path, data in (tables() | {name: content}).items() if data is not None}
    with pytest.raises(StepError) as caught:
        build(files)
    assert caught.value.parameter == "tables"
    assert caught.value.wrong.startswith(wrong)
