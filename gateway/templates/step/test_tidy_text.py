"""The step on its own, as a function on arrays."""

from __future__ import annotations

import numpy as np
import pytest
from tidy_text import TidyText, TidyTextParams

from gateway.steps import Array, BadTensor


def texts(*values: bytes) -> dict[str, Array]:
    return {"text": np.array([[value] for value in values], np.object_)}


def tidy(step: TidyText, *values: bytes) -> list[bytes]:
    return list(step(texts(*values))["text"][:, 0])


@pytest.fixture
def step() -> TidyText:
    return TidyText(TidyTextParams(longest=12), lambda name: b"")


def test_white_space_and_case_go(step: TidyText) -> None:
    assert tidy(step, b"  Hello\n  World ", b"") == [b"hello world", b""]


@pytest.mark.parametrize(
    ("value", "reason"), [(b"\xff", "no UTF-8"), (b"much too long", "12 are allowed")], ids=["bytes", "long"]
)
def test_a_bad_row_is_named(step: TidyText, value: bytes, reason: str) -> None:
    with pytest.raises(BadTensor, match=f"input 'text', row 1: .*{reason}"):
        tidy(step, b"good", value)
