"""A version's spelling means to the gateway what it means to Triton. The texts are those that Triton 2.59 gave."""

from __future__ import annotations

import pytest

from gateway.errors import BadRequest
from gateway.v2.versions import maybe_version, read_version

SPELLINGS = {
    "": "",
    "1": "1",
    "01": "1",
    "000": "0",
    " 1": "1",
    "\t\n\v\f\r1": "1",
    "+1": "1",
    "1 ": "1",
    "1x": "1",
    "1.5": "1",
    "0x1": "0",
    "-0": "0",
    "9223372036854775807": "9223372036854775807",
    "0" * 5000 + "7": "7",
}
NO_NUMBER = [
    "abc",
    "-",
    "+",
    " ",
    "- 1",
    "+-1",
    "\x001",
    "١",
    "9223372036854775808",
    "-9223372036854775809",
    "9" * 5000,
]
NEGATIVE = ["-1", " -01x", "-9223372036854775808"]


@pytest.mark.parametrize(("text", "version"), SPELLINGS.items())
def test_a_spelling_is_the_number_that_triton_reads(text: str, version: str) -> None:
    assert maybe_version(text) == read_version(text) == version


@pytest.mark.parametrize("text", NO_NUMBER, ids=range(len(NO_NUMBER)))
def test_what_is_no_number_is_refused_in_tritons_words(text: str) -> None:
    assert maybe_version(text) is None
    shown = text if len(text) <= 200 else text[:200] + "…"
    with pytest.raises(BadRequest) as refused:
        read_version(text)
    assert refused.value.text == (
        f"failed to get model version from specified version string '{shown}' (details: stol), "
        "version should be an integral value > 0"
    )


@pytest.mark.parametrize("text", NEGATIVE)
def test_a_negative_number_is_refused_in_tritons_words(text: str) -> None:
    assert maybe_version(text) is None
    with pytest.raises(BadRequest) as refused:
        read_version(text)
    assert refused.value.text == f"invalid model version specified '{text}' , version should be an integral value > 0"
