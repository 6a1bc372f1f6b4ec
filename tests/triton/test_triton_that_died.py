"""A test whose Triton died by itself is run again, and one that fails for another reason is not."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from triton_fixture import FAST_START
from triton_that_died import why_died

from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

runs: list[int | None] = []


@pytest.fixture(scope="module")
async def server(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    running = LocalTriton(triton_repository, models=["add_one_a"], extra=FAST_START)
    await running.start()
    yield running
    await running.kill()
    await running.aclose()


async def test_a_test_whose_triton_has_crashed_is_run_again_with_one_that_lives(server: LocalTriton) -> None:
    runs.append(server.pid)
    assert server.pid is not None
    if len(runs) == 1:
        os.kill(server.pid, signal.SIGSEGV)
        await server._keeper.wait()  # type: ignore[union-attr]
        raise AssertionError("it has crashed")
    assert len(set(runs)) == 2
    assert why_died() == ""


async def test_a_triton_that_a_test_has_killed_is_no_reason_to_run_it_again(server: LocalTriton) -> None:
    await server.kill()
    assert why_died() == ""
