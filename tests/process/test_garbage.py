"""Collections are held off as long as anybody needs that."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from gateway.process.garbage import no_collections


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The tests' own setting comes back, whatever they leave."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


def test_collections_wait_for_the_block_and_come_back() -> None:
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_of_two_blocks_that_overlap_the_last_one_to_end_brings_them_back(first_to_end: int) -> None:
    blocks = [no_collections(), no_collections()]
    for block in blocks:
        block.__enter__()
    blocks.pop(first_to_end).__exit__(None, None, None)
    assert not gc.isenabled()
    blocks.pop().__exit__(None, None, None)
    assert gc.isenabled()


def test_who_runs_without_collections_gets_none_afterwards() -> None:
    gc.disable()
    with no_collections(), no_collections():
        pass
    assert not gc.isenabled()
    gc.enable()
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_exception_ends_the_block_too() -> None:
    with pytest.raises(KeyError), no_collections():
        raise KeyError
    assert gc.isenabled()
