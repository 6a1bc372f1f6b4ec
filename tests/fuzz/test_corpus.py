"""Every input that fuzzing found worth keeping, and each past finding, once more: `make fuzz` looks for new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzer import CORPUS, LONGEST, MOST_SECONDS, SHAPES
from hypothesis import given
from hypothesis import strategies as st
from targets import TARGETS, seconds_of, with_tokens

MOST_FILES = 64
"""Of one target: what is replayed has to stay a matter of seconds."""


def files_of(name: str) -> list[Path]:
    return sorted((CORPUS / name).iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_what_others_sent_is_read_or_refused_as_declared_and_soon(name: str) -> None:
    """In at most 50 ms of CPU each."""
    slow = {}
    for file in files_of(name):
        try:
            seconds = seconds_of(TARGETS[name], file.read_bytes())
        except Exception as error:
            raise AssertionError(f"{file.parent.name}/{file.name}") from error
        if seconds > MOST_SECONDS:
            slow[file.name] = seconds
    assert not slow


@pytest.mark.parametrize("name", TARGETS)
def test_a_corpus_is_small_and_begins_with_seeds(name: str) -> None:
    files = files_of(name)
    assert any(file.name.startswith("seed-") for file in files)
    assert len(files) <= MOST_FILES
    assert all(file.stat().st_size <= LONGEST for file in files)


def test_there_is_no_corpus_that_nothing_reads() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} - set(TARGETS) <= (set() if with_tokens() else {"jwt"})
    assert SHAPES.keys() <= TARGETS.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_an_input_that_is_taken_apart_and_put_together_is_the_same(name: str) -> None:
    """For the seeds, which are well-formed: else a changed input would be broken in other places than where it was
    changed."""
    split, join = SHAPES[name]
    whole = [
        file
        for file in files_of(name)
        if file.name.startswith("seed-") and join(split(file.read_bytes())) == file.read_bytes()
    ]
    assert whole


@given(name=st.sampled_from(sorted(TARGETS)), data=st.binary(max_size=60))
def test_no_short_input_is_a_finding(name: str, data: bytes) -> None:
    TARGETS[name](data)
